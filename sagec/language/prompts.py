"""Requests as a loop takes them, with their prompts' token ids."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from msgspec.structs import replace

from sagec.language.models import Model
from sagec.language.settings import AT_END_OF_TEXT
from sagec.language.traces import MOONCAKE_BLOCK_TOKENS
from sagec.language.workload import Workload, drawn_tokens, sample_id
from sagec.runtime.request import Request, Sampling

_AS_THEY_ARE = ("priority", "tenant", "session", "adapter")
_MOST_SHARED = 2**20


def requests_of(loaded: Workload) -> list[Request]:
    """The requests as a loop takes them; one with `samples n` is n requests, `id#0` to `id#n-1`."""
    return [request for index in range(len(loaded.rows)) for request in _requests(loaded, index)]


def _requests(loaded: Workload, index: int) -> list[Request]:
    row, model = loaded.rows[index], loaded.scene.models[loaded.models[index]]
    said: dict[str, Any] = dict(row.said)
    samples, seed, stops = said.get("samples", 1), said.get("seed"), said.get("stop", ())
    first = Request(
        id=row.id,
        prompt=_prompt(loaded, index, model),
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


def _prompt(loaded: Workload, index: int, model: Model) -> tuple[int, ...]:
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
