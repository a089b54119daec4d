"""How far off the cost models are: of measured steps that they were given none of, or half of.

    python benchmarks/cost.py --out out/cost
    python benchmarks/cost.py --profile laptop.json     (what `sagec profile` wrote)

The steps: Aegaeon's of vLLM on A100, H100 and H800, and DistServe's published lines of an A100,
both in ../shared/profiles; and this machine's torch engine, measured here unless --no-engine says
not.
"""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tables

from sagec.dialects.cluster import DEVICE_KINDS
from sagec.passes.topology import Model
from sagec.runtime import engines, profile
from sagec.runtime.cost import StepCost
from sagec.runtime.engines import InstanceSpec
from sagec.runtime.profile import Point, ProfileError, Shape
from sagec.runtime.roofline import Device
from sagec.runtime.step_timer import Grid, StepTimer

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ROOT.parent / "shared" / "profiles"
TINY = ROOT / "examples" / "models" / "tiny"

SHAPES = {
    "llama2_13b_chat": Shape(40, 5120, 40, 40, 128, 13824, 32000, "bf16"),
    "qwen2_5_7b": Shape(28, 3584, 28, 4, 128, 18944, 152064, "bf16"),
    "yi1_5_9b_chat": Shape(48, 4096, 32, 4, 128, 11008, 64000, "bf16"),
}
"""Of Aegaeon's models, as their config.json says."""

MOST_STEP_TOKENS = {"A100": 4096, "H100": 4096}
"""What vLLM computed in a step there: prefills of more took no longer, and what was left went into
the times of decodes, which therefore are no decodes'."""

UNSTEADY = 0.2
"""A measured step whose interquartile range is more of its median says too little to be asked."""

REPEATS = 15
"""Of each step of the torch engine: more than a profile has, for neighbours disturb them here."""

DISTSERVE_TOKENS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DISTSERVE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)
DISTSERVE_CONTEXTS = (128, 512, 1024)


@dataclass(frozen=True)
class Case:
    """Measured steps of a model on a device; model: where it is known."""

    name: str
    device: str
    points: tuple[Point, ...]
    shape: Shape | None = None


@dataclass(frozen=True)
class Result:
    """How far off a cost model was, of so many steps of a kind: the median, the worst, and which.

    form: "fit" and "line" were given half of the steps and asked for the others, "roofline" and
    "operators" were given none and asked for all.
    """

    case: str
    device: str
    steps: str
    form: str
    points: int
    median: float
    worst: float
    where: str


def aegaeon(folder: Path = PROFILES / "aegaeon") -> Iterator[Case]:
    """Its measured points: a case for each model and device."""
    for place in sorted(folder.glob("*/*/")):
        most = MOST_STEP_TOKENS.get(place.name, 1 << 30)
        times: dict[Point, list[float]] = {}
        for file in sorted(place.glob("i*b*.json")):
            for step, seconds in _aegaeon_steps(file, most):
                times.setdefault(step, []).extend(seconds)
        points = tuple(_point(step, seconds) for step, seconds in times.items())
        yield Case(place.parent.name, place.name, points, SHAPES.get(place.parent.name))


def _aegaeon_steps(file: Path, most: int) -> Iterator[tuple[Point, list[float]]]:
    """A prefill of as many prompts as a step took; decodes only where it took all of them.

    With the seconds of each. Several files may hold the same prefill, cut to what a step took.
    """
    match = re.fullmatch(r"i(\d+)b(\d+)", file.stem)
    assert match is not None, file
    length, batch = map(int, match.groups())
    said = json.loads(file.read_text())
    prompts = min(batch, most // length)
    yield Point(1.0, prompts=prompts, chunk_tokens=length), said["prefill_latencies"]
    if prompts == batch:
        yield Point(1.0, decodes=batch, context_tokens=length), said["decode_latencies"]


def _point(step: Point, seconds: Sequence[float]) -> Point:
    low, middle, high = np.quantile(np.array(seconds) * 1e6, (0.25, 0.5, 0.75)).tolist()
    return replace(step, us=middle, spread_us=high - low, repeats=len(seconds))


def distserve(folder: Path = PROFILES / "distserve") -> Iterator[Case]:
    """Points on its published lines (milliseconds): a case for each system, model and tp."""
    for file in sorted(folder.glob("profiler-a100-80g.*.json")):
        system = file.name.split(".")[1]
        for model, by_tp in json.loads(file.read_text()).items():
            for tp, lines in by_tp.items():
                points = tuple(_distserve_points(lines))
                yield Case(f"{system} {model.split('/')[1]} tp {tp}", "A100", points)


def _distserve_points(lines: dict[str, Any]) -> Iterator[Point]:
    a, b, c = lines["prefill"]
    for tokens in DISTSERVE_TOKENS:
        us = 1e3 * (a + b * tokens + c * tokens**2)
        yield Point(us=us, prompts=1, chunk_tokens=tokens)
    for batch in DISTSERVE_BATCHES:
        small = batch < lines["decoding_large_small_bs_threshold"]
        a, b, c = lines["decoding_smallbs" if small else "decoding_largebs"]
        for context in DISTSERVE_CONTEXTS:
            us = 1e3 * (a + b * batch * context + c * batch)
            yield Point(us=us, decodes=batch, context_tokens=context)


def here(grid: Grid) -> Case:
    """The torch engine of this machine with the small model of the examples."""
    spec = InstanceSpec(id="i0", engine="torch", model=str(TINY), kv_blocks=2048, block_tokens=16)
    engine = engines.create(spec)
    try:
        config = json.loads((TINY / "config.json").read_text())
        points = StepTimer(engine, "i0", config["vocab_size"], max_step_tokens=512).points(grid)
    finally:
        engine.close()
    return Case("examples/models/tiny", "torch, here", points)


def results(case: Case) -> Iterator[Result]:
    """Of a case, each cost model with each kind of step."""
    steady = [point for point in case.points if point.spread_us <= UNSTEADY * point.us]
    given, asked = profile.halved(case.points)
    asked = [point for point in asked if point in steady]
    for form in ("fit", "line"):
        yield from _off(case, form, profile.fit_of(given, straight=form == "line"), asked)
    if case.shape is not None and (kind := DEVICE_KINDS.get(case.device.lower())):
        device = Device(float(kind["flops_per_s"]), float(kind["bytes_per_s"]))
        yield from _off(case, "roofline", roofline(case.shape, device), steady)
        yield from _off(case, "operators", Operators(case.shape, device), steady)


def _off(case: Case, form: str, cost: Any, points: Sequence[Point]) -> Iterator[Result]:
    for kind in profile.KINDS:
        those = [point for point in points if point.kind == kind]
        if those:
            off = profile.errors(cost, those)
            yield Result(
                case=case.name,
                device=case.device,
                steps=kind,
                form=form,
                points=len(those),
                median=round(float(np.median(off)), 4),
                worst=round(float(off.max()), 4),
                where=str(those[int(off.argmax())]),
            )


def roofline(shape: Shape, device: Device) -> StepCost:
    """The closed form that passes use where nothing was measured."""
    model = Model(name="", max_context=1, path="", **asdict(shape))
    return model.cost(device.flops_per_s, device.bytes_per_s)


@dataclass(frozen=True)
class Operators:
    """The sum of a step's operators, each by the roofline of what the device sustains."""

    shape: Shape
    device: Device

    def one_step_us(self, tokens: int, pairs: float, context: float, decodes: int) -> float:
        """As `StepCost.one_step_us`."""
        m = self.shape
        q, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
        products = [(m.hidden, q + 2 * kv), (q, m.hidden), (m.hidden, 2 * m.ffn), (m.ffn, m.hidden)]
        held = max(context, tokens - decodes) * 2 * kv * 2.0
        layer = sum(self._product_us(tokens, *sides) for sides in products)
        layer += self.device.operator_us(4.0 * pairs * q, held)
        layer += 2 * self.device.operator_us(0.0, 3 * tokens * m.hidden * 2.0)
        return m.layers * layer + self._product_us(max(decodes, 1), m.hidden, m.vocab)

    def _product_us(self, rows: int, inner: int, outer: int) -> float:
        moved = 2.0 * (inner * outer + rows * (inner + outer))
        return self.device.operator_us(2.0 * rows * inner * outer, moved)


HEADS = ("case", "device", "steps", "cost model", "points", "median off", "worst off", "worst at")


def markdown(where: dict[str, Any], found: Sequence[Result]) -> str:
    """The results as a table, with a line that says where they were taken."""
    rows = [
        (r.case, r.device, r.steps, r.form, r.points, f"{r.median:.1%}", f"{r.worst:.1%}", r.where)
        for r in found
    ]
    parts = [
        "# Predicted against measured steps",
        tables.machine_line(where),
        "fit: curves, given half of the steps and asked for the others. line: DistServe's form, "
        "the same. roofline, operators: given nothing but the data sheet, asked for all.",
        tables.table_of(HEADS, rows),
    ]
    return "\n\n".join(parts) + "\n"


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """All there are, of what the command line asks for."""
    if args.profile:
        read = profile.read(str(args.profile))
        yield Case(args.profile.stem, f"{read.engine}, {read.device}", read.points)
    yield from aegaeon()
    yield from distserve()
    if args.engine and not args.profile:
        yield here(Grid.quick() if args.quick else replace(Grid(), repeats=REPEATS))


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, print the table, and write cost.json and cost.md where --out says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, help="folder for cost.json and cost.md")
    parser.add_argument("--profile", type=Path, help="instead of measuring the torch engine here")
    parser.add_argument("--no-engine", dest="engine", action="store_false", help="no torch engine")
    parser.add_argument("--quick", action="store_true", help="a coarse grid of the torch engine")
    args = parser.parse_args(argv)
    try:
        found = [result for case in cases(args) for result in results(case)]
    except ProfileError as error:
        parser.exit(1, f"error: {error}\n")
    where = tables.machine()
    text = markdown(where, found)
    tables.show(text)
    if args.out:
        answer = {**where, "results": [asdict(result) for result in found]}
        tables.write(args.out, "cost", answer, text, {})


if __name__ == "__main__":
    main()
