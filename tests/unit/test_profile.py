"""Profiles: files of measured steps, what they are refused for, and what a fit of them predicts."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagec.compiler import Compiler
from sagec.diagnostics import Diagnostic
from sagec.passes.errors import PassError
from sagec.passes.topology import topology_of
from sagec.runtime import profile
from sagec.runtime.cost import Curve, Fit
from sagec.runtime.profile import Point, Profile, ProfileError, Shape, fit_of, non_negative

ROOT = Path(__file__).parent.parent.parent
SHARED = ROOT.parent / "shared" / "profiles"

SHAPE = Shape(4, 256, 8, 2, 32, 688, 1024, "bf16")

LAW = Fit(
    prefill=Curve(900.0, (0.0, 64.0), (3.0, 11.0)),
    pair_us=0.02,
    decode=Curve(700.0, (0.0, 16.0), (12.0, 40.0)),
    context_us=0.3,
    shared_us=500.0,
)
"""What the made-up machine of these tests does."""

STEPS = (
    *(Point(1.0, prompts=p, chunk_tokens=2**n) for p in (1, 3) for n in range(2, 10)),
    *(Point(1.0, prompts=1, chunk_tokens=2**n, past_tokens=300) for n in range(2, 10)),
    *(Point(1.0, decodes=b, context_tokens=c) for b in (1, 2, 4, 8, 16, 32, 64) for c in (8, 500)),
    *(Point(1.0, 1, 64, 0, b, 100) for b in (1, 8, 32)),
)

MADE = Profile(
    engine="torch",
    device="cpu",
    model=SHAPE,
    points=tuple(dataclasses.replace(p, us=LAW.one(*p.step)) for p in STEPS),
    machine="made up",
)


def written(folder: Path, made: Profile = MADE, name: str = "made.json") -> Path:
    path = folder / name
    path.write_text(profile.to_text(made))
    return path


# Files


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert profile.read(str(written(tmp_path))) == MADE


def test_a_profile_that_changed_is_read_again(tmp_path: Path) -> None:
    first = profile.read(str(written(tmp_path)))
    changed = dataclasses.replace(MADE, machine="another one, with a longer name")
    assert profile.read(str(written(tmp_path, changed))) == changed != first


def changed(**fields: object) -> str:
    return json.dumps(json.loads(profile.to_text(MADE)) | fields)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON: "),
        ("[" * 100_000, "not JSON: "),
        ("[]", 'no profile: "format" is not "sagec-profile"; sagec profile writes them'),
        (changed(format="perf"), 'no profile: "format" is not "sagec-profile"'),
        (changed(version=2), "version 2; this sagec reads version 1"),
        (changed(version=None), "version None; this sagec reads version 1"),
        (changed(points=3), "points: a list of measured steps is wanted"),
        (changed(points=[]), None),
        (changed(points=[{"us": 1.0}]), "points[0]: a step that computes nothing"),
        (changed(points=[{"us": -1.0, "decodes": 1}]), "points[0]: us is -1.0, spread_us 0.0"),
        (changed(points=[{"decodes": 1}]), "points[0]: no us"),
        (
            changed(points=[{"us": 1.0, "prompts": 2, "decodes": 1}]),
            "points[0]: 2 prompts of 0 tokens; neither is 0, or both are",
        ),
        (changed(points=[{"us": 10**400, "decodes": 1}]), "points[0]: us is a longer number; 0 or"),
        (changed(points=[{"us": 1, "decodes": 10**15 + 1}]), "decodes is 1000000000000001; 0 or"),
        (changed(points=[{"us": 1, "decodes": 1.5}]), "decodes is 1.5; a whole number is wanted"),
        (changed(points=[{"us": 1, "decodes": True}]), "decodes is True; a whole number is wanted"),
        (changed(points=[{"us": 1, "decodes": -1}]), "points[0]: decodes is -1; 0 or more"),
        (changed(points=[{"us": "1", "decodes": 1}]), "us is '1'; a number is wanted"),
        (changed(points=[7]), "points[0]: an object is wanted, not 7"),
        (changed(model=None), "model: an object is wanted, not None"),
        (changed(model={"layer": 1}), "model: no field 'layer'; there are: layers, hidden"),
        (changed(engine=3), "profile: engine is 3; a text is wanted"),
        (changed(colour="red"), "profile: no field 'colour'; there are: engine, device"),
        (changed(tp=-1), "profile: tp is -1; 0 or more"),
        (changed(turn_us=-0.5), "profile: turn_us is -0.5; a number, 0 or more"),
        (changed(round_us=float("inf")), "profile: round_us is inf; a number, 0 or more"),
        (changed(round_us="2"), "profile: round_us is '2'; a number is wanted"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_in_a_line_with_its_name(
    tmp_path: Path, text: str, says: str | None
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    if says is None:  # a profile it is, of which no fit can be made
        with pytest.raises(ProfileError, match="0 of prefill steps; a fit needs 3 at least"):
            profile.read(str(path)).fit_for(SHAPE, 1, 1, "bad.json")
        return
    with pytest.raises(ProfileError) as refused:
        profile.read(str(path))
    assert str(refused.value).startswith(f"{path}: ")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_step_takes_longer_by_the_loops_turn_whatever_it_computes():
    turned = dataclasses.replace(MADE, turn_us=300.0, round_us=2000.0)
    assert profile.from_json(json.loads(profile.to_text(turned))) == turned
    for point in STEPS:
        assert turned.fit.one(*point.step) == pytest.approx(MADE.fit.one(*point.step) + 300.0)


def test_a_file_that_is_not_there_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"none\.json: No such file or directory$"):
        profile.read(str(tmp_path / "none.json"))


def test_the_fit_of_another_model_or_parallelism_is_not_given() -> None:
    assert MADE.fit_for(SHAPE, 1, 1, "here") == MADE.fit
    with pytest.raises(ProfileError, match=r"^here: measured at tp 1, not 2; measure that$"):
        MADE.fit_for(SHAPE, 2, 1, "here")
    with pytest.raises(ProfileError, match=r"^here: measured at pp 1, not 4; measure that$"):
        MADE.fit_for(SHAPE, 1, 4, "here")
    for field in dataclasses.fields(Shape):
        other = dataclasses.replace(SHAPE, **{field.name: "f32" if field.name == "dtype" else 7})
        with pytest.raises(ProfileError, match=f"of another model, whose {field.name} is "):
            MADE.fit_for(other, 1, 1, "here")


# Fits


def test_a_fit_predicts_the_steps_that_it_was_given() -> None:
    off = profile.errors(MADE.fit, MADE.points)
    assert np.median(off) < 0.005
    assert off.max() < 0.05  # at the bend, which is at no knot


@pytest.mark.parametrize("straight", [False, True])
def test_a_line_is_found_from_half_of_its_points(straight: bool) -> None:
    law = dataclasses.replace(LAW, prefill=Curve(900.0, (0.0,), (8.0,)))
    law = dataclasses.replace(law, decode=Curve(700.0, (0.0,), (25.0,)))
    given_, asked = profile.halved([dataclasses.replace(p, us=law.one(*p.step)) for p in STEPS])
    assert profile.errors(fit_of(given_, straight), asked).max() < 0.005


def test_what_steps_of_both_phases_share_is_found() -> None:
    assert MADE.fit.shared_us == pytest.approx(LAW.shared_us, abs=60)


def test_without_steps_of_both_phases_the_cheaper_ones_overhead_is_shared() -> None:
    fit = fit_of([point for point in MADE.points if point.kind != "mixed"])
    assert fit.shared_us == min(fit.prefill.begin_us, fit.decode.begin_us)


def test_decodes_bend_at_a_batch_of_95_in_distserves_form() -> None:
    decode = Curve(900.0, (0.0, 95.0), (1.0, 60.0))
    law = dataclasses.replace(LAW, decode=decode)
    steps = [Point(1.0, decodes=b, context_tokens=64) for b in (1, 20, 50, 90, 95, 120, 180, 250)]
    steps += [point for point in STEPS if point.kind == "prefill"]
    fit = fit_of([dataclasses.replace(p, us=law.one(*p.step)) for p in steps], straight=True)
    assert fit.decode.knots == (0.0, 95.0)
    assert fit.decode.slopes[0] < 3 < 50 < fit.decode.slopes[1]


measured = st.lists(
    st.builds(
        Point,
        us=st.floats(1, 1e7),
        prompts=st.integers(0, 4),
        chunk_tokens=st.integers(1, 4096),
        past_tokens=st.integers(0, 4096),
        decodes=st.integers(1, 256),
        context_tokens=st.integers(0, 4096),
    ),
    max_size=12,
)


@settings(max_examples=60)
@given(measured)
def test_no_fit_of_whatever_was_measured_ever_falls_or_is_below_zero(points: list[Point]) -> None:
    alone = [dataclasses.replace(p, decodes=0) for p in points if p.prompts]
    decodes = [dataclasses.replace(p, prompts=0) for p in points]
    given_ = [*MADE.points[:3], *alone, *MADE.points[24:27], *decodes, *points]
    fit = fit_of(given_)  # its curves refuse to fall, and to be below zero
    assert fit.pair_us >= 0 and fit.context_us >= 0
    assert 0 <= fit.shared_us <= min(fit.prefill.one(1), fit.decode.one(1))
    assert fit == fit_of(given_)


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(5, 12), st.integers(0, 10_000))
def test_non_negative_least_squares_cannot_be_bettered(
    unknowns: int, equations: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    columns, wanted = random.normal(size=(equations, unknowns)), random.normal(size=equations)
    found = np.array(non_negative(columns, wanted))
    assert (found >= 0).all()
    gradient = columns.T @ (wanted - columns @ found)
    assert (gradient < 1e-6).all()
    assert abs(gradient[found > 0]).max(initial=0.0) < 1e-6


def test_half_of_the_points_are_given_and_the_ends_are_among_them() -> None:
    given_, asked = profile.halved(MADE.points)
    assert sorted(map(str, given_ + asked)) == sorted(map(str, MADE.points))
    assert abs(len(given_) - len(asked)) <= 2 * len(profile.KINDS)
    for kind in profile.KINDS:
        tokens = [p.step for p in MADE.points if p.kind == kind]
        there = [p.step for p in given_ if p.kind == kind]
        assert min(tokens) in there and max(tokens) in there


# What others measured


def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as for a script that lies there
    spec = importlib.util.spec_from_file_location("benchmark_cost", ROOT / "benchmarks/cost.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/profiles is not here")
@pytest.mark.parametrize("source", ["aegaeon", "distserve"])
def test_a_fit_given_half_of_the_measured_gpu_steps_predicts_the_others(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = benchmark(monkeypatch)
    cases = list(getattr(module, source)())
    assert len(cases) >= 5
    for case in cases:
        for result in module.results(case):
            if result.form == "fit":
                assert result.median <= 0.10, result
                assert result.worst <= 0.25, result


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/profiles is not here")
def test_the_benchmark_of_costs_writes_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = benchmark(monkeypatch)
    module.main(["--out", str(tmp_path), "--profile", str(written(tmp_path))])
    found = json.loads((tmp_path / "cost.json").read_text())["results"]
    assert {one["form"] for one in found} == {"fit", "line", "roofline", "operators"}
    assert [one["steps"] for one in found if one["case"] == "made" and one["form"] == "fit"] == [
        "prefill",
        "decode",
        "mixed",
    ]
    assert "median off" in (tmp_path / "cost.md").read_text()
    assert "median" in capsys.readouterr().out


def test_the_benchmark_of_costs_says_in_one_line_that_there_is_no_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = benchmark(monkeypatch)
    with pytest.raises(SystemExit) as left:
        module.main(["--profile", str(tmp_path / "none.json")])
    assert left.value.code == 1
    err = capsys.readouterr().err
    assert err.endswith("none.json: No such file or directory\n") and err.count("\n") == 1


# In files


MODEL = (
    "model m { layers 4 hidden 256 heads 8 kv_heads 2 head_dim 32 ffn 688 vocab 1024 dtype bf16 }\n"
)


def sage(settings_: str = 'kind cpu profile "made.json"', instance: str = "on d") -> str:
    return (
        f"{MODEL}cluster c {{ devices d, e {settings_}\n"
        f"instance i {instance} engine sim kv_blocks 64 }}\n"
        'serve on c { request "r" tokens 8 generate 4 }\n'
    )


def test_an_instance_costs_what_the_profile_of_its_device_says(tmp_path: Path) -> None:
    written(tmp_path)
    unit = Compiler().parse(sage(), str(tmp_path / "serve.sage"))
    (instance,) = topology_of(unit.module).instances
    assert instance.cost.fit == MADE.fit
    assert float(instance.cost.step_us(4, 400, 400, 4)) == MADE.fit.one(4, 400, 400, 4)


def test_a_profile_is_named_from_where_the_sage_file_is(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    written(tmp_path)
    text = sage('kind cpu profile "../made.json"')
    unit = Compiler().parse(text, str(tmp_path / "below" / "serve.sage"))
    (instance,) = topology_of(unit.module).instances
    assert instance.cost.fit == MADE.fit


def test_a_profile_that_is_missing_is_an_error_at_its_name(tmp_path: Path) -> None:
    with pytest.raises(Diagnostic) as refused:
        Compiler().parse(sage(), str(tmp_path / "serve.sage"))
    assert "made.json: No such file or directory" in refused.value.message
    assert "sagec profile" in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("instance", "made", "says"),
    [
        ("on d dtype f32", MADE, "of another model, whose dtype is bf16, not f32"),
        ("on d, e tp 2", MADE, "measured at tp 1, not 2"),
        ("on d, e pp 2", MADE, "measured at pp 1, not 2"),
        (
            "on d",
            dataclasses.replace(MADE, device="h100"),
            "measured on a device of kind h100, not cpu; measure on this one: sagec profile",
        ),
        (
            "on d",
            dataclasses.replace(MADE, points=MADE.points[:2]),
            "points: 2 of prefill steps; a fit needs 3 at least",
        ),
    ],
)
def test_a_profile_of_another_instance_is_an_error_at_the_instance(
    tmp_path: Path, instance: str, made: Profile, says: str
) -> None:
    written(tmp_path, made)
    unit = Compiler().parse(sage(instance=instance), str(tmp_path / "serve.sage"))
    with pytest.raises(PassError) as refused:
        topology_of(unit.module)
    assert "instance @i: " in str(refused.value)
    assert f"made.json: {says}" in str(refused.value)


def test_a_device_that_says_no_kind_takes_a_profile_of_any(tmp_path: Path) -> None:
    written(tmp_path, dataclasses.replace(MADE, device="h100"))
    unit = Compiler().parse(sage('profile "made.json"'), str(tmp_path / "serve.sage"))
    (instance,) = topology_of(unit.module).instances
    assert (instance.cost.fit, instance.devices[0].kind) == (MADE.fit, "cpu")


def test_the_devices_of_an_instance_need_one_profile_for_all(tmp_path: Path) -> None:
    written(tmp_path)
    text = sage('kind cpu profile "made.json"', "on d, f tp 2").replace(
        "instance i", "device f kind cpu instance i"
    )
    unit = Compiler().parse(text, str(tmp_path / "serve.sage"))
    with pytest.raises(PassError, match="of its devices; all need the same one"):
        topology_of(unit.module)


def test_an_unknown_kind_of_device_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(Diagnostic) as refused:
        Compiler().parse(sage("kind a1000"), str(tmp_path / "serve.sage"))
    line = refused.value.line()
    assert "no device kind 'a1000'" in line
    for kind in ("a100", "a10g", "h100", "h200", "l4", "cpu"):
        assert kind in line
