"""Charts: well-formed SVG with everything in its frame."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagec import charts
from sagec.charts import bar_chart, line_chart

SVG = "{http://www.w3.org/2000/svg}"
NUMBERS = st.floats(-1e9, 1e9) | st.integers(0, 5)
NAMES = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\ufffe\uffff"), max_size=30
)


def texts(svg: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def dots(svg: str) -> list[tuple[float, float]]:
    circles = ElementTree.fromstring(svg).iter(f"{SVG}circle")
    return [(float(circle.attrib["cx"]), float(circle.attrib["cy"])) for circle in circles]


def test_a_line_goes_from_low_left_to_high_right_as_its_points_do() -> None:
    svg = line_chart({"lru": [(3, 30), (1, 10), (2, 20)]}, "Hits", "blocks", "hits (%)")
    (x0, y0), (x1, y1), (x2, y2) = dots(svg)
    assert x0 < x1 < x2
    assert y0 > y1 > y2
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert {"Hits", "blocks", "hits (%)", "lru", "0", "10", "30"} <= set(texts(svg))


def test_powers_of_ten_lie_evenly_on_a_logarithmic_axis() -> None:
    svg = line_chart({"lru": [(1e3, 1), (1e4, 1), (1e5, 1)]}, "", "", "", log_x=True)
    (x0, _), (x1, _), (x2, _) = dots(svg)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert {"1k", "3k", "10k", "100k"} <= set(texts(svg))


def test_bars_stand_on_nothing_and_are_as_high_as_their_values() -> None:
    svg = bar_chart({"a": {"x": 1.0, "y": 2.0}, "b": {"y": 4.0}}, "t", "groups", "us")
    rects = list(ElementTree.fromstring(svg).iter(f"{SVG}rect"))
    heights = [float(rect.attrib["height"]) for rect in rects]
    feet = {round(float(r.attrib["y"]) + float(r.attrib["height"])) for r in rects}
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    assert heights[2] == pytest.approx(4 * heights[0], abs=0.3)
    assert len(feet) == 1
    assert {"x", "y", "a", "b", "groups", "us"} <= set(texts(svg))


def test_what_has_a_meaning_in_svg_is_text_in_a_name() -> None:
    for svg in (
        line_chart({"<a & b>": [(0, 0)]}, "<t>", '"x"', "y&"),
        bar_chart({"<a & b>": {"<g>": 1.0}}, "<t>", '"x"', "y&"),
    ):
        assert {"<t>", '"x"', "y&", "<a & b>"} <= set(texts(svg))


@given(
    series=st.dictionaries(
        NAMES, st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=4), min_size=1, max_size=9
    )
)
def test_every_point_is_in_the_frame(series: dict[str, list[tuple[float, float]]]) -> None:
    found = dots(line_chart(series, "t", "x", "y"))
    assert len(found) == sum(map(len, series.values()))
    assert all(0 <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT for x, y in found)


@given(
    series=st.dictionaries(
        NAMES, st.dictionaries(NAMES, NUMBERS, min_size=1, max_size=4), min_size=1, max_size=4
    )
)
def test_every_bar_is_in_the_frame(series: dict[str, dict[str, float]]) -> None:
    svg = bar_chart(series, "t", "x", "y")
    rects = [rect.attrib for rect in ElementTree.fromstring(svg).iter(f"{SVG}rect")]
    assert len(rects) == sum(map(len, series.values()))
    for rect in rects:
        assert float(rect["height"]) >= 0
        assert 0 <= float(rect["x"]) <= float(rect["x"]) + float(rect["width"]) <= charts.WIDTH
        assert 0 <= float(rect["y"]) <= float(rect["y"]) + float(rect["height"]) <= charts.HEIGHT


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: line_chart({}, "", "", ""), "a chart of nothing"),
        (lambda: line_chart({"a": []}, "", "", ""), "a chart of nothing"),
        (lambda: bar_chart({"a": {}}, "", "", ""), "a chart of nothing"),
        (lambda: line_chart({"a": [(0, float("nan"))]}, "", "", ""), r"point \(0, nan\)"),
        (lambda: line_chart({"a": [(0, 1)]}, "", "", "", log_x=True), "x more than 0"),
    ],
)
def test_what_cannot_be_drawn_is_named(wrong: object, message: str) -> None:
    assert callable(wrong)
    with pytest.raises(ValueError, match=message):
        wrong()
