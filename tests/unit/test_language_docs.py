"""docs/language.md says of each setting what the compiler takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sagec import language
from sagec.language import settings
from sagec.language.settings import Kind, Setting, Table

PAGE = Path(__file__).parents[2] / "docs/language.md"
TABLES = {
    "a model": settings.MODEL,
    "a device": settings.DEVICE,
    "a link": settings.LINK,
    "an instance": settings.INSTANCE,
    "serve": settings.SERVE,
    "a request": settings.REQUEST,
    "a replay": settings.REPLAY,
}


def takes(setting: Setting) -> str:
    """What a setting takes, in the words of the page."""
    if setting.kind is Kind.CHOICE:
        return ", ".join(f"`{choice}`" for choice in setting.choices)
    if setting.kind in (Kind.COUNT, Kind.REAL):
        return f"{setting.kind.called}, {settings.range_of(setting)}"
    return setting.kind.called


def documented(table: Table) -> str:
    """The table of the page for these settings."""
    rows = [f"| `{s.name}` | {takes(s)} | {s.doc} |" for s in table.values()]
    return "\n".join(["| setting | takes | |", "|---|---|---|", *rows])


@pytest.mark.parametrize("whose", TABLES)
def test_the_page_has_every_setting_of(whose: str) -> None:
    page = PAGE.read_text("utf-8")
    block = re.search(rf"<!-- settings of {whose} -->\n(.*?)\n?<!-- end -->", page, re.DOTALL)
    assert block is not None
    assert block[1].strip() == documented(TABLES[whose])


@pytest.mark.parametrize(
    "program",
    re.findall(r"^```sage\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL),
)
def test_a_program_of_the_page_parses_and_is_canonical(program: str) -> None:
    assert language.format(program) == program
