"""Measuring steps: which are measured, that nothing is left behind; and `sagec profile`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from sagec.cli import main
from sagec.cli.profiling import error_table
from sagec.compiler import Compiler
from sagec.passes.topology import topology_of
from sagec.runtime import profile
from sagec.runtime.engines import Engine, EngineError, InstanceSpec, StepReport, create
from sagec.runtime.engines.echo import Echo
from sagec.runtime.loop import Instance
from sagec.runtime.loop_timer import LoopTimes, measure
from sagec.runtime.profile import Point
from sagec.runtime.step_timer import Grid, StepTimer, _summary, _Taken
from sagec.simulation import simulated_spec
from tests.direct_planner import DirectPlanner

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "examples" / "models" / "tiny"

GRID = Grid(
    chunks=(1, 8, 32),
    prompts=(1, 2),
    pasts=(0, 16),
    batches=(1, 2, 4),
    contexts=(8, 40),
    mixed_chunks=(4, 16),
    repeats=2,
)


def engine(kv_blocks: int = 256, **options: str) -> Engine:
    return create(
        InstanceSpec(
            id="e",
            engine="echo",
            model="",
            kv_blocks=kv_blocks,
            block_tokens=8,
            options=options,
        )
    )


def steps(points: Sequence[Point], kind: str) -> set[tuple[int, int, int, int]]:
    """Prompts, their chunks, what they have before, and decodes."""
    return {
        (point.prompts, point.chunk_tokens, point.past_tokens, point.decodes)
        for point in points
        if point.kind == kind
    }


def test_every_point_of_the_grid_is_measured() -> None:
    points = StepTimer(engine(), "e", 256).points(GRID)
    assert steps(points, "prefill") == {
        (prompts, chunk, past, 0) for prompts in (1, 2) for chunk in (1, 8, 32) for past in (0, 16)
    }
    assert steps(points, "decode") == {(0, 0, 0, batch) for batch in (1, 2, 4)}
    assert steps(points, "mixed") == {(1, c, 0, batch) for batch in (1, 2, 4) for c in (4, 16)}
    assert len(points) == 12 + 2 * (3 + 6)
    assert all(point.us >= 1 and point.repeats >= 1 for point in points)


def test_decodes_are_measured_at_about_the_context_that_was_asked() -> None:
    points = StepTimer(engine(), "e", 256).points(GRID)
    contexts = {p.context_tokens for p in points if p.kind == "decode"}
    assert any(8 < context < 40 for context in contexts)
    assert any(40 < context < 40 + 3 * 3 * 6 for context in contexts)


def test_after_measuring_the_instance_holds_nothing() -> None:
    measured = engine()
    StepTimer(measured, "e", 256).points(GRID)
    assert measured.kv_blocks_used() == 0
    measured.check_integrity()


def test_of_a_steps_repeats_those_count_that_waited_least_for_a_processor() -> None:
    report = StepReport(instance="e", plan_id="p", step=0, begin_us=0, end_us=9)
    times = [(100.0, 0.0), (104.0, 0.0), (1.0, 900.0), (500.0, 40.0), (102.0, 3.0)]
    found = _summary(Point(1.0, decodes=1), [_Taken(report, *one) for one in times])
    assert (found.us, found.repeats) == (102.0, 3)
    steady = _summary(Point(1.0, decodes=1), [_Taken(report, us, 0.0) for us, _ in times])
    assert (steady.us, steady.repeats) == (102.0, 5)


def test_what_an_instance_has_no_room_for_is_not_measured() -> None:
    points = StepTimer(engine(kv_blocks=30), "e", 256, max_batch=2, max_step_tokens=16).points(GRID)
    assert points
    assert max(point.prompts * point.chunk_tokens + point.decodes for point in points) <= 16
    assert max(point.decodes for point in points) <= 2
    assert not [p for p in StepTimer(engine(kv_blocks=4), "e", 256).points(GRID) if p.decodes]


def test_an_instance_that_fails_is_an_error_with_its_name() -> None:
    with pytest.raises(EngineError, match=r"^instance 'other': .*'e'"):
        StepTimer(engine(), "other", 256).points(GRID)


# The loop between steps


def loop_times(one: Engine, count: int) -> LoopTimes:
    instance = Instance(id="e", role="both", engine="echo", capability=one.capability())
    return measure(one, instance, DirectPlanner(), 256, count)


def test_what_the_loop_takes_is_measured_and_nothing_is_left_behind() -> None:
    one = engine()
    found = loop_times(one, 12)
    assert found.turn_us > 0 and found.round_us >= 0
    assert isinstance(one, Echo)
    assert one.kv_blocks_used() == 0


def test_a_loop_that_cannot_serve_a_request_is_an_error_with_the_instances_name() -> None:
    with pytest.raises(EngineError, match=r"^instance 'e': rejected: 24 prompt tokens"):
        loop_times(engine(kv_blocks=2), 1)


# sagec profile


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What `sagec profile` wrote of the small model, in the folder of a file that names it."""
    folder = tmp_path_factory.mktemp("measured")
    path = folder / "here.json"
    assert main(["profile", str(TINY), "--quick", "--repeats", "1", "-o", str(path)]) == 0
    yield path


def test_the_torch_engine_is_measured_and_the_profile_can_be_read(measured: Path) -> None:
    found = profile.read(str(measured))
    config = json.loads((TINY / "config.json").read_text())
    assert found.model.hidden == config["hidden_size"]
    assert (found.engine, found.device, found.model.dtype) == ("torch", "cpu", "bf16")
    kinds = [point.kind for point in found.points]
    assert all(kinds.count(kind) >= profile.FEWEST_POINTS for kind in profile.KINDS)
    assert found.fit.prefill.one(256) > found.fit.prefill.one(1)
    assert found.turn_us > 0


def test_a_file_that_names_what_was_measured_costs_that(measured: Path) -> None:
    text = (
        f'model tiny from "{TINY}"\n'
        'cluster c { device d kind cpu profile "here.json"\n'
        "instance i on d engine torch kv_blocks 64 }\n"
        'serve on c { request "r" tokens 8 generate 4 }\n'
    )
    unit = Compiler().parse(text, str(measured.parent / "serve.sage"))
    (instance,) = topology_of(unit.module).instances
    found = profile.read(str(measured))
    assert instance.cost.fit == found.fit
    assert simulated_spec(instance, {}).options["round_us"] == repr(found.round_us)


def test_the_command_prints_how_far_off_its_fits_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "here.json"
    argv = ["profile", str(ROOT / "examples" / "chat.sage"), "--instance", "d0", "--quick"]
    assert main([*argv, "--repeats", "1", "-o", str(path)]) == 0
    out = capsys.readouterr().out
    for words in ("how far off", "prefill", "decode", "mixed", "of @d0 (torch)", 'profile "here'):
        assert words in out
    assert profile.read(str(path)).points


@pytest.mark.parametrize("suffix", ["sage", "mlir"])
def test_a_file_can_be_measured_whose_device_names_the_profile_to_write(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"new.{suffix}"
    sage = (
        f'model tiny from "{TINY}"\ncluster c {{ device d kind cpu profile "not-yet.json"\n'
        "instance i on d engine torch kv_blocks 64 }\n"
        'serve on c { request "r" tokens 8 generate 4 }'
    )
    if suffix == "mlir":
        module = Compiler().parse(sage, str(tmp_path / "new.sage"), profiles=False).module
        sage = str(module).replace('kind = "cpu"', 'kind = "cpu", profile = "not-yet.json"')
    file.write_text(sage)
    out = tmp_path / "not-yet.json"
    argv = ["profile", str(file), "--quick", "--repeats", "1", "-o", str(out)]
    assert main(argv) == 0, capsys.readouterr().err
    assert profile.read(str(out)).device == "cpu"


def test_where_points_are_too_few_to_keep_half_back_the_table_says_so() -> None:
    few = [
        *(Point(100.0 + n, prompts=1, chunk_tokens=n) for n in (1, 2, 3)),
        *(Point(90.0 + n, decodes=n, context_tokens=8) for n in (1, 2, 3)),
    ]
    console = Console(width=100, record=True, file=StringIO())
    console.print(error_table(few))
    rows = [line for line in console.export_text().splitlines() if "decode" in line]
    assert rows and rows[0].count(" - ") == 3


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["examples/models"], 1, "config.json: No such file or directory"),
        (["examples/chat.sage", "--instance", "d1"], 2, "no instance 'd1'; there are: d0, p0"),
        (["examples/chat.sage", "-o", "no/such/folder.json"], 1, "no such folder to write to"),
        (["examples/chat.sage", "--repeats", "0"], 2, "'0' is no whole number from 1 on"),
        (["{tmp}/sim.sage"], 1, "engine 'sim' cannot be measured; what can: torch, turbomind"),
        (["{tmp}/none.sage"], 1, "No such file or directory"),
        (["{tmp}/shape.sage"], 1, "instance @i: model @tiny has no weights to compute with; model"),
        (["{tmp}/small.sage"], 1, "a fit needs 3 at least"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    argv: list[str],
    code: int,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    for name, setting in (
        ("sim", "engine sim kv_blocks 64"),
        ("small", "engine torch kv_blocks 1"),
    ):
        (tmp_path / f"{name}.sage").write_text(
            f'model tiny from "{TINY}"\ncluster c {{ device d kind cpu; instance i on d {setting} '
            'block 4 }\nserve on c { request "r" tokens 2 generate 1 }\n'
        )
    shape = "layers 2 hidden 64 heads 4 kv_heads 2 ffn 128 vocab 1000"
    text = (tmp_path / "small.sage").read_text("utf-8")
    drawn = text.replace(f'model tiny from "{TINY}"', f"model tiny {{ {shape} }}")
    (tmp_path / "shape.sage").write_text(drawn.replace("kv_blocks 1 ", "kv_blocks 64 "), "utf-8")
    argv = [word.replace("{tmp}", str(tmp_path)) for word in argv]
    assert main(["profile", *argv]) == code
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err
