"""Tokens to text while they come: only whole characters, and nothing that a stop string cuts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sagec.cli.failure import InputError

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for bytes that are no character yet."""


SHOWN_TOKENS = 48
"""Of a longer prompt only the end is shown."""


class Numbers:
    """Stands in for the tokenizer of a model that has none: a token is its number."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The numbers, with a space before each.

        >>> Numbers().decode([7, 12])
        ' 7 12'
        """
        return "".join(f" {token}" for token in tokens)

    def prompt(self, tokens: Sequence[int]) -> str:
        """Nothing: the tokens of such a prompt were made up."""
        return ""


class _Words:
    """A tokenizer file, whose special tokens are no text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def prompt(self, tokens: Sequence[int]) -> str:
        """The text of a prompt on one line; of a long one, its end."""
        text = " ".join(self.decode(tokens[-SHOWN_TOKENS:]).split())
        return text if len(tokens) <= SHOWN_TOKENS else f"... {text}"


Decoder = Numbers | _Words


def decoder_of(model_path: str) -> Decoder:
    """What makes text of a model's tokens: its tokenizer.json, or where there is none, numbers.

    Raises InputError where the file is no tokenizer.
    """
    path = Path(model_path, "tokenizer.json")
    if not model_path or not path.is_file():
        return Numbers()
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return Numbers()
    try:
        return _Words(Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises nothing more special
        raise InputError(f"{path}: no tokenizer ({error}); fetch it again") from None


class Transcript:
    """The text of one output: `push` gives what is new and certain of it."""

    def __init__(self, decoder: Decoder, stop_strings: Sequence[str] = ()) -> None:
        self._decoder, self._stops = decoder, tuple(stop_strings)
        self._tokens: list[int] = []
        self._read = 0  # of the tokens: in the text already, and kept as context of the next
        self._held = ""  # text that may turn out to be the beginning of a stop string
        self._ended = False
        self.text = ""

    def push(self, token: int) -> str:
        """Add a token; the text that it adds, often "" until a character is whole."""
        self._tokens.append(token)
        fresh = self._fresh()
        if fresh.endswith(UNFINISHED):
            return ""
        del self._tokens[: self._read]
        self._read = len(self._tokens)
        return self._release(fresh)

    def end(self) -> str:
        """The rest, when no more tokens come."""
        rest = self._release(self._fresh() if self._read < len(self._tokens) else "")
        rest += self._held
        self.text += self._held
        self._held, self._read = "", len(self._tokens)
        return rest

    def _fresh(self) -> str:
        known = self._decoder.decode(self._tokens[: self._read])
        return self._decoder.decode(self._tokens)[len(known) :]

    def _release(self, fresh: str) -> str:
        """What of the text so far no stop string can cut any more."""
        if self._ended:
            return ""
        whole = self._held + fresh
        cuts = [at for stop in self._stops if (at := whole.find(stop)) >= 0]
        if cuts:
            self._ended, certain = True, min(cuts)
        else:
            certain = len(whole) - max((_overlap(whole, stop) for stop in self._stops), default=0)
        self._held = "" if self._ended else whole[certain:]
        self.text += whole[:certain]
        return whole[:certain]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` may begin.

    >>> _overlap("the en", "end"), _overlap("the end", "end of")
    (2, 3)
    """
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
