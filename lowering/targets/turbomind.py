"""LMDeploy's TurboMind 0.11, patched in place.

Its loop aborts where a step leaves two prompts unfinished, or where the unfinished one is not the
last, and as it is dies where a step has nothing to compute. Patched, it holds an empty step and
leaves a second unfinished prompt out; a plan does not rely on that.

Its kernels are for blocks of 64 tokens and multiples, heads of 64, 128 or 192, and types of 16
bits; anything else aborts with the first step, or reads the wrong KV. The toy maths, which runs
TurboMind's own scheduler without a GPU, takes all sizes and types.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sagec.dialects import pd
from sagec.dialects.columns import quoted
from sagec.dialects.rows import symbol
from sagec.lowering.targets import Ability
from sagec.passes.topology import Instance

BLOCK_TOKENS = 64
"""A tile of its attention: blocks are so large, or a multiple of it."""

HEAD_DIMS = (64, 128, 192)
DTYPES = ("f16", "bf16")
MAX_TOP_K = 1024
"""Beyond it the top-k kernel throws, and the engine aborts."""


def is_toy(instance: Instance) -> bool:
    """Whether the instance runs with the toy maths: where it says so, or has no GPU and says
    nothing else."""
    words = instance.options.split()
    if said := [word for word in words if word.startswith("maths=")]:
        return said[-1] == "maths=toy"
    return all(device.kind == "cpu" for device in instance.devices)


def kernels_are_there(instance: Instance) -> Iterator[str]:
    """Block size, head size and types are those of its kernels."""
    if is_toy(instance):
        return
    model, dtype = instance.model, instance.dtype
    if instance.block_tokens % BLOCK_TOKENS:
        multiples = ", ".join(str(n * BLOCK_TOKENS) for n in (1, 2, 4))
        yield f"block_tokens {instance.block_tokens}; turbomind takes {multiples}, ..."
    if model.head_dim not in HEAD_DIMS:
        takes = ", ".join(map(str, HEAD_DIMS))
        yield f"head_dim {model.head_dim} of {symbol(model.name)}; turbomind takes {takes}"
    if model.head_dim == 192 and instance.kv_dtype == "int4":
        yield "kv_dtype int4 with head_dim 192; turbomind takes auto or int8 there"
    if dtype == "auto" and model.dtype == "f32":
        yield (
            f"{symbol(model.name)} is f32, which turbomind does not compute in; "
            'say dtype = "f16" or "bf16"'
        )
    elif dtype not in ("auto", *DTYPES):
        yield f"dtype {dtype}; turbomind computes in {' or '.join(DTYPES)}"
    elif dtype != "auto" and instance.kv_dtype not in ("auto", "int8", "int4", dtype):
        yield f"kv_dtype {instance.kv_dtype}; turbomind keeps KV in {dtype}, int8 or int4"


def ranks_are_a_power_of_two(instance: Instance) -> Iterator[str]:
    """Tensor-parallel ranks; more than there are KV heads share them evenly."""
    tp, kv_heads = instance.tp, instance.model.kv_heads
    if tp & (tp - 1):
        yield f"tp {tp}; turbomind takes 1, 2, 4 or 8"
    elif tp > kv_heads and tp % kv_heads:
        yield f"{kv_heads} KV heads are not shared evenly by tp {tp}; at most tp {kv_heads}"


def options_leave_room_for_a_step(instance: Instance) -> Iterator[str]:
    """What its options bound is no less than what plans may ask of it."""
    said = dict(word.split("=", 1) for word in instance.options.split() if "=" in word)
    asked = {"step_tokens": instance.max_step_tokens, "max_batch": instance.max_batch}
    for name, least in asked.items():
        if name in said and not (said[name].isdecimal() and int(said[name]) >= least):
            its = "max_step_tokens" if name == "step_tokens" else name
            yield f"option {name}={said[name]}, and its {its} is {least}; say {least} or more"


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
    """Every step computes something; when KV from elsewhere comes, only the engine knows."""
    until = steps.column("until")
    if "source" in steps.properties and any(np.array(steps.words("source"))[until > 0]):
        return
    computes = np.zeros(steps.number("num_steps"), np.bool_)
    computes[steps.chunks[0]] = True
    decodes_in = np.arange(len(computes)) if _mixes_phases(steps) else np.flatnonzero(~computes)
    held = np.maximum(steps.column("computed"), steps.column("prompt"))
    begin = np.searchsorted(decodes_in, steps.column("begin"))
    for first, tokens in zip(begin[until > 0], (until - held)[until > 0], strict=True):
        computes[decodes_in[first : first + tokens]] = True
    for empty in np.flatnonzero(~computes)[:1].tolist():
        yield (
            f"step {empty} computes nothing; turbomind as it is dies of an empty step: leave it out"
        )


def _mixes_phases(steps: pd.StepsOp) -> bool:
    """Whether its steps were packed with decodes beside chunks."""
    graph = steps.parent_op()
    return not isinstance(graph, pd.GraphOp) or graph.text("mode", "hybrid") == "hybrid"


ABILITY = Ability(
    engine="turbomind",
    summary="LMDeploy 0.11's TurboMind, patched in place",
    kv_dtypes=("int8", "int4"),
    quantizations=("none", "int4", "awq", "gptq"),
    partial_prefills=1,
    swaps=True,
    caches_prefixes=True,
    max_tp=8,
    max_top_k=MAX_TOP_K,
    rules=(partial_prefill_is_last, no_step_is_empty),
    instance_rules=(kernels_are_there, ranks_are_a_power_of_two, options_leave_room_for_a_step),
)
