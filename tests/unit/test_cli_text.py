"""Tokens become text while they come, and text becomes lines or panels."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagec.cli.failure import InputError
from sagec.cli.stream import Lines, Panels, Silent, stream_for
from sagec.cli.text import UNFINISHED, Numbers, Transcript, decoder_of

TINY = Path(__file__).parent.parent.parent / "examples" / "models" / "tiny"


class Bytes:
    """A tokenizer whose tokens are bytes; half a character is UNFINISHED."""

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")

    def prompt(self, tokens: list[int]) -> str:
        return self.decode(tokens)


def streamed(text: str, stops: tuple[str, ...] = ()) -> tuple[list[str], str]:
    """What each token adds, the end's rest included, and the whole text."""
    transcript = Transcript(Bytes(), stops)  # type: ignore[arg-type]
    pieces = [transcript.push(token) for token in text.encode()]
    pieces.append(transcript.end())
    assert "".join(pieces) == transcript.text
    return pieces, transcript.text


@given(st.text(max_size=40))
def test_the_pieces_of_a_text_are_the_text(text: str) -> None:
    pieces, whole = streamed(text)
    assert whole == text
    assert all(UNFINISHED not in piece for piece in pieces) or UNFINISHED in text


@given(st.text("ab\n é", max_size=40), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_nothing_of_a_stop_string_or_behind_it_is_shown(text: str, stops: list[str]) -> None:
    _, whole = streamed(text, tuple(stops))
    for end in range(len(text) + 1):
        if begins := [text[:end].find(stop) for stop in stops if stop in text[:end]]:
            assert whole == text[: min(begins)]
            return
    assert whole == text


def test_a_character_of_several_tokens_is_shown_when_it_is_whole() -> None:
    pieces, _ = streamed("é!")
    assert pieces == ["", "é", "!", ""]


def test_what_may_become_a_stop_string_is_held_back() -> None:
    pieces, _ = streamed("an end", ("endless",))
    assert pieces == ["a", "n", " ", "", "", "", "end"]


def test_tokens_of_a_model_without_a_tokenizer_are_numbers(tmp_path: Path) -> None:
    for path in ("", str(tmp_path)):
        decoder = decoder_of(path)
        assert isinstance(decoder, Numbers)
        assert decoder.decode([7, 12]) == " 7 12"
        assert decoder.prompt([7, 12]) == ""


def test_the_small_model_speaks_words() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    ids = (
        tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json")).encode("Once upon a time").ids
    )
    decoder = decoder_of(str(TINY))
    transcript = Transcript(decoder)
    assert "".join([*map(transcript.push, ids), transcript.end()]) == "Once upon a time"
    assert decoder.prompt(ids) == "Once upon a time"
    assert decoder.prompt(ids * 30).startswith("... ")


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: no tokenizer"):
        decoder_of(str(tmp_path))


def test_lines_begin_with_the_request_and_break_at_spaces(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Lines({"a": "say", "long-id": ""}) as lines:
        lines.text("a", "one\ntw")
        lines.text("long-id", "x" * 90 + " yy")
        lines.text("a", "o")
        lines.end("a", "stop")
    assert capsys.readouterr().out.splitlines() == [
        "a       > say",
        "a       | one",
        "a       | two  [stop]",
        "long-id | " + "x" * 90 + " yy",
    ]


def test_a_long_line_is_broken_at_the_first_space_behind_its_width(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Lines({"a": ""}) as lines:
        lines.text("a", f"{'word ' * 21}end")
        lines.end("a", "length")
    first, second = capsys.readouterr().out.splitlines()
    assert first == "a | " + " ".join(["word"] * 21)
    assert second == "a | end  [length]"


def test_panels_show_every_request_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from sagec.cli import writing

    out = io.StringIO()
    drawn = Console(file=out, width=60, height=12, force_terminal=True, color_system=None)
    monkeypatch.setattr(writing, "console", lambda **_: drawn)
    with Panels({f"r{i}": "ask: " for i in range(9)}) as panels:
        for i in range(9):
            panels.text(f"r{i}", f"answer {i}")
        panels.end("r0", "stop")
    final = out.getvalue()
    assert all(f"ask: answer {i}" in final for i in range(9))
    assert "stop" in final


def test_a_long_table_is_cut_and_says_so() -> None:
    from sagec.cli import figures
    from sagec.runtime.report import RequestReport, Summary
    from sagec.runtime.request import FinishReason
    from sagec.runtime.timeline import Timeline

    reports = [
        RequestReport(
            request_id=f"r{i}",
            reason=FinishReason.REJECTED,
            prompt_tokens=1,
            output_tokens=0,
            arrival_us=0,
            end_us=0,
        )
        for i in range(100)
    ]
    summary = Summary.of(reports)
    table = figures.table(summary, Timeline())
    assert table.row_count == figures.SHOWN_ROWS + 1
    assert len(figures.rows(summary, Timeline())) == 100
    assert figures.total(summary)["ttft_p50_ms"] is None
    assert "100 requests in 0 ms" in figures.sentence(summary)


def test_a_pipe_gets_lines_and_a_program_nothing() -> None:
    assert isinstance(stream_for({"a": ""}, silent=False), Lines)
    assert isinstance(stream_for({"a": ""}, silent=True), Silent)
