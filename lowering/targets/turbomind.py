"""LMDeploy's TurboMind 0.11, patched in place.

Its loop aborts where a step leaves two prompts unfinished, or where the unfinished one is not the
last, and dies where a step has nothing to compute.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sagec.dialects import pd
from sagec.dialects.columns import quoted
from sagec.lowering.targets import Ability
from sagec.passes.topology import Instance


def partial_prefill_is_last(instance: Instance, steps: pd.StepsOp) -> Iterator[str]:
    """The chunk that leaves its prompt unfinished must be the last of its step."""
    step, row, _, end = steps.chunks
    partial = end < steps.column("prompt")[row]
    last = np.append(step[1:] != step[:-1], True)[: len(step)]
    for chunk in np.flatnonzero(partial & ~last)[:1].tolist():
        yield (
            f"step {step[chunk]} goes on after {quoted(steps.names[row[chunk]])}, whose prompt it "
            "leaves unfinished; turbomind takes an unfinished prompt only as the last of a step"
        )


def no_step_is_empty(instance: Instance, steps: pd.StepsOp) -> Iterator[str]:
    """Every step computes something."""
    computes = np.zeros(steps.number("num_steps"), np.bool_)
    computes[steps.chunks[0]] = True
    begin, until = steps.column("begin"), steps.column("until")
    held = np.maximum(steps.column("computed"), steps.column("prompt"))
    for first, tokens in zip(begin[until > 0], (until - held)[until > 0], strict=True):
        computes[first : first + tokens] = True
    for empty in np.flatnonzero(~computes)[:1].tolist():
        yield f"step {empty} computes nothing; turbomind dies of an empty step: leave it out"


ABILITY = Ability(
    engine="turbomind",
    summary="LMDeploy 0.11's TurboMind, patched in place",
    block_tokens=(64, 128, 256),
    kv_dtypes=("int8", "int4"),
    quantizations=("none", "int4", "awq", "gptq"),
    partial_prefills=1,
    caches_prefixes=True,
    max_tp=8,
    rules=(partial_prefill_is_last, no_step_is_empty),
)
