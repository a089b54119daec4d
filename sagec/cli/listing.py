"""Lists and tables: things of a kind with their options, and rows below titles."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

from sagec.cli.writing import console, print_json

Listing = dict[str, list[dict[str, Any]]]
"""By kind: name and a line each, and perhaps options, the passes or a reason."""


def summary_of(kind: Any) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split())


def show(there: Listing, as_json: bool) -> None:
    """Print a listing, for people or for programs."""
    if as_json:
        print_json(there)
        return
    out = console()
    for title, entries in there.items():
        out.print(f"[bold]{title}[/bold]")
        for entry in entries:
            out.print(f"  [cyan]{entry['name']}[/cyan]")
            if "passes" in entry:
                out.print(f"      {entry['passes']}", markup=False)
            out.print(f"      {entry.get('summary') or entry.get('reason')}", markup=False)
            for option in entry.get("options", ()):
                default = "required" if option["default"] is None else option["default"]
                out.print(f"      {option['name']}: {option['type']} = {default}", markup=False)


def table_of(
    titles: Sequence[str], rows: Iterable[Sequence[object]], words: Collection[str]
) -> Table:
    """A table for people, numbers to the right; `words` are titles of columns that hold none.

    None stands as a dash.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for title in titles:
        table.add_column(title, justify="left" if title in words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text("-" if cell is None else str(cell)) for cell in row))
    return table
