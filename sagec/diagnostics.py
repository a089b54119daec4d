"""What a person reads when a text is wrong: the place, the line with a caret, and the remedy.

serve.sage:12:18: error: 8 KV heads do not split over tensor_parallel=3
   12 |   instance d0 tp 3 on gpu0..gpu2
      |                  ^ what does: 1, 2, 4, 8
"""

from __future__ import annotations

import bisect
import difflib
import functools
import unicodedata
from collections.abc import Iterable, Sequence

SHOWN_CHARACTERS = 120
"""Of a longer source line only the part around the caret is shown."""

ELLIPSIS = "..."


class Diagnostic(Exception):
    """Something wrong in a text that a person wrote.

    message: what, with the value. hint: what would be right. source: the name of the file. line
    and column count from 1, in characters; length is how many characters are meant. text: the
    source line. others: further errors of the same text, in its order, which print after this one.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        source: str = "",
        line: int | None = None,
        column: int | None = None,
        length: int = 1,
        text: str | None = None,
        others: Sequence[Diagnostic] = (),
    ) -> None:
        self.message = _on_one_line(message)
        self.hint = _on_one_line(hint)
        self.source = source
        self.line_number = line
        self.column = column
        self.length = max(length, 1)
        self.text = text
        self.others = tuple(others)
        super().__init__(message)

    @property
    def place(self) -> str:
        """`file:line:column`, as much of it as is known."""
        return ":".join(str(part) for part in (self.source, self.line_number, self.column) if part)

    def line(self) -> str:
        """This error alone, without the others, on one line."""
        hint = f"; {self.hint}" if self.hint else ""
        head = f"{self.place}: " if self.place else ""
        return f"{head}error: {self.message}{hint}"

    def __str__(self) -> str:
        return "\n".join([self._rendered(), *(error._rendered() for error in self.others)])

    def _rendered(self) -> str:
        if self.text is None or self.line_number is None or self.column is None:
            return self.line()
        shown, before = _window(self.text, self.column - 1)
        pad = "".join(c if c == "\t" else " " * _cells(c) for c in shown[:before])
        marked = sum(map(_cells, shown[before : before + self.length])) or 1
        hint = f" {self.hint}" if self.hint else ""
        return (
            f"{self.place}: error: {self.message}\n"
            f"{self.line_number:>5} | {shown}\n"
            f"      | {pad}^{'~' * (marked - 1)}{hint}"
        )


def _on_one_line(text: str) -> str:
    """The text with whatever cannot be printed spelled as an escape."""
    if text.isprintable():
        return text
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(escaped)


def _window(text: str, index: int) -> tuple[str, int]:
    """The part of a source line to show, printable, and where `index` is in it."""
    clean = "".join(
        c if c.isprintable() or c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    if len(clean) <= SHOWN_CHARACTERS:
        return clean.rstrip(), index
    begin = max(0, min(index - SHOWN_CHARACTERS // 2, len(clean) - SHOWN_CHARACTERS))
    end = begin + SHOWN_CHARACTERS
    head, tail = ELLIPSIS if begin else "", ELLIPSIS if end < len(clean) else ""
    return f"{head}{clean[begin:end]}{tail}".rstrip(), index - begin + len(head)


def _cells(character: str) -> int:
    """Columns of a terminal that a character takes."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


class Source:
    """A text with a name, which knows the line and column of every offset in it."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text

    @functools.cached_property
    def _line_begins(self) -> list[int]:
        begins = [0]
        at = self.text.find("\n")
        while at >= 0:
            begins.append(at + 1)
            at = self.text.find("\n", at + 1)
        return begins

    def position(self, offset: int) -> tuple[int, int]:
        """Line and column, from 1, of an offset in the text.

        >>> Source("a", "one\\ntwo").position(5)
        (2, 2)
        """
        line = bisect.bisect_right(self._line_begins, offset)
        return line, offset - self._line_begins[line - 1] + 1

    def line_text(self, line: int) -> str:
        """The text of a line, which counts from 1, without its end."""
        begin = self._line_begins[line - 1]
        end = self.text.find("\n", begin)
        return self.text[begin : len(self.text) if end < 0 else end].rstrip("\r")

    def error(self, begin: int, end: int, message: str, hint: str = "") -> Diagnostic:
        """The error that points at the characters [begin, end) of this text."""
        line, column = self.position(min(begin, len(self.text)))
        text = self.line_text(line)
        return Diagnostic(
            message,
            hint=hint,
            source=self.name,
            line=line,
            column=column,
            length=min(end - begin, len(text) - column + 1),
            text=text,
        )


def combined(errors: Iterable[Diagnostic]) -> Diagnostic:
    """One error that stands for all of these (at least one), in the order of the text."""
    first, *rest = sorted(errors, key=lambda e: (e.source, e.line_number or 0, e.column or 0))
    first.others = tuple(rest)
    return first


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` is most like, if there is one.

    >>> did_you_mean("slo-awre", ["fifo", "slo-aware"])
    'slo-aware'
    """
    sought = word.casefold()[:100]
    folded = {name.casefold(): name for name in reversed(list(known))}
    longer = [name for name in folded if len(sought) > 1 and name.startswith(sought)]
    close = longer[:1] or difflib.get_close_matches(sought, folded, n=1)
    return folded[close[0]] if close else None


_LISTED = 24
"""Names that a hint lists at most."""


def there_are(word: str, known: Iterable[str]) -> str:
    """The hint where `word` is none of the known ones.

    >>> there_are("slo", ["fifo", "slo-aware"])
    "did you mean 'slo-aware'? (there are: fifo, slo-aware)"
    >>> there_are("x", [])
    'there are none'
    """
    names = sorted(set(known))
    if not names:
        return "there are none"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    listed = f"there are: {', '.join(names[:_LISTED])}{more}"
    close = did_you_mean(word, names)
    return f"did you mean {close!r}? ({listed})" if close else listed
