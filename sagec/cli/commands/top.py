"""show live what `sagec run --metrics` serves: requests, times, instances

Reads the metrics page again and again until it is gone or Ctrl-C.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sagec.cli.commands.run import positive

if TYPE_CHECKING:
    from rich.console import Console, Group

DEFAULT_URL = "http://127.0.0.1:9090/metrics"

EPILOG = """examples:
  sagec run examples/chat.sage --metrics 9090 &
  sagec top
  sagec top http://127.0.0.1:9090/metrics --once
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """URL, how often, or just once."""
    parser.add_argument(
        "url", metavar="URL", nargs="?", default=DEFAULT_URL, help=f"default: {DEFAULT_URL}"
    )
    parser.add_argument(
        "--every", metavar="MS", type=positive, default=1000, help="milliseconds between two looks"
    )
    parser.add_argument("--once", action="store_true", help="look once, print, and stop")


def run(args: argparse.Namespace) -> int:
    """Look until the page is gone. Raises InputError where it never was there."""
    import time

    from sagec.cli import dashboard, writing
    from sagec.cli.failure import InputError

    page = dashboard.read(args.url, time.monotonic())
    console = writing.console(width=120)
    if args.once:
        console.print(dashboard.view(page, None))
        return 0
    with _shown(console) as show:
        show(dashboard.view(page, None))
        while True:
            time.sleep(args.every / 1000)
            try:
                newer = dashboard.read(args.url, time.monotonic())
            except InputError:
                print(f"{args.url}: nobody answers any more")
                return 0
            show(dashboard.view(newer, page))
            page = newer


@contextmanager
def _shown(console: Console) -> Iterator[Callable[[Group], None]]:
    """Shows one thing after another: in its place on a terminal, else below."""
    from rich.live import Live

    if not console.is_terminal:
        yield console.print
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda view: live.update(view, refresh=True)
