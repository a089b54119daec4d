"""`sagec search`: layouts of a file's cluster, the best of them, and why the others lost."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from sagec.cli import serving, writing
from sagec.cli.failure import InputError
from sagec.language.resolution import resolve
from sagec.runtime.request import Request
from sagec.search import Search, SearchError, Target, Verdict, layouts

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
        writing.console(width=100).print(_table(verdicts))
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
        "bound_per_s": round(verdict.bound_per_s, 6),
        "ttft_p90_ms": verdict.ttft_p90_ms,
        "tpot_p90_ms": verdict.tpot_p90_ms,
        "why": verdict.why,
    }


_SHOWN_ROWS = 24
"""Of more layouts than these the table leaves the rest out; `--json` has all."""

COLUMNS = ("layout", "good /s", "bound /s", "TTFT ms", "TPOT ms", "why not more")


def _table(verdicts: Sequence[Verdict]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for title in COLUMNS:
        justify: Any = "left" if title in (COLUMNS[0], COLUMNS[-1]) else "right"
        shown.add_column(title, justify=justify, no_wrap=title != COLUMNS[-1])
    for verdict in verdicts[:_SHOWN_ROWS]:
        reached = verdict.goodput_per_s
        figures = [
            "-" if value is None else f"{value:.4g}"
            for value in (
                reached,
                verdict.bound_per_s,
                verdict.ttft_p90_ms,
                verdict.tpot_p90_ms,
            )
        ]
        shown.add_row(*map(Text, [str(verdict.layout), *figures, verdict.why]))
    if len(verdicts) > _SHOWN_ROWS:
        shown.add_row(Text(f"and {len(verdicts) - _SHOWN_ROWS} more"))
    return shown


def _sentence(verdicts: Sequence[Verdict], best: int, search: Search) -> str:
    simulated = sum(verdict.goodput_per_s is not None for verdict in verdicts)
    first = verdicts[0]
    if not first.goodput_per_s:
        return f"none of {len(verdicts)} layouts serves enough requests well; see why"
    return (
        f"{len(verdicts)} layouts, {simulated} simulated; the others cannot exceed the best "
        f"{best}. Times are 90th percentiles at that rate. The best, for the file's cluster:\n\n"
        f"{search.text(first.layout)}"
    )
