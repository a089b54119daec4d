"""What KV bookkeeping costs, and what each eviction policy finds of a recorded workload.

    taskset -c 0 python benchmarks/kv.py --out out

Microseconds are medians over repeats, in a pool and an index that are full, for one block unless
the table says otherwise. The replay sends every request of the Mooncake trace through a prefix
index of several sizes, one after the other; hit rates are blocks found of blocks asked for.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tables import machine, machine_line, show, table_of, write

from sagec.charts import bar_chart, line_chart
from sagec.language.traces import MOONCAKE_BLOCK_TOKENS, Recorded, read_trace
from sagec.runtime.kv.lifetime import LifetimePredictor
from sagec.runtime.kv.migration import DEVICE, DISK, HOST, TIERS, Candidates, CostBenefit
from sagec.runtime.kv.policies import create, known
from sagec.runtime.kv.pool import BlockPool
from sagec.runtime.kv.prefix_index import PrefixIndex
from sagec.runtime.kv.replay import Replayed, belady, replay, unbounded
from sagec.runtime.kv.tiers import Bytes, Tiers

TRACE = (
    Path(__file__).resolve().parents[2] / "shared" / "traces" / "mooncake" / "synthetic_trace.jsonl"
)
CACHED_BLOCKS = (1_000, 10_000, 100_000)
"""Sizes of pool and index whose operations are timed."""

PATH_BLOCKS = 32
"""Blocks of a request in the timings: 512 tokens of 16, or 16k of 512."""

BLOCK_BYTES = (32 << 10, 1 << 20)
"""Sizes of blocks that are moved between tiers: of a small model, and of a large one."""

CAPACITIES = (1_000, 3_000, 10_000, 30_000, 100_000)
"""Sizes of the replayed caches."""

HORIZON_S = 60
"""How far ahead the lifetime predictor is asked, every half of it."""

BELADY, UNBOUNDED = "Belady's bound", "never drops"


@dataclass(frozen=True)
class Timing:
    """Median time of one operation at one size; per: what it is the time of."""

    what: str
    operation: str
    blocks: int
    us: float
    per: str = "block"


@dataclass(frozen=True)
class TierSpeed:
    """Copies of blocks of a size from one tier to another."""

    source: str
    target: str
    block_bytes: int
    us: float
    bytes_per_s: float


@dataclass(frozen=True)
class HitRate:
    """What one policy, or one bound, found in a cache of a size; None is a cache without bounds."""

    policy: str
    capacity_blocks: int | None
    hit_rate: float
    evictions: int
    cpu_s: float


@dataclass(frozen=True)
class Calibration:
    """Of a tenth of all predictions, from the least likely: predicted and observed reuse."""

    decile: int
    predictions: int
    predicted: float
    observed: float


# What an operation costs


class Stopwatch:
    """Times named operations, each so often that the median is of use."""

    def __init__(self) -> None:
        self._us: dict[str, list[float]] = {}

    def time(self, operation: str, action: Callable[[], object], count: int) -> None:
        """Run the action, which is `count` operations."""
        begin_s = time.perf_counter()
        action()
        elapsed_s = time.perf_counter() - begin_s
        self._us.setdefault(operation, []).append(1e6 * elapsed_s / count)

    def medians(self) -> dict[str, float]:
        """Microseconds of each operation, in the order in which they came."""
        return {name: round(statistics.median(us), 3) for name, us in self._us.items()}


def time_pool(num_blocks: int, repeats: int) -> list[Timing]:
    """Allocate and free the blocks of a request in a pool whose other half is held."""
    pool = BlockPool(num_blocks, block_tokens=16)
    for _ in range(num_blocks // 2 // PATH_BLOCKS):
        pool.grow(pool.open_slot(), PATH_BLOCKS)
    watch = Stopwatch()
    for _ in range(repeats):
        slot = pool.open_slot()
        watch.time("allocate", partial(pool.grow, slot, PATH_BLOCKS), PATH_BLOCKS)
        watch.time("free", partial(pool.shrink, slot, 0), PATH_BLOCKS)
        pool.close_slot(slot)
    return [Timing("pool", name, num_blocks, us) for name, us in watch.medians().items()]


def time_index(num_blocks: int, repeats: int) -> list[Timing]:
    """Look up, insert and evict requests in a full index under LRU."""
    index = PrefixIndex(create("lru", num_blocks), block_tokens=16)
    paths = [tuple(range(n, n + PATH_BLOCKS)) for n in range(0, num_blocks, PATH_BLOCKS)]
    for path in paths:
        index.insert(path)
    random = np.random.default_rng(0)
    fresh = itertools.count(10 * num_blocks, PATH_BLOCKS)
    watch = Stopwatch()
    for pick in random.integers(0, len(paths), repeats).tolist():
        path, begin = paths[pick], next(fresh)
        new = tuple(range(begin, begin + PATH_BLOCKS))
        watch.time("lookup, all found", partial(index.lookup, path), PATH_BLOCKS)
        watch.time("lookup, none found", partial(index.lookup, new), 1)
        watch.time("evict", partial(index.evict, PATH_BLOCKS), PATH_BLOCKS)
        watch.time("insert", partial(index.insert, new), PATH_BLOCKS)
        paths[pick] = new
    per = {"lookup, none found": "request"}
    return [
        Timing("index", name, num_blocks, us, per.get(name, "block"))
        for name, us in watch.medians().items()
    ]


def each(tell: Callable[[int], None], blocks: Sequence[int]) -> None:
    """Tell a policy of each block."""
    for block in blocks:
        tell(block)


def time_policy(name: str, num_blocks: int, repeats: int) -> list[Timing]:
    """Touch, drop and store blocks of a full policy, of which a tenth may not go."""
    policy = create(name, num_blocks)
    for block in range(num_blocks):
        policy.stored(block)
    fresh = itertools.count(num_blocks)
    random = np.random.default_rng(0)
    watch = Stopwatch()
    for _ in range(repeats):
        picked = random.integers(0, num_blocks, PATH_BLOCKS).tolist()
        new = list(itertools.islice(fresh, PATH_BLOCKS))

        def victims() -> None:
            for _ in range(PATH_BLOCKS):
                policy.victim(lambda block: block % 10 != 0)

        watch.time("touched", partial(each, policy.touched, picked), PATH_BLOCKS)
        watch.time("victim", victims, PATH_BLOCKS)
        watch.time("stored", partial(each, policy.stored, new), PATH_BLOCKS)
    return [Timing(name, what, num_blocks, us) for what, us in watch.medians().items()]


def time_migration(candidates: int, repeats: int) -> Timing:
    """A plan for candidates on all tiers, half of which must leave, with little room."""
    random = np.random.default_rng(0)
    rows = Candidates.of(
        np.arange(candidates),
        random.integers(0, 3, candidates),
        random.random(candidates),
        random.random(candidates) < 0.5,
    )
    speeds = {(DEVICE, HOST): 2e10, (HOST, DEVICE): 2e10, (HOST, DISK): 2e9, (DISK, HOST): 3e9}
    model = CostBenefit(
        block_bytes=2**20, block_tokens=16, prefill_us_per_token=100.0, bytes_per_s=speeds
    )
    room = (candidates // 20, candidates // 10, candidates // 5)
    watch = Stopwatch()
    for _ in range(repeats):
        watch.time("plan", partial(model.plan, rows, room), candidates)
    return Timing("migration", "plan", candidates, watch.medians()["plan"])


class Memory:
    """Blocks of a device whose memory is the host's, so that tiers are measured without one."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self._blocks = self.memory(num_blocks)

    def memory(self, num_blocks: int) -> Bytes:
        """Blocks with something in each, so that the system has given the memory."""
        return np.ones((num_blocks, self.block_bytes), np.uint8)

    def save(self, block: int, target: Bytes) -> None:
        """A copy within memory."""
        target[:] = self._blocks[block]

    def load(self, block: int, source: Bytes) -> None:
        """A copy within memory."""
        self._blocks[block] = source


def time_tiers(block_bytes: int, num_blocks: int, rounds: int) -> list[TierSpeed]:
    """Every block of a device down to disk and up again, some times."""
    tiers = Tiers(Memory(num_blocks, block_bytes), num_blocks, num_blocks)
    for _ in range(rounds):
        places = [tiers.move(DEVICE, block, HOST) for block in range(num_blocks)]
        places = [tiers.move(HOST, place, DISK) for place in places]
        places = [tiers.move(DISK, place, HOST) for place in places]
        for block, place in enumerate(places):
            tiers.move(HOST, place, DEVICE, block)
    tiers.close()
    return [
        TierSpeed(TIERS[m.source], TIERS[m.target], block_bytes, m.us / m.blocks, m.bytes_per_s)
        for m in tiers.statistics().moved
    ]


# What a policy finds


def replayed(
    requests: Sequence[Sequence[int]], names: Sequence[str], capacities: Sequence[int]
) -> Iterator[HitRate]:
    """Every policy and both bounds, at every size."""

    def measured(name: str, capacity: int | None, action: Callable[[], Replayed]) -> HitRate:
        begin_s = time.process_time()
        found = action()
        cpu_s = round(time.process_time() - begin_s, 3)
        return HitRate(name, capacity, round(found.hit_rate, 5), found.evictions, cpu_s)

    for capacity in capacities:
        for name in names:
            policy = create(name, capacity)
            yield measured(name, capacity, partial(replay, requests, policy, capacity))
        yield measured(BELADY, capacity, partial(belady, requests, capacity))
    yield measured(UNBOUNDED, None, partial(unbounded, requests))


def calibrated(requests: Sequence[Recorded]) -> list[Calibration]:
    """The lifetime predictor's answers on the trace, against what came then.

    Nothing where the trace is shorter than what has to pass before the first answer and after it.
    """
    used_us: dict[int, list[int]] = {}
    for request in requests:
        for block in request.blocks:
            used_us.setdefault(block, []).append(request.arrival_us)
    within_us = HORIZON_S * 1_000_000
    predictor = LifetimePredictor()
    predicted: list[np.ndarray] = [np.zeros(0)]
    observed: list[bool] = []
    ask_us = 2 * within_us
    for request in requests:
        while ask_us < request.arrival_us and ask_us + within_us <= requests[-1].arrival_us:
            blocks = list(predictor.followed())
            predicted.append(predictor.reuse_probability(blocks, ask_us, within_us))
            for block in blocks:
                moments = used_us[block]
                after = bisect.bisect_right(moments, ask_us)
                observed.append(after < len(moments) and moments[after] <= ask_us + within_us)
            ask_us += within_us // 2
        predictor.used(request.blocks, request.arrival_us)
    return _deciles(np.concatenate(predicted), np.array(observed, bool))


def _deciles(predicted: np.ndarray, observed: np.ndarray) -> list[Calibration]:
    parts = np.array_split(np.argsort(predicted, kind="stable"), 10)
    return [
        Calibration(
            number,
            len(part),
            round(float(predicted[part].mean()), 4),
            round(float(observed[part].mean()), 4),
        )
        for number, part in enumerate(parts, 1)
        if len(part)
    ]


# What is said of it


@dataclass
class Report:
    """Paragraphs for people, the same figures for programs, and pictures by file name."""

    paragraphs: list[str]
    figures: dict[str, Any]
    pictures: dict[str, str]

    def __add__(self, other: Report) -> Report:
        return Report(
            self.paragraphs + other.paragraphs,
            {**self.figures, **other.figures},
            {**self.pictures, **other.pictures},
        )


def timed(sizes: Sequence[int], names: Sequence[str], repeats: int) -> Report:
    """What the operations of pool, index, policies and migration cost."""
    store = [t for size in sizes for t in (*time_pool(size, repeats), *time_index(size, repeats))]
    policies = [t for name in names for size in sizes for t in time_policy(name, size, repeats)]
    plans = [time_migration(size, max(repeats // 30, 1)) for size in sizes[:2]]
    speeds = [s for size in BLOCK_BYTES for s in time_tiers(size, 64, max(repeats // 100, 1))]
    paragraphs = [
        "# KV bookkeeping",
        machine_line(machine()),
        timing_table(store),
        "Eviction policies, of whose blocks every tenth may not go:",
        timing_table(policies),
        "A migration plan, per candidate:",
        timing_table(plans),
        "Blocks between tiers. The device's memory is the host's here, and what is written to disk "
        "may lie in the system's cache when it is read:",
        table_of(
            ("from", "to", "KiB a block", "us a block", "MB/s"),
            [
                (s.source, s.target, s.block_bytes // 1024, s.us, s.bytes_per_s / 1e6)
                for s in speeds
            ],
        ),
    ]
    timings = [asdict(timing) for timing in (*store, *policies, *plans)]
    return Report(paragraphs, {"timings": timings, "tiers": [asdict(s) for s in speeds]}, {})


def traced(requests: Sequence[Recorded], names: Sequence[str], capacities: Sequence[int]) -> Report:
    """What policies and predictor make of a trace."""
    rates = list(replayed([request.blocks for request in requests], names, capacities))
    report = Report(
        replay_report(requests, rates),
        {"hit_rates": [asdict(rate) for rate in rates]},
        {"kv-hit-rate.svg": hit_rate_chart(rates), "kv-of-belady.svg": share_chart(rates)},
    )
    if tenths := calibrated(requests):
        report += Report(
            calibration_report(tenths),
            {"calibration": [asdict(tenth) for tenth in tenths]},
            {"kv-lifetime.svg": calibration_chart(tenths)},
        )
    return report


def timing_table(timings: Sequence[Timing]) -> str:
    """A row an operation, a column a size."""
    sizes = sorted({timing.blocks for timing in timings})
    found = {(t.what, t.operation, t.per, t.blocks): t.us for t in timings}
    keys = dict.fromkeys((t.what, t.operation, t.per) for t in timings)
    return table_of(
        ("", "operation", "us per", *(f"{size:,} blocks" for size in sizes)),
        [(*key, *(found.get((*key, size), "") for size in sizes)) for key in keys],
    )


def hit_rate_table(rates: Sequence[HitRate], share: bool = False) -> str:
    """A row a policy, a column a size; in percent of all blocks, or of Belady's bound."""
    sizes = list(dict.fromkeys(r.capacity_blocks for r in rates if r.capacity_blocks))
    found = {(r.policy, r.capacity_blocks): r.hit_rate for r in rates}
    limit = found[UNBOUNDED, None]
    rows = []
    for name in dict.fromkeys(rate.policy for rate in rates):
        of_size = [found.get((name, size), limit) for size in sizes]
        if share:
            best = [found[BELADY, size] for size in sizes]
            of_size = [
                rate / most if most else 1.0 for rate, most in zip(of_size, best, strict=True)
            ]
        if not share or name not in (BELADY, UNBOUNDED):
            rows.append((name, *(f"{100 * rate:.2f}" for rate in of_size)))
    return table_of(("%", *(f"{size:,} blocks" for size in sizes)), rows)


def hit_rate_chart(rates: Sequence[HitRate]) -> str:
    """Hit rate over size, a line a policy and a line a bound."""
    series: dict[str, list[tuple[float, float]]] = {}
    for rate in rates:
        if rate.capacity_blocks:
            series.setdefault(rate.policy, []).append((rate.capacity_blocks, 100 * rate.hit_rate))
        else:
            sizes = [r.capacity_blocks for r in rates if r.capacity_blocks]
            series[rate.policy] = [(size, 100 * rate.hit_rate) for size in (min(sizes), max(sizes))]
    return line_chart(
        series,
        "Prefix hits in the Mooncake trace",
        f"cache size (blocks of {MOONCAKE_BLOCK_TOKENS} tokens)",
        "blocks found (%)",
        log_x=True,
    )


def share_chart(rates: Sequence[HitRate]) -> str:
    """What each policy finds of what Belady's bound finds, side by side at every size."""
    best = {r.capacity_blocks: r.hit_rate for r in rates if r.policy == BELADY}
    shares: dict[str, dict[str, float]] = {}
    for rate in rates:
        size = rate.capacity_blocks
        if size and rate.policy != BELADY and best[size]:
            share = 100 * rate.hit_rate / best[size]
            shares.setdefault(rate.policy, {})[f"{size:,}"] = share
    return bar_chart(
        shares,
        "Prefix hits in the Mooncake trace, of Belady's bound",
        f"cache size (blocks of {MOONCAKE_BLOCK_TOKENS} tokens)",
        "of the bound (%)",
    )


def calibration_chart(tenths: Sequence[Calibration]) -> str:
    """Observed over predicted reuse; on the diagonal they agree."""
    points = [(100 * tenth.predicted, 100 * tenth.observed) for tenth in tenths]
    most = max(max(point) for point in points)
    return line_chart(
        {"lifetime": points, "as predicted": [(0.0, 0.0), (most, most)]},
        f"Blocks used again within {HORIZON_S} s",
        "predicted (%)",
        "observed (%)",
    )


def replay_report(requests: Sequence[Recorded], rates: Sequence[HitRate]) -> list[str]:
    """The paragraphs about the trace's replay."""
    blocks = sum(len(request.blocks) for request in requests)
    policies = [rate for rate in rates if rate.policy not in (BELADY, UNBOUNDED)]
    cpu_s = sum(rate.cpu_s for rate in policies)
    return [
        "# Hit rates on the Mooncake trace",
        f"{len(requests):,} requests, {blocks:,} blocks of {MOONCAKE_BLOCK_TOKENS} tokens as the "
        "trace names them, a prompt's last and partial one too; outputs are not in it. Requests "
        "one after the other: each pins what it found, makes room, and is cached.",
        hit_rate_table(rates),
        f"'{BELADY}' knows the future and may leave out blocks; no policy of that size finds more. "
        f"'{UNBOUNDED}' is a cache without bounds. In percent of Belady's bound:",
        hit_rate_table(rates, share=True),
        f"{len(policies)} replays took {cpu_s:.1f} s of CPU time: "
        f"{len(policies) * len(requests) / cpu_s:,.0f} requests/s, "
        f"{1e6 * cpu_s / len(policies) / blocks:.2f} us a block.",
    ]


def calibration_report(tenths: Sequence[Calibration]) -> list[str]:
    """The paragraphs about the lifetime predictor."""
    return [
        "# Predicted reuse",
        f"Every {HORIZON_S // 2} s of the trace, for every block that is followed: how likely is "
        f"it to be used within {HORIZON_S} s? Tenths of all answers, from the least likely:",
        table_of(
            ("tenth", "predictions", "predicted %", "observed %"),
            [
                (t.decile, t.predictions, f"{100 * t.predicted:.1f}", f"{100 * t.observed:.1f}")
                for t in tenths
            ],
        ),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and write kv.json, kv.md and the pictures where --out says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the files")
    parser.add_argument("--trace", type=Path, default=TRACE, help="JSON lines as Mooncake's")
    parser.add_argument("--policies", nargs="+", choices=known(), default=known())
    parser.add_argument("--capacities", type=int, nargs="+", default=CAPACITIES, metavar="BLOCKS")
    parser.add_argument("--repeats", type=int, default=300, help="of each operation")
    parser.add_argument("--quick", action="store_true", help="a few of each, to see that it runs")
    args = parser.parse_args(argv)
    sizes = CACHED_BLOCKS[:1] if args.quick else CACHED_BLOCKS
    repeats, limit = (3, 1_000) if args.quick else (args.repeats, None)
    report = timed(sizes, args.policies, repeats)
    if args.trace.exists():
        report += traced(read_trace(args.trace, limit), args.policies, sorted(args.capacities))
    else:
        report.paragraphs.append(f"There is no trace at {args.trace}: nothing was replayed.")
    text = "\n\n".join(report.paragraphs) + "\n"
    show(text)
    write(args.out, "kv", {**machine(), **report.figures}, text, report.pictures)


if __name__ == "__main__":
    main()
