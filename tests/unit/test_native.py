"""The native core: to the byte what the loop, the planner and the engines in Python say."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from sagec.cli import main
from sagec.cli.simulating import report
from sagec.compiler import Compiler
from sagec.language.traces import Recorded, read_trace
from sagec.passes.errors import PassError
from sagec.planner import DirectFirstPlanner, planner_of
from sagec.runtime import native
from sagec.runtime.compiled import Unbuilt
from sagec.runtime.cost import Curve, Fit
from sagec.runtime.engines.sim.outages import Outage
from sagec.runtime.native.library import Run
from sagec.runtime.profile import Point, Profile, Shape, to_text
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.strategies import create
from sagec.simulation import Simulated, simulate

ROOT = Path(__file__).parent.parent.parent
TRACES = ROOT.parent / "shared" / "traces"

MODEL = "model m { layers 4 hidden 512 heads 8 kv_heads 4 ffn 1024 vocab 1000 }\n"
PLENTY = """cluster c {
  device g0 kind h100
  instance i0 role both on g0 engine sim kv_blocks 200 block 16 budget 256
}
serve on c mode hybrid chunk 128 { request "any" tokens 1 generate 1 }
"""
SCARCE = PLENTY.replace("kv_blocks 200", "kv_blocks 24")


@pytest.fixture(scope="module", autouse=True)
def core() -> Iterator[None]:
    """The library is built once, and before examples are counted; without a compiler there is
    nothing to test."""
    if native.recipe().compiler() is None:
        pytest.skip("no C++ compiler")
    native.load()
    yield


def served(
    cluster: str, requests: Sequence[Request], core: str, strategy: str = "fifo"
) -> tuple[Simulated, DirectFirstPlanner]:
    module = Compiler().parse(MODEL + cluster, "serve.sage").module
    planner = planner_of(module)
    assert isinstance(planner, DirectFirstPlanner)
    return simulate(module, requests, create(strategy), planner, core=core), planner


def alike(cluster: str, requests: Sequence[Request]) -> Simulated:
    """The run of both cores, which say the same."""
    ours, _ = served(cluster, requests, "native")
    theirs, _ = served(cluster, requests, "python")
    assert (ours.core, theirs.core) == ("native", "python")
    assert ours.ended == theirs.ended
    for series in ("instances", "moves", "rounds_us", "waiting", "running"):
        assert getattr(ours.meter, series) == getattr(theirs.meter, series)
    assert json.dumps(report(ours)) == json.dumps(report(theirs))
    return ours


def refusal(cluster: str, requests: Sequence[Request], core: str) -> str:
    """What the compiler says of a round that it does not plan; "" where it plans all."""
    try:
        served(cluster, requests, core)
    except PassError as error:
        return str(error)
    return ""


def asked(number: int, prompt: int | Sequence[int] = 100, **more: object) -> Request:
    tokens = range(prompt) if isinstance(prompt, int) else prompt  # a tuple would cost memory
    said = {"id": f"r{number}", "prompt": tokens, "max_output_tokens": 8, **more}
    return Request(**said)  # type: ignore[arg-type]


# Clusters and workloads


@st.composite
def clusters(draw: st.DrawFn) -> str:
    """Of both roles or apart, with room for a few requests or many, and links that contend."""
    block = draw(st.sampled_from((4, 16)))
    engine = draw(st.sampled_from(("sim", "torch", 'sim options "prefix_cache=on"')))
    words = f"engine {engine} kv_blocks {draw(st.integers(6, 60))} block {block}"
    words += f" max_batch {draw(st.sampled_from((2, 64)))} budget"
    prefills, decodes = draw(st.integers(0, 2)), draw(st.integers(1, 3))
    budgets = st.sampled_from((16, 64, 512))
    lines = [
        f"devices g0..g{prefills + decodes - 1} kind {draw(st.sampled_from(('a100', 'h100')))}"
    ]
    if prefills:
        bandwidth = draw(st.sampled_from(("1GB/s", "100GB/s")))
        here, there = _names("g", 0, prefills), _names("g", prefills, decodes)
        lines += [
            f"links {here} to {there} bandwidth {bandwidth} latency {draw(st.integers(0, 9))}us",
            f"instances {_names('p', 0, prefills)} role prefill on {here} {words} {draw(budgets)}",
            f"instances {_names('d', 0, decodes)} role decode on {there} {words} {draw(budgets)}",
        ]
    else:
        here = _names("g", 0, decodes)
        lines += [
            f"instances {_names('i', 0, decodes)} role both on {here} {words} {draw(budgets)}"
        ]
    mode = draw(
        st.sampled_from(
            ("strict", "time-share", "hybrid") if prefills else ("time-share", "hybrid")
        )
    )
    chunk = draw(st.sampled_from(("", " chunk 8", " chunk 64")))
    horizon = draw(st.sampled_from((1, 3, 16, 64)))
    how = f'mode {mode}{chunk} horizon {horizon} {{ request "any" tokens 1 generate 1 }}'
    return "cluster c {\n" + "\n".join(lines) + f"\n}}\nserve on c {how}\n"


def _names(letter: str, begin: int, count: int) -> str:
    return ", ".join(f"{letter}{begin + at}" for at in range(count))


@st.composite
def workloads(draw: st.DrawFn) -> list[Request]:
    """Prompts that share prefixes, some longer than anybody holds; many come at once."""
    shuffled = random.Random(draw(st.integers(0, 2**16)))
    requests = []
    for number in range(draw(st.integers(1, 18))):
        shared = shuffled.choice((0, 0, 16, 40, 64))
        own = shuffled.choice((0, 3, 20, 90, 400))
        prompt = (*range(shared), *(1000 * number + i for i in range(own)))
        outputs = shuffled.choice((0, 1, 5, 40, 120, None))
        requests.append(
            asked(
                number,
                prompt,
                max_output_tokens=outputs,
                arrival_us=shuffled.choice((0, 0, 50, 700, 9_000, 40_000)),
                ttft_us=shuffled.choice((None, 2_000)),
                model=shuffled.choice(("", "m")),
                tenant=shuffled.choice(("", "t")),
            )
        )
    return requests


def compare(cluster: str, requests: list[Request]) -> None:
    """Both cores say the same, also where the compiler refuses a round."""
    try:
        reports = alike(cluster, requests).reports
    except PassError:
        event("refused")
        said = refusal(cluster, requests, "native")
        assert said == refusal(cluster, requests, "python") != ""
        return
    event(f"preempted: {any(one.preemptions for one in reports)}")
    event(f"reused: {any(one.reused_tokens for one in reports)}")


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(cluster=clusters(), requests=workloads())
def test_both_cores_say_the_same_of_any_run(cluster: str, requests: list[Request]) -> None:
    compare(cluster, requests)


@pytest.mark.slow
@settings(max_examples=600, suppress_health_check=[HealthCheck.too_slow])
@given(cluster=clusters(), requests=workloads())
def test_both_cores_say_the_same_of_very_many_runs(cluster: str, requests: list[Request]) -> None:
    compare(cluster, requests)


STEPS = (
    *(Point(1.0, prompts=1, chunk_tokens=tokens) for tokens in (4, 16, 64, 128, 256)),
    *(Point(1.0, decodes=batch, context_tokens=80) for batch in (1, 4, 16, 64)),
    *(Point(1.0, 1, tokens, 0, batch, 80) for tokens in (8, 128) for batch in (2, 32)),
)


@pytest.mark.parametrize("slopes", [(3.0, 200.0), (60.0, 3.0)], ids=["steeper", "flatter"])
def test_both_cores_count_with_a_profile_to_the_same_bit(
    slopes: tuple[float, float], tmp_path: Path
) -> None:
    """Steps of both phases too, which save what the curve of prompts says, or no more than most."""
    decode = Curve(700.0, (0.0, 16.0), (12.0, 40.0))
    law = Fit(Curve(900.0, (0.0, 64.0), slopes), 0.02, decode, 0.3, 700.0)
    points = tuple(replace(step, us=law.one(*step.step)) for step in STEPS)
    model = Shape(4, 512, 8, 4, 64, 1024, 1000, "bf16")
    path = tmp_path / "made.json"
    path.write_text(to_text(Profile("sim", "h100", model, points, turn_us=30.0, round_us=200.0)))
    cluster = PLENTY.replace("kind h100", f'kind h100 profile "{path}"')
    requests = [
        asked(n, 40 + 40 * (n % 4), max_output_tokens=30, arrival_us=300 * n) for n in range(48)
    ]
    reports = alike(cluster, requests).reports
    assert {one.reason for one in reports} == {FinishReason.LENGTH}


def recorded(trace: str, limit: int, rate: float, blocks: bool) -> list[Request]:
    path = TRACES / trace
    if not path.is_file():
        pytest.skip(f"no {path}")
    rows: list[Recorded] = read_trace(path, limit)
    return [
        asked(
            number,
            range(row.prompt_tokens),
            max_output_tokens=row.output_tokens,
            arrival_us=round(row.arrival_us / rate),
            block_hashes=row.blocks[: row.prompt_tokens // 512] if blocks else (),
        )
        for number, row in enumerate(rows)
    ]


BIG = "model m { layers 32 hidden 4096 heads 32 kv_heads 8 head_dim 128 ffn 14336 vocab 128256 }\n"
TOGETHER = """cluster c {
  devices g0..g1 kind a100
  instances i0..i1 role both on g0..g1 engine sim kv_blocks 4000 block 16 budget 2048
}
serve on c mode hybrid chunk 512 horizon 64 { request "any" tokens 1 generate 1 }
"""
APART = """cluster c {
  devices g0..g3 kind h100
  links g0..g1 to g2..g3 bandwidth 50GB/s latency 10us
  instances p0..p1 role prefill on g0..g1 engine sim kv_blocks 600 block 512
    options "prefix_cache=on"
  instances d0..d1 role decode on g2..g3 engine sim kv_blocks 600 block 512
    options "prefix_cache=on"
}
serve on c mode strict chunk 4096 horizon 64 { request "any" tokens 1 generate 1 }
"""
AZURE, MOONCAKE = "azure/AzureLLMInferenceTrace_conv.csv", "mooncake/synthetic_trace.jsonl"
REPLAYS = {"azure": (AZURE, TOGETHER, 8.0), "mooncake": (MOONCAKE, APART, 3.0)}


def replayed(trace: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.MODEL", BIG)
    path, cluster, rate = REPLAYS[trace]
    requests = recorded(path, limit, rate, blocks=trace == "mooncake")
    assert len(alike(cluster, requests).ended) == len(requests)


@pytest.mark.parametrize("trace", REPLAYS)
def test_both_cores_say_the_same_of_a_recorded_day(
    trace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed(trace, 100, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("trace", REPLAYS)
def test_both_cores_say_the_same_of_thousands_of_requests(
    trace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed(trace, 4_000, monkeypatch)


# Ends that are none of the usual


def test_requests_that_cannot_be_served_are_told_the_same_reasons() -> None:
    requests = [
        asked(0, ()),
        asked(1, max_output_tokens=0),
        asked(2, model="another"),
        asked(3, 9000),
        asked(4, 3190, max_output_tokens=11),
        asked(5, 3200, max_output_tokens=None),
        asked(6),
    ]
    ended = {one.request_id: one for one in alike(PLENTY, requests).ended}
    assert [ended[f"r{number}"].reason for number in range(7)] == [
        *[FinishReason.REJECTED] * 6,
        FinishReason.LENGTH,
    ]
    assert "no model 'another'" in ended["r2"].detail
    assert "the largest holds 3200 tokens" in ended["r4"].detail


CROWDED = """cluster c {
  devices g0..g3 kind h100
  links g0..g1 to g2..g3 bandwidth 1GB/s latency 0us
  instances p0..p1 role prefill on g0..g1 engine sim kv_blocks 59 block 4
  instances d0..d1 role decode on g2..g3 engine sim kv_blocks 59 block 4
}
serve on c horizon 1 { request "any" tokens 1 generate 1 }
"""


def test_kv_that_finds_no_room_waits_for_what_comes_next() -> None:
    requests = [
        asked(0, 20, max_output_tokens=None, arrival_us=9_000),
        asked(1, 90, max_output_tokens=None),
        asked(2, 20, max_output_tokens=120, arrival_us=9_000),
        asked(3, 90, max_output_tokens=5, arrival_us=9_000),
    ]
    ended = alike(CROWDED, requests).ended
    assert {one.reason for one in ended} == {FinishReason.LENGTH} and len(ended) == 4


BACK_AND_FORTH = """cluster c {
  devices g0..g3 kind h100
  links g0..g1 to g2..g3 bandwidth 100GB/s latency 0us
  instances p0..p1 role prefill on g0..g1 engine sim kv_blocks 46 block 16 max_batch 2 budget 16
  instances d0..d1 role decode on g2..g3 engine sim kv_blocks 46 block 16 max_batch 2
}
serve on c horizon 64 { request "any" tokens 1 generate 1 }
"""


def test_kv_is_awaited_where_its_request_has_been_before() -> None:
    told = [
        (20, None, 40_000),
        (20, 40, 40_000),
        (20, 120, 9_000),
        (67, None, 9_000),
        (60, None, 9_000),
        (106, 40, 40_000),
        (20, None, 0),
    ]
    requests = [
        asked(number, prompt, max_output_tokens=output, arrival_us=arrival_us)
        for number, (prompt, output, arrival_us) in enumerate(told)
    ]
    ended = alike(BACK_AND_FORTH, requests).ended
    assert any(one.report.preemptions for one in ended)
    assert {one.reason for one in ended} == {FinishReason.LENGTH} and len(ended) == 7


RESHARDED = """cluster c {
  devices g0..g2 kind h100
  links g0 to g1..g2 bandwidth 1GB/s latency 5us
  instance p0 role prefill on g0 engine sim kv_blocks 40 block 16 budget 64
  instance d0 role decode on g1..g2 engine sim kv_blocks 40 block 16 tp 2
}
serve on c mode strict chunk 32 horizon 8 { request "any" tokens 1 generate 1 }
"""


def test_rounds_that_only_the_compiler_plans_are_planned_there_and_the_run_goes_on() -> None:
    requests = [asked(n, 60, arrival_us=400 * n) for n in range(6)]
    _, planner = served(RESHARDED, requests, "native")
    assert planner.fallbacks.total() > 0
    assert len(alike(RESHARDED, requests).meter.moves) == 6


def test_who_came_last_leaves_where_kv_runs_out_on_both_cores() -> None:
    requests = [asked(n, 60, max_output_tokens=200, arrival_us=n) for n in range(6)]
    reports = {one.request_id: one for one in alike(SCARCE, requests).reports}
    assert reports["r0"].preemptions == 0 < reports["r5"].preemptions


NARROW = """cluster c {
  device g0 kind h100
  instance i0 role both on g0 engine sim kv_blocks 23 block 4 max_batch 2 budget 16
}
serve on c mode time-share horizon 3 { request "any" tokens 1 generate 1 }
"""


def test_who_says_no_limit_and_nearly_fills_its_instance_is_served_to_its_end() -> None:
    requests = [asked(n, tokens, max_output_tokens=None) for n, tokens in enumerate((90, 91, 5))]
    reports = alike(NARROW, requests).reports
    assert {one.request_id: one.output_tokens for one in reports} == {"r0": 2, "r1": 1, "r2": 87}


def test_a_horizon_without_an_end_is_left_to_python() -> None:
    endless = NARROW.replace("horizon 3", f"horizon {2**31 - 2}")
    with pytest.raises(native.NotCovered, match="a horizon of more than 65536 steps"):
        served(endless, [asked(0, 5)], "native")
    run, _ = served(endless, [asked(0, 5, max_output_tokens=None)], "auto")
    assert run.core == "python"
    assert [one.output_tokens for one in run.reports] == [87]


CACHED = SCARCE.replace("engine sim", 'engine sim options "prefix_cache=on"')


@pytest.mark.parametrize("hashes", ["computed", "given", "mixed", "too few"])
def test_prompts_that_start_over_find_in_caches_what_they_find_in_python(hashes: str) -> None:
    requests = []
    for number in range(8):
        is_given = hashes in ("given", "too few") or (hashes == "mixed" and number % 2)
        blocks = tuple(range(2 if hashes == "too few" else 4)) if is_given else ()
        more = {"max_output_tokens": 150, "arrival_us": 20_000 * (number // 4)}
        requests.append(asked(number, 64 + number % 2, block_hashes=blocks, **more))
    reports = alike(CACHED, requests).reports
    assert any(one.preemptions for one in reports)
    assert any(one.reused_tokens for one in reports)


def test_what_the_compiler_refuses_comes_through_the_library() -> None:
    strict = PLENTY.replace("hybrid", "strict")
    said = refusal(strict, [asked(0)], "native")
    assert "instance @i0 has role both, and graph @round_0 is strict" in said
    assert said == refusal(strict, [asked(0)], "python")


def test_a_run_that_goes_wrong_is_not_taken_for_one_that_is_not_covered() -> None:
    with Run({}) as run, pytest.raises(native.CoreError):
        run.serve()


# What is left to Python


UNUSUAL = {
    "timeouts": [asked(0), asked(1, timeout_us=1_000)],
    "adapters": [asked(0, adapter="a")],
    "requests of the same id": [asked(0), asked(0, arrival_us=9_000_000)],
    "an output of 2^31 tokens or more": [asked(0, max_output_tokens=2**31)],
    "block hashes of more than 64 bits": [asked(0, block_hashes=(2**70,) * 6)],
    "block hashes of which one stands behind several others": [
        asked(0, block_hashes=(1, 2, 3, 4, 5, 6)),
        asked(1, block_hashes=(6, 5, 4, 3, 2, 1)),
    ],
}


@pytest.mark.parametrize("why", UNUSUAL)
def test_what_is_not_covered_is_refused_or_left_to_python(why: str) -> None:
    cluster = PLENTY.replace("engine sim", 'engine sim options "prefix_cache=on"')
    with pytest.raises(native.NotCovered, match=re.escape(why)):
        served(cluster, UNUSUAL[why], "native")
    ours, _ = served(cluster, UNUSUAL[why], "auto")
    theirs, _ = served(cluster, UNUSUAL[why], "python")
    assert ours.core == "python"
    assert json.dumps(report(ours)) == json.dumps(report(theirs))


TWO_MODELS = """model n { layers 2 hidden 512 heads 8 kv_heads 4 ffn 1024 vocab 1000 }
cluster c {
  devices g0..g1 kind h100
  instance i0 role both on g0 engine sim model m kv_blocks 200 block 16
  instance i1 role both on g1 engine sim model n kv_blocks 200 block 16
}
serve on c { request "any" model m tokens 1 generate 1 }
"""
ELSEWHERE = {
    "several models": TWO_MODELS,
    "eviction 'lfu'; lru is": PLENTY.replace(
        "engine sim", 'engine sim options "prefix_cache=on eviction=lfu"'
    ),
    "plans after the rules of engine 'turbomind'": PLENTY.replace("sim", "turbomind"),
}


@pytest.mark.parametrize("why", ELSEWHERE)
def test_clusters_that_are_not_covered_are_refused(why: str) -> None:
    with pytest.raises(native.NotCovered, match=re.escape(why)):
        served(ELSEWHERE[why], [asked(0, model="m")], "native")


def test_other_strategies_and_instances_that_fail_are_left_to_python() -> None:
    with pytest.raises(native.NotCovered, match="strategy 'slo-aware'; fifo is"):
        served(PLENTY, [asked(0)], "native", "slo-aware")
    assert served(PLENTY, [asked(0)], "auto", "slo-aware")[0].core == "python"
    module = Compiler().parse(MODEL + PLENTY, "serve.sage").module
    outages = [Outage(instance="i0", fail_at_us=10, back_at_us=900)]
    arguments = (module, [asked(0)], create("fifo"), planner_of(module), outages)
    with pytest.raises(native.NotCovered, match="instances that fail"):
        simulate(*arguments, core="native")
    assert simulate(*arguments).core == "python"


def test_a_core_that_there_is_not_is_told_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="no core 'fast'; there are: auto, python, native"):
        served(PLENTY, [asked(0)], "fast")


@pytest.mark.usefixtures("no_compiler")
def test_what_is_not_covered_does_not_ask_for_a_compiler() -> None:
    requests = [asked(number, max_output_tokens=1) for number in range(1000)]
    with pytest.raises(native.NotCovered):
        served(PLENTY, requests, "native", "priority")


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_python_simulates() -> None:
    requests = [asked(number, arrival_us=number) for number in range(1001)]
    with pytest.raises(Unbuilt, match=r"no C\+\+ compiler"):
        served(PLENTY, requests, "native")
    assert served(PLENTY, requests[:9], "auto")[0].core == "python"


def test_a_few_requests_do_not_wait_for_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGEC_CACHE", str(tmp_path))
    assert served(PLENTY, [asked(0)], "auto")[0].core == "python"
    assert list(tmp_path.iterdir()) == []


# The command line


def written(folder: Path, cluster: str = PLENTY) -> str:
    file = folder / "serve.sage"
    body = '{ request "a" tokens 300 generate 40 samples 6 arrives 1ms }'
    file.write_text(MODEL + cluster.replace('{ request "any" tokens 1 generate 1 }', body), "utf-8")
    return str(file)


def test_the_report_is_the_same_whichever_core_ran_and_the_sentence_says_which(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path)
    texts = []
    for core in ("native", "python"):
        assert main(["simulate", file, "--json", "--core", core]) == 0
        texts.append(capsys.readouterr().out)
        assert main(["simulate", file, "--core", core]) == 0
        assert f"({core} core)" in capsys.readouterr().out
    assert texts[0] == texts[1]


def test_the_command_line_says_what_the_native_core_does_not_cover(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", written(tmp_path), "--core", "native", "--strategy", "hybrid"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "--core native: not covered: strategy 'hybrid'" in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("no_compiler")
def test_the_command_line_says_that_there_is_no_compiler(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", written(tmp_path), "--core", "native"]) == 2
    assert "--core native: no C++ compiler" in capsys.readouterr().err
