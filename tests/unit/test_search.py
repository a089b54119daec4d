"""`sagec search`: the best layout is found, the others lose for a reason that is told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagec import language
from sagec.cli import main
from sagec.passes.topology import Instance as Placed
from sagec.passes.topology import topology_of
from sagec.runtime.request import Request
from sagec.runtime.strategies import create
from sagec.search import Layout, Load, Search, SearchError, Target, layouts, repeated

FILE = """model m {
  layers 16 hidden 2048 heads 16 kv_heads 8 ffn 8192 vocab 32000 max_context 8192
}
cluster box {
  devices g0..g2 kind h100
  switch nv
  link g0..g2 to nv bandwidth 100GB/s latency 2us
  instances i0..i2 on g0..g2 engine sim block 32 budget 1024 max_batch 64
}
serve on box mode hybrid {promises} {
  request "ask" tokens 400 generate 60 samples 8
  request "read" tokens 3000 generate 20 samples 4
}
"""
PROMISES = "ttft 300ms tpot 20ms"


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
    file = written(tmp_path, "ttft 3s tpot 50ms")
    found = searched(capsys, file, "--limit", "24", "--best", "1", "--chunk", "512")
    simulated = [one for one in found if one["goodput_per_s"] is not None]
    left_out = [one for one in found if one["goodput_per_s"] is None]
    assert simulated[0] == found[0]
    assert left_out
    assert all(one["goodput_per_s"] <= one["bound_per_s"] for one in simulated)
    assert all(one["bound_per_s"] <= found[0]["goodput_per_s"] for one in left_out)
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
        (Target(ttft_us=10**6, tpot_us=1), "one decode alone takes longer than its promise"),
    ],
)
def test_a_promise_that_nobody_can_keep_is_told_without_a_simulation(
    target: Target, said: str, tmp_path: Path
) -> None:
    (verdict,) = search_of(tmp_path, target).verdicts([Layout(both=3)])
    assert (verdict.goodput_per_s, verdict.bound_per_s) == (None, 0.0)
    assert verdict.why.startswith(said)


def placed_of(instances: str, tmp_path: Path) -> tuple[Placed, ...]:
    """Instances of the file's model; devices: slow (a10), fast (h100)."""
    begin, end = FILE.index("cluster"), FILE.index("serve")
    devices = "device slow kind a10 device fast kind h100"
    text = f"{FILE[:begin]}cluster box {{ {devices} {instances} }} {FILE[end:]}"
    program = language.parse(text.replace("{promises}", ""), str(tmp_path / "box.sage"))
    return topology_of(language.lower(program)).instances


LATE = Target(ttft_us=10**9, tpot_us=10**9)


def test_a_slow_instance_beside_a_fast_one_does_not_rule_a_layout_out(tmp_path: Path) -> None:
    slow, fast = placed_of(
        "instance a on slow engine sim block 32 instance b on fast engine sim block 32", tmp_path
    )
    prompt = 3000
    alone_us = [float(one.cost.prefill_us(0, prompt)) for one in (slow, fast)]
    assert alone_us[0] > alone_us[1]
    target = Target(ttft_us=int(sum(alone_us) / 2), tpot_us=10**9)
    load = Load((prompt,) * 4, (9,) * 4, (0, 1, 2, 3))
    assert load.bound([slow, fast], target)[0] > 0
    rate, why = load.bound([slow], target)
    assert rate == 0.0
    assert why.endswith("ms alone on a")


def test_a_long_prompt_beyond_the_share_that_is_asked_for_rules_nothing_out(tmp_path: Path) -> None:
    (one,) = placed_of("instance a on fast engine sim block 32", tmp_path)
    target = Target(int(one.cost.prefill_us(0, 200)), tpot_us=10**9, attained=0.5)
    assert Load((100, 7000), (9, 9), (0, 1)).bound([one], target)[0] > 0


def test_the_bound_lets_decodes_hide_behind_prompts_and_counts_no_decode_of_a_first_token(
    tmp_path: Path,
) -> None:
    (one,) = placed_of("instance a on fast engine sim block 32", tmp_path)
    prefill_us = float(one.cost.prefill_us(0, 1000))
    rate, _ = Load((1000,) * 4, (1,) * 4, (0, 1, 2, 3)).bound(
        [one], dataclasses.replace(LATE, tpot_us=1)
    )
    assert rate == pytest.approx(1e6 / prefill_us / LATE.attained)
    rate, _ = Load((1000,) * 4, (41,) * 4, (0, 1, 2, 3)).bound([one], LATE)
    arithmetic_us = prefill_us + 40 * float(one.cost.prefill_us(1020, 1021))
    assert rate <= 1e6 / arithmetic_us / LATE.attained * (1 + 1e-9)
    contexts = np.arange(1, one.max_batch + 1) * 1020.0
    batches = contexts / 1020
    decodes_us = 40 * float(
        (one.cost.step_us(batches, contexts, contexts, batches) / batches).min()
    )
    assert rate >= 1e6 / (prefill_us + decodes_us) / LATE.attained


@given(rate=st.floats(0.01, 1e4))
def test_requests_come_at_the_rate_that_is_asked(rate: float) -> None:
    asked = [
        Request(id=f"r{i}", prompt=(1,), max_output_tokens=1, arrival_us=7 * i * i)
        for i in range(20)
    ]
    load = Load.of(asked)
    at_rate = Load.of(load.at_rate(asked, rate))
    assert at_rate.span_us == pytest.approx(1e6 * 20 / rate, rel=1e-3, abs=2)


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
