"""docs/language.md says of each setting what the compiler takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sagec import language
from sagec.language import settings
from sagec.language.checking import FUNCTIONS, PLACES
from sagec.language.settings import Kind, Setting, Table
from sagec.runtime.expressions.units import Unit, result
from sagec.runtime.expressions.values import (
    AdmissionValues,
    PlacingValues,
    RequestValues,
    RunningValues,
    VictimValues,
    WaitingValues,
    names_of,
)

PAGE = Path(__file__).parents[2] / "docs/language.md"
TABLES = {
    "a model": settings.MODEL,
    "a device": settings.DEVICE,
    "a link": settings.LINK,
    "an instance": settings.INSTANCE,
    "serve": settings.SERVE,
    "a request": settings.REQUEST,
    "a replay": settings.REPLAY,
    "a strategy": settings.STRATEGY,
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


def listed(title: str) -> str:
    """The table of the page between `<!-- title -->` and `<!-- end -->`."""
    page = PAGE.read_text("utf-8")
    block = re.search(rf"<!-- {title} -->\n(.*?)\n?<!-- end -->", page, re.DOTALL)
    assert block is not None, title
    return block[1].strip()


WHOSE = {RequestValues: "a request"} | {
    place: PLACES[place] for place in (WaitingValues, PlacingValues, RunningValues)
}


@pytest.mark.parametrize("place", WHOSE)
def test_the_page_has_every_value_of_a_place(place: type) -> None:
    assert listed(f"values of {WHOSE[place]}") == values_of(place)


def values_of(place: type) -> str:
    """The table of the page for a place, without what every request has."""
    shared = () if place is RequestValues else names_of(RequestValues)
    rows = [
        f"| `{name}` | {value.unit.called} | {value.summary} |"
        for name, value in names_of(place).items()
        if name not in shared
    ]
    return "\n".join(["| value | unit | |", "|---|---|---|", *rows])


@pytest.mark.parametrize(
    ("place", "beside"), [(AdmissionValues, WaitingValues), (VictimValues, RunningValues)]
)
def test_conditions_one_after_the_other_have_the_values_of_their_rows(
    place: type, beside: type
) -> None:
    units = [{name: v.unit for name, v in names_of(kind).items()} for kind in (place, beside)]
    assert units[0] == units[1]


def test_the_page_has_every_function() -> None:
    rows = [f"| `{name}` | {gives} |" for name, gives in FUNCTIONS.items()]
    assert listed("functions") == "\n".join(["| function | gives |", "|---|---|", *rows])


def test_the_page_has_every_unit_and_what_goes_with_it() -> None:
    rows = [
        f"| {unit.called} | `{unit.example}` | {goes('+', unit)} | {goes('-', unit)} "
        f"| {'yes' if result('<', unit, unit) else 'only `==` and `!=`'} |"
        for unit in Unit
    ]
    head = ["| unit | as in | `+` | `-` | compares |", "|---|---|---|---|---|"]
    assert listed("units") == "\n".join([*head, *rows])


def goes(operator: str, unit: Unit) -> str:
    """What a unit may be added to, or have subtracted from it."""
    return ", ".join(o.called for o in Unit if result(operator, unit, o) is not None) or "nothing"


@pytest.mark.parametrize(
    "program",
    re.findall(r"^```sage\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL),
)
def test_a_program_of_the_page_parses_and_is_canonical(program: str) -> None:
    assert language.format(program) == program
