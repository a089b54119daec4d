"""do a recording's rounds again, and compare

Each round of FILE, which `sagec run --record` wrote, is decided and compiled again; the plans must
be those that were recorded, bit by bit.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sagec.cli.commands.run import natural, positive

if TYPE_CHECKING:
    from sagec.replay import Outcome
    from sagec.runtime.recording import Recording, Round
    from sagec.runtime.strategies import Strategy

EPILOG = """examples:
  sagec replay chat.rec
  sagec replay chat.rec --round 7 | sagec compile -
  sagec replay chat.rec --strategy "slo-aware" --limit 10
  sagec replay chat.rec --on torch
  sagec replay chat.rec --steps
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE, and what to do with it."""
    parser.add_argument("file", metavar="FILE", help="a recording")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--round", metavar="N", type=natural, help="print the IR of one round")
    what.add_argument("--strategy", metavar="NAME", help="say what another strategy would decide")
    what.add_argument("--on", metavar="ENGINE", help="serve the requests again, on this engine")
    what.add_argument(
        "--steps", action="store_true", help="hold the steps against what was predicted and planned"
    )
    parser.add_argument(
        "--limit", metavar="N", type=positive, default=20, help="differences to print (default: 20)"
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    """Replay; 1 where something is not as recorded, or cannot be read."""
    import sys

    from sagec.runtime.recording import Recording

    recording = Recording(args.file)
    try:
        code = _chosen(args)(args, recording)
    finally:
        for damage in recording.damages:
            print(f"error: {damage}", file=sys.stderr)
    return 1 if recording.damages else code


def _chosen(args: argparse.Namespace) -> Callable[[argparse.Namespace, Recording], int]:
    if args.on is not None:
        from sagec.cli import again

        return again.run
    if args.round is not None:
        return _print_round
    if args.steps:
        return _print_steps
    return _print_outcomes if args.strategy is None else _print_changes


def _print_outcomes(args: argparse.Namespace, recording: Recording) -> int:
    import time

    from sagec.cli import writing
    from sagec.replay import Replay

    replay = Replay(recording)
    begin_s = time.perf_counter()
    with writing.working(f"replaying {args.file}"):
        outcomes = list(replay.outcomes())
    differing = [outcome for outcome in outcomes if outcome.differences]
    total = {
        "file": args.file,
        "strategy": recording.header.strategy,
        "rounds": len(outcomes),
        "plans": sum(outcome.plans for outcome in outcomes),
        "identical_plans": sum(outcome.identical for outcome in outcomes),
        "differing_rounds": len(differing),
        "seconds": round(time.perf_counter() - begin_s, 3),
    }
    if args.json:
        shown = [{"round": o.round, "differences": list(o.differences)} for o in differing]
        writing.print_json({**total, "differences": shown})
    else:
        _print_total(total, [line for o in differing for line in _lines(o)], args.limit)
    return 1 if differing else 0


def _lines(outcome: Outcome) -> list[str]:
    return [f"round {outcome.round}: {difference}" for difference in outcome.differences]


def _print_total(total: dict[str, Any], differences: list[str], limit: int) -> None:
    from sagec.explain import counted

    rounds = counted(total["rounds"], "round")
    print(f"{total['file']}: {rounds}, strategy {_one_line(total['strategy'])}")
    for line in differences[:limit]:
        print(line)
    if len(differences) > limit:
        print(f"and {counted(len(differences) - limit, 'more difference')}")
    print(
        f"{total['identical_plans']} of {counted(total['plans'], 'plan')} bit-identical, "
        f"{total['rounds'] - total['differing_rounds']} of {rounds} decided and compiled as "
        f"recorded, in {total['seconds']:.2f} s"
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _print_round(args: argparse.Namespace, recording: Recording) -> int:
    from sagec.replay import Replay
    from sagec.runtime.recording import RecordingError

    replay = Replay(recording)
    first = last = None
    for each in recording.rounds():
        if each.state.round == args.round:
            if args.json:
                _print_round_json(each)
            else:
                print(replay.text(each), end="")
            return 0
        first, last = each.state.round if first is None else first, each.state.round
    there = "there is none" if first is None else f"there are {first} to {last}"
    raise RecordingError(f"{args.file}: no round {args.round}; {there}")


def _print_round_json(recorded: Round) -> None:
    from sagec.cli import writing
    from sagec.replay import as_json

    writing.print_json(as_json(recorded))


STEP_COLUMNS = (
    "instance", "steps", "predicted us", "measured us", "p50", "p99", "within 25%", "as planned"
)  # fmt: skip


def _print_steps(args: argparse.Namespace, recording: Recording) -> int:
    from sagec.cli import writing
    from sagec.cli.listing import table_of
    from sagec.explain import counted
    from sagec.step_times import step_times

    found = step_times(recording)
    if args.json:
        writing.print_json([times.as_json() for times in found])
        return 0
    steps = counted(sum(times.num_steps for times in found), "step")
    print(f"{args.file}: {steps} against predicted times; medians, and measured over predicted")
    rows = [
        (t.instance, t.num_steps, t.predicted_us, t.measured_us, t.ratio_p50, t.ratio_p99,
         f"{t.num_close / t.num_steps:.0%}" if t.num_steps else None,
         f"{t.conformance.obeyed / t.conformance.decided:.0%}" if t.conformance.decided else None)
        for t in found
    ]  # fmt: skip
    writing.console(width=100).print(table_of(STEP_COLUMNS, rows, ("instance",)))
    if unknown := sum(times.num_unknown for times in found):
        print(f"{counted(unknown, 'more step')} without a prediction")
    _print_deviations([line for times in found for line in times.deviations], args.limit)
    return 0


def _print_deviations(lines: list[str], limit: int) -> None:
    from sagec.explain import counted

    for line in lines[:limit]:
        print(line)
    if len(lines) > limit:
        print(f"and {counted(len(lines) - limit, 'more deviation')}")


def _print_changes(args: argparse.Namespace, recording: Recording) -> int:
    from collections import Counter

    from sagec.cli import writing
    from sagec.explain import counted
    from sagec.replay import Replay

    replay, other = Replay(recording), _other_strategy(args.strategy)
    rounds, changes = 0, []
    for _, of_round in replay.changes(other):
        rounds += 1
        changes += of_round
    counts = Counter(f"{change.recorded} -> {change.other}" for change in changes)
    if args.json:
        total = {"file": args.file, "strategy": recording.header.strategy, "other": args.strategy}
        rows = [change.as_json() for change in changes]
        writing.print_json({**total, "rounds": rounds, "counts": counts, "changes": rows})
        return 0
    print(f"{args.file}: {_one_line(recording.header.strategy)} against {_one_line(args.strategy)}")
    for change in changes[: args.limit]:
        print(change)
    if len(changes) > args.limit:
        print(f"and {len(changes) - args.limit} more")
    summed = ", ".join(f"{count} {what}" for what, count in counts.most_common())
    found = f"{counted(rounds, 'round')}, {counted(len(changes), 'difference')}"
    print(f"{found}{': ' + summed if summed else ''}")
    return 0


def _other_strategy(text: str) -> Strategy:
    """The strategy of the command line. Raises UsageError for a wrong one."""
    from sagec.cli.failure import UsageError
    from sagec.diagnostics import Diagnostic
    from sagec.runtime.strategies import StrategyError
    from sagec.strategies import strategy_of

    try:
        return strategy_of(text)
    except Diagnostic as error:
        raise UsageError(f"--strategy: {error.line()}") from None
    except StrategyError as error:
        raise UsageError(f"--strategy: {error}") from None
