"""`sagec search`: the best layout is found, the others lose for a reason that is told."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from sagec import language
from sagec.capacity import Target
from sagec.cli import main
from sagec.passes.topology import topology_of
from sagec.planner import planner_of
from sagec.runtime.kv import block_hashes
from sagec.runtime.profile import Shape, to_text
from sagec.runtime.request import Request
from sagec.runtime.strategies import create
from sagec.search import (
    Layout,
    Load,
    Search,
    SearchError,
    highest,
    layouts,
    rate_of,
    repeated,
    rung_of,
)
from sagec.simulation import simulate
from tests.unit.test_profile import MADE

FILE = """model m {
  layers 32 hidden 4096 heads 16 kv_heads 8 ffn 14336 vocab 32000 max_context 8192
}
cluster box {
  devices g0..g2 kind a10
  switch nv
  link g0..g2 to nv bandwidth 100GB/s latency 2us
  instances i0..i2 on g0..g2 engine sim block 32 budget 1024 max_batch 64
}
serve on box mode hybrid {promises} {
  request "ask" tokens 1400 generate 24 samples 8
  request "read" tokens 6000 generate 12 samples 4
}
"""
PROMISES = "ttft 1500ms tpot 80ms"


def written(folder: Path, promises: str = PROMISES) -> str:
    (folder / "box.sage").write_text(FILE.replace("{promises}", promises), "utf-8")
    return str(folder / "box.sage")


def searched(captured: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    captured.readouterr()
    assert main(["search", *words, "--json"]) == 0
    verdicts: list[dict[str, Any]] = json.loads(captured.readouterr().out)
    return verdicts


@given(
    devices=st.integers(1, 9),
    tps=st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, unique=True),
    kv_heads=st.sampled_from([1, 2, 4, 8]),
)
def test_every_layout_fits_and_leaves_no_room_for_one_instance_more(
    devices: int, tps: list[int], kv_heads: int
) -> None:
    found = list(layouts(devices, tps, (256,), heads=8, kv_heads=kv_heads))
    assert len(found) == len(set(found))
    for layout in found:
        left = devices - layout.num_devices
        ranks = layout.both_tp if layout.both else layout.decode_tp
        assert 0 <= left < ranks
        assert kv_heads % ranks == 0
        assert bool(layout.both) != bool(layout.prefill and layout.decode)


def test_nobody_is_better_than_its_bound_and_who_was_left_out_could_not_have_won(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, "ttft 3s tpot 90ms")
    found = searched(capsys, file, "--limit", "24", "--best", "1", "--chunk", "512")
    simulated = [one for one in found if one["goodput_per_s"] is not None]
    left_out = [one for one in found if one["goodput_per_s"] is None]
    assert simulated[0] == found[0]
    assert left_out
    assert all(one["goodput_per_s"] <= one["bound_per_s"] for one in simulated)
    not_tried = [one for one in left_out if one["missed_per_s"] is None]
    assert all(one["bound_per_s"] < found[0]["goodput_per_s"] for one in not_tried)
    tried = [one for one in left_out if one["missed_per_s"] is not None]
    assert all(one["missed_per_s"] <= found[0]["goodput_per_s"] for one in tried)
    assert all(one["why"] for one in left_out)
    again = searched(capsys, file, "--limit", "24", "--best", "1", "--chunk", "512")
    assert again == found


def test_what_is_printed_as_the_best_is_a_file_that_compiles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path)
    assert main(["search", file, "--limit", "12", "--best", "1", "--tp", "1"]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("  instances ")]
    text = Path(file).read_text("utf-8")
    begin = text.index("  instances")
    end = text.index("\n", begin)
    module = language.lower(language.parse(text[:begin] + "\n".join(lines) + text[end:], "x.sage"))
    assert 1 <= len(topology_of(module).instances) <= 3


def search_of(tmp_path: Path, target: Target) -> Search:
    program = language.parse(FILE.replace("{promises}", ""), str(tmp_path / "box.sage"))
    requests = [Request(id=f"r{i}", prompt=(1,) * 500, max_output_tokens=9) for i in range(6)]
    return Search(program, requests, lambda: create("fifo"), target)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (Target(ttft_us=10, tpot_us=10**6), "a prompt of 500 tokens, longer than 90% are, takes"),
        (Target(ttft_us=10**6, tpot_us=1), "one decode alone takes"),
    ],
)
def test_a_promise_that_nobody_can_keep_is_told_without_a_simulation(
    target: Target, said: str, tmp_path: Path
) -> None:
    (verdict,) = search_of(tmp_path, target).verdicts([Layout(both=3)])
    assert (verdict.goodput_per_s, verdict.bound_per_s) == (None, 0.0)
    assert verdict.why.startswith(said)


@given(rate=st.floats(0.01, 1e4))
def test_requests_come_at_the_rate_that_is_asked(rate: float) -> None:
    asked = [
        Request(id=f"r{i}", prompt=(1,), max_output_tokens=1, arrival_us=7 * i * i)
        for i in range(20)
    ]
    load = Load.of(asked)
    at_rate = Load.of(load.at_rate(asked, rate))
    assert at_rate.span_us == pytest.approx(1e6 * 20 / rate, rel=1e-3, abs=2)


@given(rung=st.integers(-100, 300), share=st.floats(0, 1, exclude_max=True))
def test_a_rate_lies_on_its_rung_or_above_it(rung: int, share: float) -> None:
    low, high = rate_of(rung), rate_of(rung + 1)
    assert rung_of(low) == rung
    assert rung_of(max(low, low + share * (high - low) * (1 - 1e-12))) == rung


@given(low=st.integers(-50, 50), width=st.integers(1, 90), reached=st.integers(-60, 150))
def test_the_highest_that_succeeds_is_found_in_a_few_trials(
    low: int, width: int, reached: int
) -> None:
    high, asked = low + width, []

    def succeeds(rung: int) -> bool:
        asked.append(rung)
        return rung <= reached

    assert highest(succeeds, low, high) == min(max(reached, low), high - 1)
    assert all(low < rung < high for rung in asked)
    assert len(asked) == len(set(asked)) <= 2 * width.bit_length()


@st.composite
def spaces(draw: st.DrawFn) -> Search:
    """Three devices, some requests that may have a prefix in common, promises."""
    cache = draw(st.sampled_from(["", ' options "prefix_cache=on"']))
    text = FILE.replace("{promises}", "").replace(" max_batch 64", f" max_batch 64{cache}")
    common = tuple(range(draw(st.sampled_from([0, 960]))))
    lengths = draw(st.lists(st.sampled_from([700, 1500, 2500]), min_size=4, max_size=6))
    requests = [
        Request(
            id=f"r{i}",
            prompt=(*common, *[10**6 + i] * length),
            max_output_tokens=draw(st.sampled_from([1, 2, 6])),
        )
        for i, length in enumerate(lengths)
    ]
    target = Target(
        ttft_us=draw(st.sampled_from([450_000, 800_000])),
        tpot_us=draw(st.sampled_from([45_000, 90_000])),
        attained=draw(st.sampled_from([0.6, 0.9])),
    )
    return Search(language.parse(text, "box.sage"), requests, lambda: create("fifo"), target)


def check_pruned(search: Search, best: int) -> None:
    """What was left out, or given up after one trial, is not among the best of all."""
    candidates = list(layouts(3, (1,), (512,), heads=16, kv_heads=8))
    silent: Callable[[str], None] = [].append
    every = search.verdicts(candidates, len(candidates), silent)
    pruned = search.verdicts(candidates, best, silent)
    shown = [(one.layout, one.goodput_per_s) for one in every[:best]]
    assert [(one.layout, one.goodput_per_s) for one in pruned[:best]] == shown
    reached = {one.layout: one.goodput_per_s or 0.0 for one in every}
    for one in pruned:
        if one.goodput_per_s is None:
            assert one.why
            assert reached[one.layout] <= (shown[-1][1] or 0.0)


@settings(max_examples=2, deadline=None)
@given(search=spaces(), best=st.integers(1, 2))
def test_a_pruned_search_finds_what_a_search_of_everything_finds(search: Search, best: int) -> None:
    check_pruned(search, best)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(search=spaces(), best=st.integers(1, 2))
def test_many_pruned_searches_find_what_searches_of_everything_find(
    search: Search, best: int
) -> None:
    check_pruned(search, best)


@pytest.mark.parametrize("named", [True, False], ids=["hashes of a trace", "tokens alone"])
def test_a_prefix_cache_finds_nothing_of_a_workload_from_one_time_to_the_next(
    named: bool,
) -> None:
    """Two requests share their first 64 tokens: the second finds these each time, and no more."""
    asked = [
        Request(id=id, prompt=(*range(64), *[own] * 64), max_output_tokens=2)
        for id, own in (("a", 7), ("b", 8))
    ]
    if named:
        asked = [replace(one, block_hashes=block_hashes(one.prompt, 32)) for one in asked]
    found = repeated(asked, 6)
    cached = FILE.replace("{promises}", "").replace("max_batch 64", 'options "prefix_cache=on"')
    module = language.lower(
        language.parse(cached.replace("i0..i2 on g0..g2", "i0 on g0"), "x.sage")
    )
    apart = [replace(one, arrival_us=10**7 * i) for i, one in enumerate(found)]
    simulated = simulate(module, apart, create("fifo"), planner_of(module))
    reused = {report.request_id: report.reused_tokens for report in simulated.reports}
    assert reused == {"a": 0, "b": 64, "a~1": 0, "b~1": 64, "a~2": 0, "b~2": 64}


def test_layouts_that_nothing_connects_lose_and_end_no_search(tmp_path: Path) -> None:
    unlinked = FILE.replace("{promises}", "").replace("  switch nv\n", "")
    text = "".join(line for line in unlinked.splitlines(True) if not line.startswith("  link"))
    asked = [Request(id=f"r{i}", prompt=(1,) * 500, max_output_tokens=2) for i in range(4)]
    target = Target(10**6, 10**6)
    search = Search(language.parse(text, "box.sage"), asked, lambda: create("fifo"), target)
    together, apart = Layout(both=1), Layout(prefill=1, decode=1)
    first, second = search.verdicts([together, apart], 2, [].append)
    assert (first.layout, second.layout) == (together, apart)
    assert first.goodput_per_s
    assert second.goodput_per_s is None
    assert second.why.startswith('cannot serve: "r0": no path for its KV from @p0 to @d0')


def test_layouts_of_which_nobody_measured_the_ranks_lose_and_end_no_search(tmp_path: Path) -> None:
    shape = Shape(32, 4096, 16, 8, 256, 14336, 32000, "bf16")
    measured = dataclasses.replace(MADE, model=shape, device="a10")
    (tmp_path / "made.json").write_text(to_text(measured))
    text = FILE.replace("{promises}", "").replace("kind a10", 'kind a10 profile "made.json"')
    asked = [Request(id=f"r{i}", prompt=(1,) * 500, max_output_tokens=2) for i in range(4)]
    program = language.parse(text, str(tmp_path / "box.sage"))
    search = Search(program, asked, lambda: create("fifo"), Target(10**6, 10**6))
    first, second = search.verdicts([Layout(both=1, both_tp=2), Layout(both=3)], 1, [].append)
    assert first.layout == Layout(both=3)
    assert first.goodput_per_s
    assert (second.goodput_per_s, second.bound_per_s) == (None, 0.0)
    assert re.fullmatch(
        r"cannot be: instance @i0: \S*made\.json: measured at tp 1, not 2; measure that", second.why
    )


def test_a_layout_caches_prefixes_as_the_files_engine_does(tmp_path: Path) -> None:
    target = Target(10**6, 10**6)
    torch = FILE.replace("{promises}", "").replace("engine sim", "engine torch")
    off = torch.replace("max_batch 64", 'max_batch 64 options "prefix_cache=off program=off"')
    lines = []
    for text in (torch, off):
        program = language.parse(text, str(tmp_path / "box.sage"))
        asked = [Request(id="r", prompt=(1,), max_output_tokens=1)]
        lines.append(Search(program, asked, lambda: create("fifo"), target).text(Layout(both=1)))
    assert lines[0].endswith(
        'engine sim tp 1 block 32 budget 1024 max_batch 64 options "prefix_cache=on"'
    )
    assert lines[1].endswith('options "prefix_cache=off"')


def test_a_workload_that_is_repeated_goes_on_at_its_own_pace() -> None:
    asked = [
        Request(id=f"r{i}", prompt=(1,), max_output_tokens=1, arrival_us=100 * i) for i in range(5)
    ]
    found = repeated(asked, 12)
    assert [request.arrival_us for request in found] == [100 * i for i in range(15)]
    assert len({request.id for request in found}) == 15


@pytest.mark.parametrize(
    ("promises", "words", "said"),
    [
        ("", [], "the requests are not all promised one ttft; say --ttft-ms, or ttft at serve"),
        (
            PROMISES,
            ["--tp", "8"],
            "no layout: tp 8 on 3 devices, with 16 heads and 8 KV heads; what does: 1, 2",
        ),
        (
            PROMISES,
            ["--tp", "3"],
            "no layout: tp 3 on 3 devices, with 16 heads and 8 KV heads; what does: 1, 2",
        ),
    ],
)
def test_a_search_that_cannot_begin_says_why_in_one_line(
    promises: str, words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", written(tmp_path, promises), *words]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err


def test_a_request_that_does_not_say_how_much_it_generates_cannot_be_searched_for() -> None:
    with pytest.raises(SearchError, match="'r0' does not say how much it generates"):
        Load.of([Request(id="r0", prompt=(1,))])
