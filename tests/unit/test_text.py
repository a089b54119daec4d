"""Stop strings, on a tokenizer whose tokens are the bytes."""

from pathlib import Path

import pytest

pytest.importorskip("torch")
tokenizers = pytest.importorskip("tokenizers")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from sagec.runtime.text import StopStrings, TokenizerFile  # noqa: E402
from tests.checkpoints import byte_tokenizer  # noqa: E402

TOKENIZER = byte_tokenizer()


def stops_after(text: str, *strings: str) -> int | None:
    """After how many bytes of `text` a stop string is seen."""
    stop = StopStrings(TOKENIZER, strings)
    for count, byte in enumerate(text.encode(), start=1):
        if stop.push(TOKENIZER.token_to_id(bytes_token(byte))):
            return count
    return None


def bytes_token(byte: int) -> str:
    return TOKENIZER.id_to_token(byte)


@given(text=st.text(max_size=40), stop=st.text(min_size=1, max_size=4))
def test_the_output_stops_at_the_byte_that_completes_the_string(text: str, stop: str):
    whole = text + stop
    expected = len(whole[: whole.index(stop)].encode()) + len(stop.encode())
    assert stops_after(whole, stop) == expected or "\ufffd" in whole


def test_the_first_of_several_strings_stops():
    assert stops_after("one two three", "three", "two") == len("one two")


def test_a_string_may_begin_in_one_token_and_end_in_another():
    assert stops_after("a\n\nUser: b", "\n\nUser:") == len("a\n\nUser:")


def test_half_a_character_is_no_text_yet():
    assert stops_after("€", "\ufffd") is None
    assert stops_after("a€b", "€") == len("a€".encode())


def test_text_without_the_string_never_stops():
    assert stops_after("x" * 500, "y") is None


def test_a_missing_tokenizer_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"stop strings need .*tokenizer\.json, which is not"):
        _ = TokenizerFile(tmp_path).tokenizer


def test_a_broken_tokenizer_is_named(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ValueError, match=r"tokenizer\.json: no tokenizer \(.*\); fetch it again"):
        _ = TokenizerFile(tmp_path).tokenizer
