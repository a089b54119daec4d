"""legalize: what an engine would refuse, or die of, is said before anything runs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation
from xdsl.passes import ModulePass

from sagec.dialects import pd
from sagec.dialects.columns import ColumnAttr, quoted
from sagec.dialects.rows import symbol
from sagec.lowering.targets import Ability, ability_of, known
from sagec.passes.errors import PassError
from sagec.passes.flow import graphs, ops_in
from sagec.passes.topology import Instance, Topology, topology_of


@dataclass(frozen=True)
class LegalizePass(ModulePass):
    """Check instances, hand-overs and steps against what their engines can do; change nothing.

    Every message names the instance, the value and what would be right. The rules are those of
    `lowering/targets/`, and those that hold between the two ends of a hand-over.
    """

    name = "legalize"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        topology = topology_of(op)
        for graph in graphs(op):
            check_graph(graph, topology)


def check_graph(graph: pd.GraphOp, topology: Topology) -> None:
    """Raise PassError at the first rule that the graph breaks."""
    ops = ops_in(graph)
    steps = [op for op in ops if type(op) is pd.StepsOp]
    _check_requests(ops, steps, topology)
    _check_swaps(ops, topology)
    for op in steps:
        instance = topology.instance(op.instance_name, op)
        _refuse(instance_faults(instance), instance.op)
        for word in _words(op, "target"):
            other = topology.instance(word, op)
            _refuse(hand_over_faults(instance, other), other.op)
        _refuse(step_faults(instance, op), op)


def _refuse(faults: Iterator[str] | tuple[str, ...], op: Operation) -> None:
    for fault in faults:
        raise PassError(fault, op)


def _words(op: pd.TableOp, name: str) -> list[str]:
    """The different instances that a column of `op` names."""
    attr = op.properties.get(name)
    return [word for word in getattr(attr, "words", ()) if word]


# Instances


@functools.lru_cache(maxsize=4096)
def instance_faults(instance: Instance) -> tuple[str, ...]:
    """What is wrong with an instance, whatever it runs."""
    ability = ability_of(instance.engine)
    if ability is None:
        return (f"{_at(instance)} no target {instance.engine!r}; there are: {', '.join(known())}",)
    return tuple(f"{_at(instance)} {fault}" for fault in _instance_faults(instance, ability))


def _at(instance: Instance) -> str:
    return f"instance {symbol(instance.name)}:"


def _instance_faults(instance: Instance, ability: Ability) -> Iterator[str]:
    engine, model = ability.engine, instance.model
    if ability.block_tokens and instance.block_tokens not in ability.block_tokens:
        yield (
            f"block_tokens {instance.block_tokens}; {engine} takes "
            f"{', '.join(map(str, ability.block_tokens))}"
        )
    if instance.kv_dtype not in ("auto", model.dtype, *ability.kv_dtypes):
        takes = ", ".join(("auto", *ability.kv_dtypes))
        yield f"kv_dtype {instance.kv_dtype}; {engine} takes {takes}"
    if instance.quantization not in ability.quantizations:
        takes = ", ".join(ability.quantizations)
        yield f"quantization {instance.quantization}; {engine} takes {takes}"
    yield from _parallel_faults(instance, ability)
    if (instance.draft_tokens or instance.draft_layers) and not ability.drafts:
        yield f"{engine} does no speculative decoding; leave draft_tokens and draft_layers out"
    allowed = ability.partial_prefills
    if allowed and not 0 < instance.max_partial_prefills <= allowed:
        said = instance.max_partial_prefills or "any number of"
        yield (
            f"{said} prompts may be unfinished after a step; {engine} takes {allowed}: "
            f"say max_partial_prefills = {allowed}"
        )
    for rule in ability.instance_rules:
        yield from rule(instance)
    yield from _memory_faults(instance)


def _parallel_faults(instance: Instance, ability: Ability) -> Iterator[str]:
    model, tp, pp = instance.model, instance.tp, instance.pp
    if tp > ability.max_tp or pp > ability.max_pp:
        yield f"tp {tp}, pp {pp}; {ability.engine} takes at most {ability.max_tp}, {ability.max_pp}"
    if model.heads % tp:
        fits = [n for n in range(1, model.heads + 1) if model.heads % n == 0]
        yield f"{model.heads} heads do not split over tp {tp}; what does: {_list(fits)}"
    elif tp <= model.kv_heads and model.kv_heads % tp:
        fits = [n for n in range(1, model.kv_heads + 1) if model.kv_heads % n == 0]
        yield f"{model.kv_heads} KV heads do not split over tp {tp}; what does: {_list(fits)}"
    if model.layers < pp:
        yield f"{model.layers} layers do not split over pp {pp}; at most {model.layers}"


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _memory_faults(instance: Instance) -> Iterator[str]:
    there = sum(device.memory_bytes for device in instance.devices)
    weights = instance.model.weight_bytes
    kv = instance.kv_blocks * instance.block_tokens * instance.kv_bytes_per_token
    if weights > there:
        yield (
            f"model {symbol(instance.model.name)} needs {_gib(weights)} for its weights, and its "
            f"devices have {_gib(there)}: {_gib(weights - there)} too few"
        )
    elif weights + kv > there:
        fits = int((there - weights) // (instance.block_tokens * instance.kv_bytes_per_token))
        yield (
            f"{instance.kv_blocks} KV blocks need {_gib(kv)} beside {_gib(weights)} of weights, "
            f"and its devices have {_gib(there)}; what fits: kv_blocks = {fits}"
        )


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


# Hand-overs


@functools.lru_cache(maxsize=4096)
def hand_over_faults(source: Instance, target: Instance) -> tuple[str, ...]:
    """Why KV cannot go from one instance to the other."""
    ends = f"hand-over {symbol(source.name)} to {symbol(target.name)}:"
    return tuple(f"{ends} {fault}" for fault in _hand_over_faults(source, target))


def _hand_over_faults(source: Instance, target: Instance) -> Iterator[str]:
    both = [ability_of(source.engine), ability_of(target.engine)]
    for ability in both:
        if ability is not None and not ability.hands_over:
            yield f"{ability.engine} hands over no KV; let one instance do both phases"
    if source.engine != target.engine:
        yield f"engines {source.engine} and {target.engine} differ; use one on both sides"
    if source.model.name != target.model.name:
        yield (
            f"models {symbol(source.model.name)} and {symbol(target.model.name)} differ; "
            "KV is of one model"
        )
    yield from _tp_faults(source, target, all(a is not None and a.reshards for a in both))
    for what in ("block_tokens", "kv_layout", "draft_layers"):
        ours, theirs = getattr(source, what), getattr(target, what)
        if ours != theirs:
            why = " (KV of a draft model on one side only)" if what == "draft_layers" else ""
            yield f"{what} {ours} and {theirs} differ{why}; make them the same"
    if _kv_dtype(source) != _kv_dtype(target):
        yield (f"kv_dtype {_kv_dtype(source)} and {_kv_dtype(target)} differ; make them the same")


def _kv_dtype(instance: Instance) -> str:
    return instance.model.dtype if instance.kv_dtype == "auto" else instance.kv_dtype


def _tp_faults(source: Instance, target: Instance, reshards: bool) -> Iterator[str]:
    if source.tp == target.tp:
        return
    if not reshards:
        yield f"tp {source.tp} and {target.tp} differ, and {source.engine} does not re-shard KV"
        return
    for instance in (source, target):
        if instance.tp > instance.model.kv_heads:
            yield (
                f"tp {instance.tp} of {symbol(instance.name)} is more than "
                f"{instance.model.kv_heads} KV heads, which are then replicated and do not "
                f"re-shard; at most {instance.model.kv_heads}"
            )


# Requests


def _check_requests(ops: list[Operation], steps: list[pd.StepsOp], topology: Topology) -> None:
    """What requests ask that the engines of their instances cannot give."""
    handed = any(_words(op, "target") for op in steps)
    engines = {topology.instance(op.instance_name, op).engine for op in steps}
    abilities = [ability for engine in engines if (ability := ability_of(engine)) is not None]
    for op in ops:
        if type(op) is pd.RequestsOp:
            _refuse(_sample_faults(op, handed, abilities), op)
            _refuse(_adapter_faults(op, abilities), op)
            _refuse(_top_k_faults(op, abilities), op)


def _check_swaps(ops: list[Operation], topology: Topology) -> None:
    """Raise PassError where KV is to go to host memory, and an engine has no way there."""
    for op in ops:
        if type(op) is not pd.PreemptOp:
            continue
        swapped = np.flatnonzero(op.column("verdict") == pd.SWAP)
        places = op.words("on") if swapped.size else []
        for row in swapped.tolist():
            instance = topology.instance(places[row], op)
            ability = ability_of(instance.engine)
            if ability is not None and not ability.swaps:
                _refuse(
                    (
                        f"{_at(instance)} {quoted(op.names[row])} is to be swapped out, and "
                        f"{ability.engine} takes no KV to host memory; preempt it instead",
                    ),
                    op,
                )


def _sample_faults(op: pd.RequestsOp, handed: bool, abilities: list[Ability]) -> Iterator[str]:
    if "samples" not in op.properties:
        return
    samples = op.column("samples")
    row = int(samples.argmax()) if samples.size else 0
    if not samples.size or samples[row] == 1:
        return
    asks = f"{quoted(op.names[row])} asks {samples[row]} outputs of one prompt"
    if handed:
        yield f"{asks}, and prefill and decode are apart; 1, or let one instance do both phases"
    for ability in abilities:
        if samples[row] > ability.samples:
            yield f"{asks}; {ability.engine} takes at most {ability.samples}"


def _adapter_faults(op: pd.RequestsOp, abilities: list[Ability]) -> Iterator[str]:
    if "adapter" not in op.properties:
        return
    for name, adapter in zip(op.names, op.words("adapter"), strict=True):
        for ability in abilities:
            if adapter and not ability.adapters:
                asks = f"{quoted(name)} asks for adapter {quoted(adapter)}"
                yield f"{asks}; {ability.engine} takes none"


def _top_k_faults(op: pd.RequestsOp, abilities: list[Ability]) -> Iterator[str]:
    if "top_k" not in op.properties:
        return
    top_k = op.column("top_k")
    for ability in abilities:
        if ability.max_top_k and top_k.max(initial=0) > ability.max_top_k:
            row = int(top_k.argmax())
            yield (
                f"{quoted(op.names[row])} is sampled among its {top_k[row]} likeliest tokens; "
                f"{ability.engine} takes top_k {ability.max_top_k} at most, or 0: all of them"
            )


# Steps


def step_faults(instance: Instance, steps: pd.StepsOp) -> Iterator[str]:
    """What is wrong with the steps of an instance."""
    ability = ability_of(instance.engine)
    faults = [*_budget_faults(instance, steps), *_partial_faults(instance, steps, ability)]
    faults += _reuse_faults(steps, ability)
    for rule in ability.rules if ability is not None else ():
        faults.extend(rule(instance, steps))
    for fault in faults:
        yield f"{_at(instance)} {fault}"


def _budget_faults(instance: Instance, steps: pd.StepsOp) -> Iterator[str]:
    budget = steps.number("max_step_tokens")
    if budget > instance.max_step_tokens:
        yield f"steps of {budget} tokens; its budget is {instance.max_step_tokens}"
    predicted = steps.properties.get("step_tokens")
    if isinstance(predicted, ColumnAttr) and len(predicted):
        tokens = predicted.array
    else:
        step, _, begin, end = steps.chunks
        prompts = np.bincount(step, end - begin, steps.number("num_steps"))
        tokens = prompts if step.size else step
    if tokens.size and tokens.max() > budget:
        worst = int(tokens.argmax())
        yield f"step {worst} computes {int(tokens[worst])} tokens; its budget is {budget}"
    blocks = steps.properties.get("step_blocks")
    if isinstance(blocks, ColumnAttr) and len(blocks) and blocks.array.max() > instance.kv_blocks:
        worst = int(blocks.array.argmax())
        yield (
            f"step {worst} holds {int(blocks.array[worst])} KV blocks; it has {instance.kv_blocks}"
        )


def _partial_faults(
    instance: Instance, steps: pd.StepsOp, ability: Ability | None
) -> Iterator[str]:
    """Prompts that steps leave unfinished, and chunks that do not follow each other."""
    step, row, _, end = steps.chunks
    if not step.size:
        return
    partial = end < steps.column("prompt")[row]
    if ability is not None and not ability.chunks_prompts and partial.any():
        name = quoted(steps.names[row[int(partial.argmax())]])
        yield (
            f"the prompt of {name} is computed in chunks, which {ability.engine} does not do; its "
            f"budget of {instance.max_step_tokens} tokens must take the longest prompt whole"
        )
    allowed = ability.partial_prefills if ability is not None else 0
    if allowed:
        counts = np.bincount(step[partial], minlength=1)
        if counts.max() > allowed:
            worst = int(counts.argmax())
            yield (
                f"step {worst} leaves {int(counts[worst])} prompts unfinished; "
                f"{instance.engine} takes {allowed}"
            )
    yield from _gap_faults(steps)


def _reuse_faults(steps: pd.StepsOp, ability: Ability | None) -> Iterator[str]:
    """Prompts that are to begin with KV that the engine has not kept."""
    if ability is None or ability.caches_prefixes or ability.swaps:
        return
    cached = steps.column("cached")
    for row in np.flatnonzero(cached)[:1].tolist():
        yield (
            f"{quoted(steps.names[row])} is to begin with {cached[row]} tokens that were computed "
            f"before, and {ability.engine} keeps none; leave the match out"
        )


def _gap_faults(steps: pd.StepsOp) -> Iterator[str]:
    """Chunks of a prompt that do not follow each other."""
    _, row, begin, end = steps.chunks
    if np.count_nonzero(np.bincount(row)) == len(row):
        return  # each has one
    order = np.argsort(row, kind="stable")
    follows = row[order][1:] == row[order][:-1]
    gap = follows & (begin[order][1:] != end[order][:-1])
    if gap.any():
        chunk = int(order[1:][gap][0])
        yield (
            f"{quoted(steps.names[row[chunk]])}: the chunk [{begin[chunk]}, {end[chunk]}) does not "
            "begin where the one before ended"
        )
