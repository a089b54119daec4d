"""Stop strings: does the text of an output contain one yet?"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

UNFINISHED = "\ufffd"
"""What a tokenizer writes for bytes that are no character, perhaps only not yet."""


class TokenizerFile:
    """tokenizer.json of a model, read when the first request needs it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "tokenizer.json"

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer. Raises ValueError, with the reason, where it cannot be read."""
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError("stop strings need tokenizers: pip install 'sagec[torch]'") from None
        if not self._path.exists():
            raise ValueError(f"stop strings need {self._path}, which is not there")
        try:
            return Tokenizer.from_file(str(self._path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{self._path}: no tokenizer ({error}); fetch it again") from None


class StopStrings:
    """Follows one output token by token, decoding only its end."""

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._strings = tuple(strings)
        self._kept = max(map(len, strings)) - 1
        self._text = ""  # the last characters before the tokens below
        self._tokens: list[int] = []
        self._read = 0  # how many of the tokens are in the text already, and only context now

    def push(self, token: int) -> bool:
        """Add a token; true when the text contains a stop string."""
        self._tokens.append(token)
        known = self._decode(self._tokens[: self._read])
        text = self._text + self._decode(self._tokens)[len(known) :]
        whole = text.rstrip(UNFINISHED)
        if any(string in whole for string in self._strings):
            return True
        if whole == text:
            self._text = text[-self._kept :] if self._kept else ""
            del self._tokens[: self._read]
            self._read = len(self._tokens)
        return False

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return text
