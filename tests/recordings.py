"""Random states and decisions of rounds that follow one another, and recordings of echo runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from sagec.compiler import Compiler
from sagec.planner import CompilingPlanner
from sagec.replay import header_of
from sagec.runtime.engines.echo import Echo
from sagec.runtime.executor import ExecutorAPI
from sagec.runtime.loop import Planned
from sagec.runtime.recording import Recorder
from sagec.runtime.recording.columns import CELLS, FLAGS, STEADY, TABLE, TEXT, VALUE, kinds_of
from sagec.runtime.request import Request
from sagec.runtime.state import Decision, Instances, Running, State, Waiting
from sagec.strategies import strategy_of
from tests.echo_cluster import SPLIT, Served, members, spec

INT64 = st.one_of(st.integers(-3, 300), st.integers(-(2**63), 2**63 - 1))
WORD = st.sampled_from(["", "tiny", "p0", "é", "no room", "slack 3 ms"])
JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | WORD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORD, inner, max_size=3),
    max_leaves=5,
)


@dataclasses.dataclass(frozen=True)
class Said:
    """What a steady column holds for a request: a number and a word of its own."""

    sequence: int

    def value(self, kind: str, name: str) -> Any:
        seed = self.sequence * 31 + len(name)
        return f"{name}-{self.sequence}" if kind == TEXT else seed % 1000


@st.composite
def tables(draw: st.DrawFn, kind: type[Any], sequences: list[int] | None) -> Any:
    """A table of so many requests, or of three instances: any values where they may change."""
    kinds = kinds_of(kind)
    rows = 3 if sequences is None else len(sequences)
    columns: dict[str, Any] = {}
    for name, of in kinds.items():
        if sequences is not None and name == "sequence":
            columns[name] = sequences
        elif sequences is not None and name in STEADY:
            columns[name] = [Said(sequence).value(of, name) for sequence in sequences]
        else:
            value = {TEXT: WORD, FLAGS: st.booleans()}.get(of, INT64)
            columns[name] = draw(st.lists(value, min_size=rows, max_size=rows))
    return kind.of(columns.pop("ids"), **columns)


@st.composite
def decisions(draw: st.DrawFn, waiting: int) -> Decision:
    """Any decision: what it says of each waiting row, and all else it has to say."""
    columns: dict[str, Any] = {}
    for name, kind in kinds_of(Decision).items():
        if kind == VALUE:
            columns[name] = draw(JSON)
            continue
        rows = draw(st.integers(0, 4)) if name.startswith("preempt") else waiting
        value = WORD if kind == TEXT else st.integers(0, 2)
        dtype = {TEXT: object, "i1": np.int8}.get(kind, np.int64)
        column = np.empty(rows, dtype)
        column[:] = draw(st.lists(value, min_size=rows, max_size=rows))
        columns[name] = column
    return Decision(**columns)


@st.composite
def rounds(draw: st.DrawFn, max_rounds: int = 5) -> list[Planned]:
    """Rounds that follow each other: requests come, go, change and stay."""
    planned = []
    for number in range(draw(st.integers(1, max_rounds))):
        sequences = draw(st.lists(st.integers(0, 40), unique=True, max_size=20))
        ascending = draw(st.integers(0, 5)) > 0
        ordered = sorted(sequences) if ascending else sequences
        cut = draw(st.integers(0, len(ordered)))
        waiting = draw(tables(Waiting, ordered[cut:]))
        instances = draw(tables(Instances, None))
        cells = draw(
            st.lists(st.sampled_from([0, 0, 7, 2**40]), min_size=3 * len(waiting),
                     max_size=3 * len(waiting))
        )  # fmt: skip
        fields: dict[str, Any] = {
            name: draw(JSON) for name, kind in kinds_of(State).items() if kind == VALUE
        }
        fields |= {
            name: np.array(cells, np.int64).reshape(len(waiting), 3)
            for name, kind in kinds_of(State).items()
            if kind == CELLS
        }
        assert {n for n, k in kinds_of(State).items() if k == TABLE} == {
            "waiting",
            "running",
            "instances",
        }
        running = draw(tables(Running, ordered[:cut]))
        state = State(**fields, waiting=waiting, running=running, instances=instances)
        if planned and draw(st.booleans()):
            # As the loop does it: what did not change is the same object, and so is the memory.
            state = dataclasses.replace(
                state, running=planned[-1].state.running, memory=planned[-1].decision.memory
            )
        decision = draw(decisions(len(waiting)))
        planned.append(Planned(state, decision, (), number * 1.5, 2.0))
    return planned


CLUSTER = """\
cluster.model @m {layers = 4, hidden = 256, heads = 8, kv_heads = 2, head_dim = 32, ffn = 688,
                  vocab = 1024}
cluster.device @c0 {kind = "cpu"}
cluster.device @c1 {kind = "cpu"}
cluster.link @c0 to @c1
cluster.instance @p0 on [@c0] engine "echo" role prefill model @m {kv_blocks = 40}
cluster.instance @d0 on [@c1] engine "echo" role decode model @m {kv_blocks = 40}
pd.graph @serve {policy = "fifo", horizon = 8} { pd.yield }
"""


def recorded(
    path: Path, asked: list[Request], strategy: str = "fifo", **options: Any
) -> tuple[Served, Recorder]:
    """A run on echo engines and a virtual clock, compiled, and recorded to `path`.

    options: of the recorder; `prompts` and `tokens`: of its header.
    """
    served = Served()
    parts = {name: options.pop(name) for name in ("prompts", "tokens") if name in options}
    planner = CompilingPlanner.of(Compiler().parse(CLUSTER, "cluster.mlir").module)
    timed = {"step_us": "1000", "token_us": "10", "bytes_per_s": "10000000"}
    engines = {name: Echo(spec(name, **timed), served.clock) for name in SPLIT}
    instances = [dataclasses.replace(one, model="m") for one in members(engines, SPLIT)]
    used = strategy_of(strategy)
    header = header_of(used, planner, instances, **parts)
    with (
        ExecutorAPI(engines, instances, served.clock, watch=[served.hear]) as executor,
        Recorder(path, header, served.clock, **options) as recorder,
    ):
        executor.watch(recorder.hear)
        served.take(executor.serve(asked, used, planner))
    return served, recorder
