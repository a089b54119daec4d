"""Requests as a loop takes them, with their prompts' token ids."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from msgspec.structs import replace

from sagec.dialects.cluster import INSTANCE_SCALARS
from sagec.language.models import Model
from sagec.language.settings import AT_END_OF_TEXT
from sagec.language.traces import MOONCAKE_BLOCK_TOKENS
from sagec.language.workload import Workload, drawn_tokens, sample_id
from sagec.runtime.kv.hashes import block_hashes
from sagec.runtime.request import Request, Sampling

_AS_THEY_ARE = ("priority", "tenant", "session", "adapter")
_MOST_SHARED = 2**20
_BLOCK_TOKENS = next(s.default for s in INSTANCE_SCALARS if s.name == "block_tokens")

_Prompt = tuple[tuple[int, ...], tuple[int, ...]]
"""Tokens, and hashes of their blocks where they are known."""


def requests_of(loaded: Workload, *, counted: bool = False) -> list[Request]:
    """The requests as a loop takes them; one with `samples n` is n requests, `id#0` to `id#n-1`.

    counted: prompts that are no text are ranges, which cost nothing.
    """
    prompt = _counted_prompt if counted else _prompt
    begins = itertools.accumulate(loaded.prompt_tokens, initial=0)
    return [
        request
        for index, begin in zip(range(len(loaded.rows)), begins, strict=False)
        for request in _requests(loaded, index, functools.partial(prompt, begin=begin))
    ]


def _requests(
    loaded: Workload, index: int, prompt: Callable[[Workload, int, Model], _Prompt]
) -> list[Request]:
    row, model = loaded.rows[index], loaded.scene.models[loaded.models[index]]
    said: dict[str, Any] = dict(row.said)
    samples, seed, stops = said.get("samples", 1), said.get("seed"), said.get("stop", ())
    tokens, hashes = prompt(loaded, index, model)
    first = Request(
        id=row.id,
        prompt=tokens,
        block_hashes=hashes,
        max_output_tokens=said.get("generate"),
        sampling=_sampling(said, seed),
        stop_tokens=model.end_tokens if AT_END_OF_TEXT in stops else (),
        stop_strings=tuple(stop for stop in stops if stop != AT_END_OF_TEXT),
        model=model.at.text,
        arrival_us=said.get("arrives", 0),
        ttft_us=said.get("ttft"),
        tpot_us=said.get("tpot"),
        **{name: said[name] for name in _AS_THEY_ARE if name in said},
    )
    if samples == 1:
        return [first]
    seeds = [None if seed is None else seed + sample for sample in range(samples)]
    return [
        replace(first, id=sample_id(row.id, sample), sampling=_sampling(said, seeds[sample]))
        for sample in range(samples)
    ]


def _sampling(said: dict[str, Any], seed: int | None) -> Sampling:
    given = {name: said[name] for name in ("temperature", "top_k", "top_p") if name in said}
    return Sampling(**given, seed=seed)


def _counted_prompt(loaded: Workload, index: int, model: Model, begin: int) -> _Prompt:
    """A range that no other request has, and the hashes of the blocks that a trace says it has.

    A simulated instance counts tokens, so that a range will do for what the type calls a tuple.
    """
    if (ids := loaded.texts.get(index)) is not None:
        return tuple(ids), ()
    length = loaded.prompt_tokens[index]
    blocks = loaded.rows[index].blocks[: -(-length // MOONCAKE_BLOCK_TOKENS)]
    instances = loaded.scene.instances.values()
    sizes = {int(one.scalars.get("block_tokens", _BLOCK_TOKENS)) for one in instances}
    hashes: Sequence[int] = ()
    if len(sizes) == 1:  # otherwise a hash would be of other tokens from one instance to the next
        (size,) = sizes
        alone = range(begin, begin + length // size)
        hashes = _hashes(blocks, size, alone) if blocks else alone
    return cast(_Prompt, (range(begin, begin + length), hashes))


def _hashes(blocks: Sequence[int], block_tokens: int, alone: range) -> tuple[int, ...]:
    """Hashes of a prompt's whole blocks of another size than those of its trace.

    Each names the trace's blocks up to its end. Behind the last of these, where the tokens are the
    request's own, it has hashes of its own: those of `alone`, which is one for each block.
    """
    named = block_hashes(blocks, 1)
    shared = min(len(alone), len(blocks) * MOONCAKE_BLOCK_TOKENS // block_tokens)
    last = (((at + 1) * block_tokens - 1) // MOONCAKE_BLOCK_TOKENS for at in range(shared))
    return (*(hash((named[of], at)) for at, of in enumerate(last)), *alone[shared:])


def _prompt(loaded: Workload, index: int, model: Model, begin: int) -> _Prompt:
    return _tokens(loaded, index, model), ()


def _tokens(loaded: Workload, index: int, model: Model) -> tuple[int, ...]:
    if (ids := loaded.texts.get(index)) is not None:
        return tuple(ids)
    row, vocab = loaded.rows[index], int(model.scalars["vocab"])
    length = loaded.prompt_tokens[index]
    blocks = row.blocks[: -(-length // MOONCAKE_BLOCK_TOKENS)]
    parts = [drawn_tokens(f"block {block}", MOONCAKE_BLOCK_TOKENS, vocab) for block in blocks]
    known = sum(map(len, parts))
    if known < length:
        parts.append(drawn_tokens(row.id, length - known, vocab))
    drawn = np.concatenate(parts)[:length]
    return tuple(_shared_ints(vocab)[drawn].tolist() if vocab <= _MOST_SHARED else drawn.tolist())


@functools.lru_cache(maxsize=2)
def _shared_ints(vocab: int) -> Any:
    """The numbers [0, vocab) as objects: a token of a long trace costs 8 bytes then, and not 40."""
    return np.arange(vocab).astype(object)
