"""Errors of one text, collected so that all that can be found are said at once."""

from __future__ import annotations

from sagec.diagnostics import Diagnostic, Source, combined
from sagec.language.syntax import Value, Word

MOST_ERRORS = 20
"""Of one text; more help nobody."""


class Errors:
    """What is wrong with a text so far."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.found: list[Diagnostic] = []

    def add(self, begin: int, end: int, message: str, hint: str = "") -> None:
        """Something is wrong with the characters [begin, end)."""
        self.found.append(self.source.error(begin, end, message, hint))

    def at(self, place: Word | Value, message: str, hint: str = "") -> None:
        """Something is wrong with a name or a value."""
        self.add(place.begin, place.end, message, hint)

    def stop_if_any(self) -> None:
        """Raise what is wrong so far, before anything that would only follow from it."""
        if self.found:
            raise combined(self.found[:MOST_ERRORS])
