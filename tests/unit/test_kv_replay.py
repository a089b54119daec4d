"""Recorded requests through every policy, and the two bounds over them."""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagec.language.traces import read_trace
from sagec.runtime.kv.policies import create, known
from sagec.runtime.kv.replay import Replayed, belady, replay, unbounded

ROOT = Path(__file__).parents[2]
TRACE = ROOT.parent / "shared" / "traces" / "mooncake" / "synthetic_trace.jsonl"
SIZES = (500, 2_000, 8_000)

LEAVES = st.integers(0, 14)


def path_to(block: int) -> list[int]:
    """A request for a block of a binary tree, where block b follows block (b - 1) // 2."""
    path = [block]
    while path[-1]:
        path.append((path[-1] - 1) // 2)
    return path[::-1]


REQUESTS = st.lists(LEAVES.map(path_to), max_size=30)


@functools.cache
def recorded() -> tuple[tuple[int, ...], ...]:
    """The blocks of the first requests of the Mooncake trace."""
    if not TRACE.exists():
        pytest.skip(f"no {TRACE.name} beside the checkout")
    return tuple(request.blocks for request in read_trace(TRACE, limit=400))


def test_a_cache_without_bounds_finds_exactly_the_prefixes_that_came_before() -> None:
    seen: set[tuple[int, ...]] = set()
    hits = 0
    for blocks in recorded():
        prefixes = [blocks[:end] for end in range(1, len(blocks) + 1)]
        hits += sum(prefix in seen for prefix in prefixes)
        seen.update(prefixes)
    blocks = sum(map(len, recorded()))
    assert unbounded(recorded()) == Replayed(blocks, hits)
    assert 0 < hits < blocks


@pytest.mark.parametrize("name", known())
def test_a_policy_that_never_has_to_choose_finds_what_a_cache_without_bounds_finds(
    name: str,
) -> None:
    size = sum(map(len, recorded()))
    assert replay(recorded(), create(name, size), size) == unbounded(recorded())


@pytest.mark.parametrize("size", SIZES)
def test_lru_finds_what_a_plain_list_of_blocks_by_last_use_finds(size: int) -> None:
    # A request uses its last block first here: a block goes only after those that follow it.
    by_last_use: dict[int, None] = {}
    hits = 0
    for blocks in recorded():
        hits += len(list(itertools.takewhile(by_last_use.__contains__, blocks)))
        for block in reversed(blocks):
            by_last_use.pop(block, None)
            by_last_use[block] = None
        for block in list(by_last_use)[: max(len(by_last_use) - size, 0)]:
            del by_last_use[block]
    assert replay(recorded(), create("lru", size), size).hits == hits


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", known())
def test_no_policy_finds_more_than_the_bounds(name: str, size: int) -> None:
    found = replay(recorded(), create(name, size), size)
    best = belady(recorded(), size)
    assert 0 < found.hits <= best.hits <= unbounded(recorded()).hits
    assert found.blocks == best.blocks == unbounded(recorded()).blocks
    assert found.blocks - found.hits - found.evictions <= size


def test_the_bound_grows_with_the_cache() -> None:
    rates = [belady(recorded(), size).hit_rate for size in (0, *SIZES, 1_000_000)]
    assert rates == sorted(rates)
    assert rates[0] == 0
    assert rates[-1] == unbounded(recorded()).hit_rate


@pytest.mark.parametrize("name", known())
@given(requests=REQUESTS, size=st.integers(0, 12))
def test_no_policy_finds_more_than_the_bounds_in_small_trees(
    name: str, requests: list[list[int]], size: int
) -> None:
    found = replay(requests, create(name, size), size)
    assert found.hits <= belady(requests, size).hits <= unbounded(requests).hits


@settings(max_examples=40, deadline=None)
@given(requests=st.lists(st.integers(0, 6).map(path_to), max_size=7), size=st.integers(1, 3))
def test_the_bound_is_what_the_best_choice_of_leaves_reaches(
    requests: list[list[int]], size: int
) -> None:
    uses = [block for request in requests for block in request]

    @functools.cache
    def best_from(moment: int, cached: frozenset[int]) -> int:
        """Most hits from a moment on, by trying every set of blocks that hangs together."""
        if moment == len(uses):
            return 0
        block = uses[moment]
        hit = block in cached
        there = cached | {block}
        choices = [there, *(there - {one} for one in there)]
        kept = (c for c in choices if len(c) <= size and all((b - 1) // 2 in c for b in c if b))
        return hit + max(best_from(moment + 1, choice) for choice in kept)

    assert belady(requests, size).hits == best_from(0, frozenset())


def test_a_request_longer_than_the_cache_is_cached_as_far_as_there_is_room() -> None:
    requests = [list(range(10)), list(range(10))]
    for name in known():
        assert replay(requests, create(name, 4), 4) == Replayed(blocks=20, hits=4, evictions=0)


def test_nothing_asked_is_nothing_found() -> None:
    assert unbounded([]).hit_rate == belady([[]], 3).hit_rate == 0.0
    assert replay([], create("lru", 3), 3) == Replayed(blocks=0, hits=0)


def test_the_benchmark_runs_and_says_what_it_measured(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "kv.py", "--quick", "--out", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Hit rates" in done.stdout or "no trace" in done.stdout
    found = json.loads((tmp_path / "kv.json").read_text())
    timed = {(one["what"], one["operation"]) for one in found["timings"]}
    assert {("pool", "allocate"), ("pool", "free"), ("index", "evict")} <= timed
    assert {(name, "victim") for name in known()} <= timed
    if TRACE.exists():
        assert {one["policy"] for one in found["hit_rates"]} >= set(known())
        for picture in ("kv-hit-rate.svg", "kv-of-belady.svg", "kv-lifetime.svg"):
            ElementTree.fromstring((tmp_path / picture).read_text())
