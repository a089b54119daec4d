"""Errors as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagec.diagnostics import Diagnostic, Source, combined, did_you_mean, there_are

TEXT = "cluster c {\n  instance d0 tp 3 on gpu0..gpu2\n}\n"


def test_an_error_shows_its_line_a_caret_and_the_remedy() -> None:
    at = TEXT.index("3")
    message = "8 KV heads do not split over tensor_parallel=3"
    error = Source("serve.sage", TEXT).error(at, at + 1, message, "what does: 1, 2, 4, 8")
    assert str(error) == (
        "serve.sage:2:18: error: 8 KV heads do not split over tensor_parallel=3\n"
        "    2 |   instance d0 tp 3 on gpu0..gpu2\n"
        "      |                  ^ what does: 1, 2, 4, 8"
    )


def test_an_error_fits_on_one_line_for_logs() -> None:
    error = Source("a.sage", TEXT).error(0, 7, "no", "yes")
    assert error.line() == "a.sage:1:1: error: no; yes"


def test_an_error_without_a_place_says_what_it_knows() -> None:
    assert str(Diagnostic("no strategy 'slo'")) == "error: no strategy 'slo'"
    assert str(Diagnostic("broken", source="a.mlir", hint="mend it")) == (
        "a.mlir: error: broken; mend it"
    )
    assert str(Diagnostic("broken", source="a.mlir", line=3)) == "a.mlir:3: error: broken"


def test_a_long_name_is_underlined_to_its_end_and_no_further_than_the_line() -> None:
    source = Source("a", "one two\nthree")
    assert str(source.error(4, 7, "m")).endswith("|     ^~~")
    assert str(source.error(4, 12, "m")).endswith("|     ^~~")


def test_errors_of_one_text_print_in_its_order() -> None:
    source = Source("a", "x\ny\nz")
    error = combined([source.error(4, 5, "third"), source.error(0, 1, "first")])
    assert error.message == "first"
    assert [line for line in str(error).split("\n") if "error" in line] == [
        "a:1:1: error: first",
        "a:3:1: error: third",
    ]


def test_tabs_and_wide_characters_keep_the_caret_below_its_place() -> None:
    assert str(Source("a", "\tmodel x").error(7, 8, "m")).endswith("      | \t      ^")
    assert str(Source("a", "日本 x").error(3, 4, "m")).endswith("      |      ^")


def test_of_a_very_long_line_the_part_around_the_caret_is_shown() -> None:
    text = "a" * 5000 + "B" + "c" * 5000
    lines = str(Source("a", text).error(5000, 5001, "m")).split("\n")
    assert max(map(len, lines)) < 140
    assert lines[1][lines[2].index("^")] == "B"


def test_what_cannot_be_printed_is_replaced() -> None:
    error = Source("a", "x \x1b[31m").error(0, 1, "two\nlines")
    assert str(error).split("\n")[0] == r"a:1:1: error: two\nlines"
    assert "\x1b" not in str(error)


@given(st.text(max_size=200), st.integers(0, 220), st.integers(0, 20))
def test_any_place_in_any_text_can_be_shown(text: str, begin: int, length: int) -> None:
    error = Source("a", text).error(begin, begin + length, "message", "hint")
    head, shown, caret = str(error).split("\n")
    assert head.startswith("a:")
    assert shown[5:7] == " |"
    assert "^" in caret and caret.endswith(" hint")


@given(st.text(alphabet="ab\n", max_size=50), st.data())
def test_line_and_column_lead_back_to_the_offset(text: str, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, len(text)))
    line, column = Source("a", text).position(offset)
    lines = text.split("\n")
    assert sum(len(before) + 1 for before in lines[: line - 1]) + column - 1 == offset


@pytest.mark.parametrize(
    ("word", "close"),
    [("slo", "slo-aware"), ("FIFO", "fifo"), ("fifp", "fifo"), ("zzz", None), ("", None)],
)
def test_the_nearest_known_word_is_suggested(word: str, close: str | None) -> None:
    assert did_you_mean(word, ["fifo", "slo-aware", "priority"]) == close


def test_known_words_are_listed_with_the_suggestion_first() -> None:
    known = ["slo-aware", "fifo"]
    assert there_are("slo", known) == "did you mean 'slo-aware'? (there are: fifo, slo-aware)"
    assert there_are("x", known) == "there are: fifo, slo-aware"
    assert there_are("x", []) == "there are none"
