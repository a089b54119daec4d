"""What each engine can do, and the rules that a plan for it must keep; one engine a file.

A file here defines `ABILITY`; nothing else lists it. `legalize` checks graphs against it before
anything runs, and says what an engine would say only when it fails.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sagec.dialects import pd
from sagec.passes.topology import Instance

Rule = Callable[[Instance, pd.StepsOp], Iterator[str]]
"""Yields what is wrong with the steps of an instance, and what would be right."""

InstanceRule = Callable[[Instance], Iterator[str]]
"""The same of an instance, whatever it runs."""


@dataclass(frozen=True)
class Ability:
    """What an engine can do.

    block_tokens: sizes of a KV block that it takes; empty: any. kv_dtypes: types of KV, beside the
    model's own. partial_prefills: prompts a step may leave unfinished; 0: any. hands_over: whether
    KV can leave and enter it, reshards: also between different tp. swaps: it takes KV of preempted
    requests to host memory; caches_prefixes: it keeps KV of requests that are done, and begins a
    prompt with it where a plan says so. samples: most outputs of one prompt. max_top_k: most tokens
    to sample among; 0: any number. rules, instance_rules: what no field can say.
    """

    engine: str
    summary: str
    block_tokens: tuple[int, ...] = ()
    kv_dtypes: tuple[str, ...] = ()
    quantizations: tuple[str, ...] = ("none",)
    partial_prefills: int = 0
    chunks_prompts: bool = True
    hands_over: bool = True
    reshards: bool = False
    swaps: bool = False
    caches_prefixes: bool = False
    max_tp: int = 1
    max_pp: int = 1
    samples: int = 1
    max_top_k: int = 0
    adapters: bool = False
    drafts: bool = False
    rules: tuple[Rule, ...] = field(default=())
    instance_rules: tuple[InstanceRule, ...] = field(default=())


def known() -> list[str]:
    """Names of the engines that have a target here."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


@functools.cache
def ability_of(engine: str) -> Ability | None:
    """What the engine can do, or None where there is no such target."""
    if engine not in known():
        return None
    ability = importlib.import_module(f"{__name__}.{engine}").ABILITY
    assert isinstance(ability, Ability)
    return ability
