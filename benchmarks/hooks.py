"""What a step of TurboMind's scheduler costs: as it is, hooked, and decided by a plan.

    taskset -c 0 python benchmarks/hooks.py --out out

TurboMind's own SequenceManager runs in host memory, on 1, 64 and 256 sequences that decode, and is
called as its batch loop calls it. No GPU and no model: a step is the scheduler alone. Stock has no
function patched; hooked has all, and nobody decides; planned takes each step from a plan, and lets
nobody else compute. The three take turns; microseconds are medians over all steps.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tables import machine, machine_line, show, table_of, write

from sagec.runtime.compiled import Recipe
from sagec.runtime.engines.turbomind import abi
from sagec.runtime.engines.turbomind.build import LANGUAGE, PATCHES
from sagec.runtime.engines.turbomind.native import Native, PlanColumns
from sagec.runtime.engines.turbomind.patching import load
from sagec.runtime.engines.turbomind.toy import load_stand_ins

SIZES = (1, 64, 256)
KINDS = ("stock", "hooked", "planned")
HOOKED_INSTANCE, PLANNED_INSTANCE = 1, 2
BLOCK_TOKENS, PROMPT_TOKENS = 64, 100
MOST_RATIO, MOST_US = 3.0, 10.0
"""The budget: hooked and planned to stock, at any size; planned, at 64 sequences."""


@dataclass
class Timing:
    """Microseconds a step with so many sequences: median, and the 99th of a hundred."""

    sequences: int
    kind: str
    us: float
    p99_us: float
    ratio: float


@dataclass
class Scheduler:
    """A SequenceManager with `count` sequences of an instance, all of which decode.

    through_slot: called where TurboMind calls it, so that hooks are in between.
    """

    library: Any
    instance: int
    count: int
    steps: int
    through_slot: bool
    spent_ns: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        blocks = self.count * (-(-(PROMPT_TOKENS + self.steps + 2) // BLOCK_TOKENS) + 1)
        self._driver = self.library.sagec_driver_new(blocks, BLOCK_TOKENS)
        first = (self.instance << abi.INSTANCE_SHIFT) + 1
        self.sessions = np.arange(first, first + self.count, dtype=np.uint64)
        for session in self.sessions.tolist():
            self.library.sagec_driver_add(self._driver, session, PROMPT_TOKENS)
        self._run(1, through_slot=False)  # the prompts, by TurboMind itself

    def decode(self, steps: int) -> None:
        """Take steps in which all decode, and keep what each took."""
        spent_ns, tokens = self._run(steps, self.through_slot)
        if tokens != self.count * steps:
            wanted = f"{self.count} sequences in {steps} steps"
            raise SystemExit(f"{wanted} computed {tokens} tokens; one each was to be computed")
        self.spent_ns += spent_ns

    def _run(self, steps: int, through_slot: bool) -> tuple[list[int], int]:
        spent = np.empty(steps, np.int64)
        place = spent.ctypes.data
        tokens = self.library.sagec_driver_run(self._driver, through_slot, steps, place)
        return spent.tolist(), tokens

    def decodes(self, plan: int, steps: int) -> PlanColumns:
        """A plan in which all of them decode."""
        rows, none = np.arange(self.count), np.zeros(self.count, np.int64)
        empty = np.empty(0, np.int64)
        return PlanColumns(
            plan=plan,
            num_steps=steps,
            max_step_tokens=self.count,
            mixes_phases=True,
            sessions=self.sessions,
            prompt_tokens=none + PROMPT_TOKENS,
            reused_tokens=none,
            chunk_step=empty,
            chunk_row=empty,
            chunk_begin=empty,
            chunk_end=empty,
            decode_row=rows,
            decode_begin_step=none,
            decode_until_tokens=none + (1 << 30),
        )


def measure(native: Native, library: Any, count: int, steps: int, turns: int) -> list[Timing]:
    """Each kind of step in turn, so many times; medians of all."""
    made = {
        kind: Scheduler(library, instance, count, steps * turns, instance > 0)
        for kind, instance in zip(KINDS, (0, HOOKED_INSTANCE, PLANNED_INSTANCE), strict=True)
    }
    for turn in range(turns):
        made["stock"].decode(steps)
        native.apply()
        hooked = native.open(HOOKED_INSTANCE, decider=abi.STOCK)
        made["hooked"].decode(steps)
        hooked.close()
        planned = native.open(PLANNED_INSTANCE, decider=abi.PLANS)
        planned.post_plan(made["planned"].decodes(turn + 1, steps + 1))
        made["planned"].decode(steps)
        planned.close()
        native.revert()
    stock_us = statistics.median(made["stock"].spent_ns) / 1000
    return [timing(count, kind, made[kind].spent_ns, stock_us) for kind in KINDS]


def timing(count: int, kind: str, spent_ns: Sequence[int], stock_us: float) -> Timing:
    """The figures of one kind."""
    us = statistics.median(spent_ns) / 1000
    p99_us = sorted(spent_ns)[int(0.99 * len(spent_ns))] / 1000
    return Timing(count, kind, round(us, 2), round(p99_us, 2), round(us / stock_us, 2))


def loaded() -> tuple[Native, Any]:
    """The patches, not applied, and the driver, in a process with stand-ins for CUDA."""
    load_stand_ins()
    native = load()
    built = Recipe(
        name="sequence-driver",
        sources=[Path(__file__).with_name("sequence_driver.cc"), PATCHES / "library.cc"],
        flags=(*LANGUAGE, "-O2", f"-Wl,--version-script={PATCHES / 'exports.map'}"),
        includes=[PATCHES],
    ).build()
    library: Any = ctypes.CDLL(str(built))
    library.sagec_driver_new.restype = ctypes.c_void_p
    library.sagec_driver_new.argtypes = (ctypes.c_int32, ctypes.c_int32)
    library.sagec_driver_add.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int32)
    library.sagec_driver_run.restype = ctypes.c_int64
    library.sagec_driver_run.argtypes = (
        *(ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p),
    )
    return native, library


def report(timings: Sequence[Timing], where: dict[str, Any]) -> str:
    """The figures as Markdown."""
    heads = ["sequences", "steps are", "us", "p99 us", "of stock"]
    rows = [list(asdict(timing).values()) for timing in timings]
    worst = max(timing.ratio for timing in timings)
    us = next((t.us for t in timings if (t.sequences, t.kind) == (64, "planned")), None)
    at_64 = "" if us is None else f"; planned, at 64 sequences: {us} us (budget {MOST_US:.0f})"
    lines = [
        "# Hooks of TurboMind",
        machine_line(where),
        table_of(heads, rows),
        f"Most of stock: {worst} (budget {MOST_RATIO:.0f}){at_64}.",
    ]
    return "\n\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write hooks.json and hooks.md where --out says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the two files")
    parser.add_argument("--turns", type=int, default=20, help="turns of each kind")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args(argv)
    steps, turns = (8, 2) if args.quick else (100, args.turns)
    native, library = loaded()
    timings = [t for count in SIZES for t in measure(native, library, count, steps, turns)]
    where = machine()
    markdown = report(timings, where)
    show(markdown)
    answer = {"machine": where, "timings": [asdict(timing) for timing in timings]}
    write(args.out, "hooks", answer, markdown, {})


if __name__ == "__main__":
    main()
