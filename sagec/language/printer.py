"""The canonical text of a program: a statement a line, two spaces a block, comments kept.

Only space, line ends and `;` change, so the meaning stays: words, numbers, strings and comments
are printed as they were written. The words of rules come from the parser, which knows what is a
sign, a call or a unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from sagec.language import syntax
from sagec.language.parser import said_in
from sagec.language.syntax import Program
from sagec.language.text import TOKEN

WIDTH = 100
INDENT = "  "
CONTINUED = "    "
"""Further indent of a statement's second and later lines."""


def print_program(program: Program) -> str:
    """The canonical text of a program."""
    tokens = _tokens(program)
    writer = _Writer(program, tokens)
    for token in tokens:
        writer.add(token)
    return writer.text()


class _Token(NamedTuple):
    """A token or comment; newlines: line ends between it and the one before.

    kind: as in text.TOKEN, or "glued" where no space stands before it. following: where the next
    token that is no comment begins; None at the end of the text.
    """

    kind: str
    text: str
    begin: int
    newlines: int
    following: int | None


def _tokens(program: Program) -> list[_Token]:
    """All tokens and comments but `;`, which says nothing that a line end does not."""
    found: list[_Token] = []
    newlines = 0
    for kind, begin, text in _scanned(program):
        if kind == "line":
            newlines += 1
        elif kind != "space" and text != ";":
            found.append(_Token(kind, text.rstrip(), begin, newlines, None))
            newlines = 0
    following: int | None = None
    for index in reversed(range(len(found))):
        found[index] = found[index]._replace(following=following)
        if found[index].kind != "comment":
            following = found[index].begin
    return found


def _scanned(program: Program) -> Iterator[tuple[str, int, str]]:
    """Everything that the text consists of: its kind, where it begins, how it is printed."""
    text, at = program.source.text, 0
    for piece in sorted(piece for each in program.strategies for piece in each.pieces):
        for match in TOKEN.finditer(text, at, piece.begin):
            yield str(match.lastgroup), match.start(), match[0]
        yield "glued" if piece.glued else "name", piece.begin, piece.text
        at = piece.end
    for match in TOKEN.finditer(text, at):
        yield str(match.lastgroup), match.start(), match[0]


class _Writer:
    """Collects a statement's pieces (what no line end may part) and writes them out in lines."""

    def __init__(self, program: Program, tokens: list[_Token]) -> None:
        words = [token for token in tokens if token.kind != "comment"]
        values, shapes = set(_value_begins(program)), set(_shape_values(program))
        self.keys = {token.begin for token in words if token.following in values}
        self.keys |= {p.begin for each in program.strategies for p in each.pieces if p.breaks}
        self.starts = set(_statement_begins(program))
        self.starts |= {token.begin for token in words if token.following in shapes}
        self.ends = {token.begin for token in words if token.text == "}"}
        self.lines: list[str] = []
        self.depth = 0
        self.pieces: list[str] = []
        self.continued = False  # the statement that goes on has a line already
        self.glued = False  # the next token follows without a space
        self.opened = True  # nothing stands in this block yet
        self.after_block = False

    def text(self) -> str:
        """All of it, once every token is added."""
        self.flush()
        return "".join(f"{line}\n" for line in self.lines)

    def add(self, token: _Token) -> None:
        """The next token of the text."""
        if token.kind == "comment":
            self.comment(token)
        elif token.begin in self.ends:
            self.close()
        elif token.kind == "mark" and token.text == "{":
            self.pieces.append("{")
            self.end_statement()
            self.depth += 1
            self.opened = True
        elif token.begin in self.starts:
            self.end_statement()
            self.blank_line(token)
            self.pieces.append(token.text)
        else:
            self.word(token)

    def close(self) -> None:
        """The end of a block."""
        self.end_statement()
        self.depth -= 1
        if self.lines[-1].endswith("{"):
            self.lines[-1] += "}"
        else:
            self.lines.append(f"{INDENT * self.depth}}}")
        self.opened = False
        self.after_block = self.depth == 0

    def word(self, token: _Token) -> None:
        """A token inside a statement."""
        if (token.text in (",", "..") or token.kind == "glued") and self.pieces:
            self.pieces[-1] += token.text
            self.glued = token.text == ".."
        elif self.glued and self.pieces:
            self.pieces[-1] += token.text
            self.glued = False
        elif token.begin in self.keys or not self.pieces:
            self.pieces.append(token.text)
        else:
            self.pieces[-1] += f" {token.text}"

    def comment(self, token: _Token) -> None:
        """A comment ends its line; where it stands alone it begins one, too."""
        inside = token.following is not None and token.following not in self.starts | self.ends
        if token.newlines == 0 and (self.pieces or self.lines):
            self.flush()
            self.lines[-1] += f"  {token.text}"
        elif inside and (self.pieces or self.continued):
            self.flush()
            self.lines.append(f"{INDENT * self.depth}{CONTINUED}{token.text}")
        else:
            self.end_statement()
            self.blank_line(token)
            self.lines.append(f"{INDENT * self.depth}{token.text}")

    def blank_line(self, token: _Token) -> None:
        """Keep one empty line of those in the text; blocks of the outermost level have one."""
        if (token.newlines > 1 or self.after_block) and not self.opened:
            self.lines.append("")
        self.opened = self.after_block = False

    def end_statement(self) -> None:
        self.flush()
        self.continued = False

    def flush(self) -> None:
        """Write the pieces out, in as many lines as they need."""
        indent = INDENT * self.depth
        line = ""
        for piece in self.pieces:
            margin = indent + (CONTINUED if self.continued else "")
            if line and len(line) + 1 + len(piece) > WIDTH and piece != "{":
                self.lines.append(line)
                line = f"{indent}{CONTINUED}{piece}"
            else:
                line = f"{line} {piece}" if line else f"{margin}{piece}"
            self.continued = True
        if line:
            self.lines.append(line)
        self.pieces = []
        self.glued = False


def _statement_begins(program: Program) -> Iterator[int]:
    yield from (model.begin for model in program.models)
    for strategy in program.strategies:
        yield strategy.begin
        yield from (piece.begin for piece in strategy.pieces if piece.starts)
    for cluster in program.clusters:
        yield cluster.begin
        parts = (cluster.devices, cluster.switches, cluster.links, cluster.instances)
        yield from (statement.begin for statements in parts for statement in statements)
    if program.serve is not None:
        yield program.serve.begin
        yield from (entry.begin for entry in program.serve.entries)


def _value_begins(program: Program) -> Iterator[int]:
    """Where the values of settings begin, before whose names a line may end."""
    groups: list[Iterable[syntax.Value | syntax.Word]] = []
    for cluster in program.clusters:
        groups += [device.settings.values() for device in cluster.devices]
        groups += [link.settings.values() for link in cluster.links]
        groups += [instance.settings.values() for instance in cluster.instances]
        groups += [instance.devices[:1] for instance in cluster.instances]
    if program.serve is not None:
        groups.append(program.serve.settings.values())
        for entry in program.serve.entries:
            if isinstance(entry, syntax.Request):
                said = said_in(program.source, entry)
                groups.append([value for name, value in said if name != "request"])
            else:
                groups.append(entry.settings.values())
    return (value.begin for group in groups for value in group)


def _shape_values(program: Program) -> Iterator[int]:
    """Where the values in blocks of models and strategies begin: such settings have a line each."""
    blocks = [statement.settings for statement in program.models]
    blocks += [statement.settings for statement in program.strategies]
    return (value.begin for settings in blocks for value in settings.values())
