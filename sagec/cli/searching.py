"""`sagec search`: layouts of a file's cluster, the best of them, and why the others lost."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from sagec.capacity import Target
from sagec.cli import serving, writing
from sagec.cli.failure import InputError
from sagec.language.resolution import resolve
from sagec.runtime.request import Request
from sagec.search import Layout, Search, SearchError, Verdict, figure, layouts

TPS = (1, 2, 4, 8)
CHUNKS = (512, 2048)
REQUESTS = 300
BEST = 5


def run(args: argparse.Namespace) -> int:
    """Try layouts; 1 where none of them serves enough requests well."""
    from sagec.compiler import Compiler

    unit = Compiler().read(args.file)
    if unit.program is None:
        raise InputError(f"{unit.name}: a search reads .sage, which says what devices there are")
    limit = args.limit or REQUESTS
    serving.strategy_for(unit, args.strategy)
    best = args.best or BEST
    try:
        requests = serving.chosen(unit, limit, counted=True)
        search = Search(
            unit.program,
            requests,
            lambda: serving.strategy_for(unit, args.strategy),
            target_of(args, requests),
            limit,
        )
        heads, kv_heads = _heads(unit.program)
        tried = list(
            layouts(len(search.devices), args.tp or TPS, args.chunk or CHUNKS, heads, kv_heads)
        )
        if not tried:
            raise SearchError(_no_layout(args.tp or TPS, len(search.devices), heads, kv_heads))
        verdicts = search.verdicts(tried, best, tell=_tell)
    except SearchError as error:
        raise InputError(f"{unit.name}: {error}") from None
    if args.json:
        writing.print_json([_row(verdict) for verdict in verdicts])
    else:
        if simulated := [verdict for verdict in verdicts if _is_tried(verdict)]:
            writing.console(width=100).print(_table(simulated))
        print(_reasons(verdicts, best))
        print(_sentence(verdicts, best, search))
    return 0 if verdicts[0].goodput_per_s else 1


def _no_layout(tps: Sequence[int], devices: int, heads: int, kv_heads: int) -> str:
    listed = ", ".join(map(str, tps))
    fits = [tp for tp in range(1, devices + 1) if not heads % tp and not kv_heads % tp]
    return (
        f"no layout: tp {listed} on {devices} devices, with {heads} heads and {kv_heads} KV heads; "
        f"what does: {', '.join(map(str, fits)) or 'none'}"
    )


def _tell(line: str) -> None:
    if sys.stderr.isatty():
        print(line, file=sys.stderr)


def target_of(args: argparse.Namespace, requests: Sequence[Request]) -> Target:
    """The promise that is to be kept: the command line's, or the requests' own, which is one.

    Raises SearchError.
    """
    found = []
    for name, given in (("ttft", args.ttft_ms), ("tpot", args.tpot_ms)):
        said = {getattr(request, f"{name}_us") for request in requests}
        if given is not None:
            found.append(1000 * given)
        elif len(said) == 1 and None not in said:
            found.append(said.pop())
        else:
            raise SearchError(
                f"the requests are not all promised one {name}; say --{name}-ms, or {name} at serve"
            )
    return Target(found[0], found[1], args.attained)


def _heads(program: Any) -> tuple[int, int]:
    """Of the one model that the cluster's instances run."""
    scene = resolve(program)
    models = {instance.model for instance in scene.instances.values()}
    if len(models) != 1:
        raise SearchError(
            f"the cluster's instances run {len(models)} models; a search lays out one"
        )
    shape = scene.models[models.pop()].shape
    return shape.heads, shape.kv_heads


def _row(verdict: Verdict) -> dict[str, Any]:
    return {
        "layout": str(verdict.layout),
        **dataclasses.asdict(verdict.layout),
        "devices": verdict.layout.num_devices,
        "goodput_per_s": verdict.goodput_per_s,
        "goodput_per_s_per_device": round(verdict.per_device, 6),
        "missed_per_s": verdict.missed_per_s,
        "bound_per_s": round(verdict.bound_per_s, 6),
        "ttft_p90_ms": verdict.ttft_p90_ms,
        "tpot_p90_ms": verdict.tpot_p90_ms,
        "why": verdict.why,
    }


def _is_tried(verdict: Verdict) -> bool:
    return verdict.goodput_per_s is not None or verdict.missed_per_s is not None


_SHOWN_ROWS = 24
"""Of more layouts than these the table leaves the rest out; `--json` has all."""

COLUMNS = ("layout", "good /s", "/s a device", "bound /s", "TTFT ms", "TPOT ms")


def _table(verdicts: Sequence[Verdict]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for title in COLUMNS:
        justify: Any = "left" if title == COLUMNS[0] else "right"
        shown.add_column(title, justify=justify, no_wrap=True)
    for verdict in verdicts[:_SHOWN_ROWS]:
        numbers = (verdict.bound_per_s, verdict.ttft_p90_ms, verdict.tpot_p90_ms)
        figures = ["-" if value is None else figure(value) for value in numbers]
        good = _good(verdict, 1), _good(verdict, verdict.layout.num_devices)
        shown.add_row(*map(Text, [str(verdict.layout), *good, *figures]))
    if len(verdicts) > _SHOWN_ROWS:
        shown.add_row(Text(f"and {len(verdicts) - _SHOWN_ROWS} more"))
    return shown


def _good(verdict: Verdict, devices: int) -> str:
    """The goodput of each of so many devices, or what it is below."""
    if verdict.goodput_per_s is not None:
        return figure(verdict.goodput_per_s / devices)
    assert verdict.missed_per_s is not None
    return f"< {figure(verdict.missed_per_s / devices)}"


def _reasons(verdicts: Sequence[Verdict], best: int) -> str:
    """Why the best ones serve no more, and why the others lost: a line for each reason."""
    lines: list[str] = []
    for title, group in (
        ("Why no more:" if verdicts[0].goodput_per_s else "Why not:", verdicts[:best]),
        ("Why the others lost:", verdicts[best:]),
    ):
        by_reason: dict[str, list[Layout]] = {}
        for verdict in group:
            by_reason.setdefault(verdict.why, []).append(verdict.layout)
        told = [f"  {_together(alike)}: {why}" for why, alike in by_reason.items()]
        if len(told) > _SHOWN_ROWS:
            told[_SHOWN_ROWS:] = [f"  and {len(told) - _SHOWN_ROWS} more reasons; --json has all"]
        lines += [title, *told, ""] if told else []
    return "\n".join(lines)


def _together(alike: Sequence[Layout]) -> str:
    """Layouts in words; those that differ in nothing but the chunk as one.

    >>> _together([Layout(both=2, chunk=512), Layout(both=2, chunk=2048)])
    '2 both of tp 1, chunk 512 or 2048'
    """
    chunks: dict[Layout, list[int]] = {}
    for layout in alike:
        chunks.setdefault(dataclasses.replace(layout, chunk=0), []).append(layout.chunk)
    return "; ".join(
        f"{layout.groups}, chunk {' or '.join(map(str, sorted(each)))}"
        for layout, each in chunks.items()
    )


def _sentence(verdicts: Sequence[Verdict], best: int, search: Search) -> str:
    simulated = sum(map(_is_tried, verdicts))
    count = f"{len(verdicts)} layout{'s' if len(verdicts) > 1 else ''}"
    first = verdicts[0]
    if not first.goodput_per_s:
        return f"none of {count} serves enough requests well"
    return (
        f"{count}, {simulated} simulated; the others cannot exceed the best "
        f"{best}. Times are 90th percentiles at that rate. The best, for the file's cluster:\n\n"
        f"{search.text(first.layout)}"
    )
