"""What `sagec profile` does: an engine for the instance, its steps timed, and a table of errors."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from xdsl.dialects.builtin import ModuleOp, StringAttr

from sagec.cli import writing
from sagec.cli.failure import InputError, UsageError, unknown
from sagec.dialects import pd
from sagec.dialects.cluster import InstanceOp
from sagec.passes.topology import Instance as Placed
from sagec.passes.topology import topology_of
from sagec.runtime import engines, profile
from sagec.runtime.cost import Fit
from sagec.runtime.engines import Engine, InstanceSpec
from sagec.runtime.loop_timer import LoopTimes, measure
from sagec.runtime.profile import Point, Profile
from sagec.runtime.step_timer import Grid, StepTimer

if TYPE_CHECKING:
    from rich.table import Table

MEASURABLE = ("torch", "turbomind")
"""Engines whose steps take the time of computing."""

TAKES_TURNS = ("torch",)
"""Those that compute a step while they are asked what happened, so that the loop waits for them,
and they for the loop."""

CHECKPOINT = """
model checkpoint from "."
cluster here {
  device here kind cpu
  instance measured on here engine torch kv_blocks 1024 block 16 budget 1024 max_batch 64
}
serve on here { request "none" tokens 1 generate 1 }
"""
"""The file that is measured where only a checkpoint is given."""


def run(args: argparse.Namespace) -> int:
    """Measure and write. Raises what failure.py knows."""
    writing.check_writable(args.output)
    module, placed = _instance(args)
    grid = Grid.quick() if args.quick else Grid()
    if args.repeats:
        grid = replace(grid, repeats=args.repeats)
    measured = _measured(module, placed, grid)
    writing.write_text(args.output, profile.to_text(measured))
    if args.output in (None, "-"):
        return 0
    writing.console(width=100).print(error_table(measured.points))
    print(f"{len(measured.points)} steps of @{placed.name} ({placed.engine}) in {args.output}")
    print(f'to use it: device ... kind {measured.device} profile "{Path(args.output).name}"')
    return 0


def _instance(args: argparse.Namespace) -> tuple[ModuleOp, Placed]:
    """The file, and its instance to measure. Raises InputError, UsageError where there is none."""
    from sagec.compiler import Compiler
    from sagec.runtime.engines.torch.config import read_config

    compiler = Compiler()
    if Path(args.file).is_dir():
        read_config(Path(args.file))
        unit = compiler.parse(CHECKPOINT, str(Path(args.file, "checkpoint.sage")))
    else:
        unit = compiler.read(args.file, profiles=False)  # this may be the one to measure
    placed = topology_of(unit.module).by_name
    if args.instance is not None and args.instance not in placed:
        raise UsageError(unknown("instance", args.instance, list(placed)))
    if not placed:
        raise InputError(f"{unit.name}: no instance to measure; say where in a cluster")
    found = placed[args.instance or next(iter(placed))]
    if found.engine not in MEASURABLE:
        raise InputError(
            f"instance @{found.name}: engine {found.engine!r} cannot be measured; what can: "
            f"{', '.join(MEASURABLE)}"
        )
    if found.engine == "torch" and not found.model.path:
        model = found.model.name
        raise InputError(f"instance @{found.name}: model @{model} has no weights to compute with; "
                         f'model {model} from "FOLDER" says where they are')  # fmt: skip
    return unit.module, found


def _measured(module: ModuleOp, placed: Placed, grid: Grid) -> Profile:
    from sagec.cli.serving import spec_of

    spec: InstanceSpec = spec_of(placed, one_process=True)
    engine = engines.create(spec)
    try:
        timer = StepTimer(
            engine, placed.name, placed.model.vocab, placed.max_batch, placed.max_step_tokens
        )
        with writing.working(f"measuring @{placed.name} ({placed.engine})"):
            measured = Profile(
                engine=placed.engine,
                device=placed.devices[0].kind,
                model=placed.model.shape_in(placed.dtype),
                points=timer.points(grid),
                tp=placed.tp,
                pp=placed.pp,
                machine=_machine(),
            )
            measured.fit  # noqa: B018  raises where the instance has room for too few steps
            if placed.engine not in TAKES_TURNS:
                return measured
            return replace(measured, **asdict(_loop_times(module, placed, engine)))
    finally:
        engine.close()


def _loop_times(module: ModuleOp, placed: Placed, engine: Engine) -> LoopTimes:
    """What a loop takes beside the steps of the engine, which serves both phases alone."""
    from sagec.planner import member_of, planner_of

    others = {one.name for one in topology_of(module).instances} - {placed.name}
    parts = [op for op in module.ops if not isinstance(op, pd.GraphOp)]
    kept = [op.clone() for op in parts if not (isinstance(op, InstanceOp) and op.symbol in others)]
    for op in kept:
        if isinstance(op, InstanceOp):
            op.properties["role"] = StringAttr("both")
    alone = ModuleOp(kept)
    (member,) = topology_of(alone).instances
    return measure(engine, member_of(member, engine), planner_of(alone), placed.model.vocab)


def _machine() -> str:
    """The processor, in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def error_table(points: Sequence[Point]) -> Table:
    """How far off a fit is: of the points that it was given, and of those that it was not."""
    from rich.table import Table

    table = Table(
        title="how far off: a fit of all; a fit of half, asked for the others", expand=True
    )
    for head in ("steps", "points", "spread", "all", "worst", "half", "worst"):
        table.add_column(head, no_wrap=True)
    table.add_column("worst at")
    given, asked = profile.halved(points)
    whole = profile.fit_of(points)
    try:
        half = profile.fit_of(given)
    except profile.ProfileError:  # too few points to keep half of them back
        half, asked = whole, []
    for kind in profile.KINDS:
        if those := [point for point in points if point.kind == kind]:
            unseen = [point for point in asked if point.kind == kind]
            spread = np.median([point.spread_us / point.us for point in those])
            cells = (*_off(whole, those)[:2], *_off(half, unseen))
            table.add_row(kind, str(len(those)), f"{spread:.0%}", *cells)
    return table


def _off(fit: Fit, points: Sequence[Point]) -> tuple[str, str, str]:
    """The median and the worst of how far off the fit is, and where it is worst."""
    if not points:
        return "-", "-", "-"
    off = profile.errors(fit, points)
    return f"{np.median(off):.1%}", f"{off.max():.1%}", str(points[int(off.argmax())])
