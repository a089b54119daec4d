"""Plans without IR: what the pipeline `round` does, on columns alone.

`topology`, `columns`, `work`, `packing` and `placement` are the arithmetic of the passes, and are
theirs too. `planner` puts them together for the rounds that are usual, and gives to the byte the
plans that the passes give; for other rounds it says that it gives none.
"""
