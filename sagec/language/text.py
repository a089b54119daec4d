"""The smallest parts of a .sage text; sage.lark spells the same in lark's words."""

from __future__ import annotations

import re

GAP = r"(?:\s|//[^\n]*|#[^\n]*)"
STRING = r'"(?:[^"\\\n]|\\.)*+"'
NUMBER = r"[+-]?[0-9](?:[A-Za-z0-9_.%+-]|/(?=[A-Za-z]))*+"
NAME = r"[A-Za-z_][A-Za-z0-9_-]*+(?:\.[A-Za-z0-9_-]++)*+"

PAIR = re.compile(
    rf"{GAP}*+(?:(?P<key>{NAME})(?:{GAP}*+(?P<value>{STRING}|{NUMBER}|{NAME}))?"
    rf"|(?P<stray>{STRING}|{NUMBER}))"
)
"""A setting and its value, or a value without a setting."""

TOKEN = re.compile(
    rf"(?P<line>\n)|(?P<space>[^\S\n]+)|(?P<comment>//[^\n]*|#[^\n]*)|(?P<string>{STRING})"
    rf"|(?P<number>{NUMBER})|(?P<name>{NAME})|(?P<mark>\.\.|[<>=!]=|[{{}},;])|(?P<other>.)"
)
"""Anything at all; `other` is a character that no text may have there."""

_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|(.))")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}


class TextError(ValueError):
    """An escape that means nothing: at [offset, offset + length) of the literal."""

    def __init__(self, message: str, hint: str, offset: int, length: int) -> None:
        super().__init__(message)
        self.message, self.hint, self.offset, self.length = message, hint, offset, length


def unquoted(literal: str) -> str:
    """The text that a literal in quotes stands for. Raises TextError.

    >>> unquoted('"a\\\\n\\\\u00e9"')
    'a\\né'
    """
    if "\\" not in literal:
        return str(literal[1:-1])

    def character(match: re.Match[str]) -> str:
        code, letter = match[1], match[2]
        if code is not None and not 0xD800 <= int(code, 16) < 0xE000:
            return chr(int(code, 16))
        if letter in _ESCAPED:
            return _ESCAPED[letter]
        hint = r"what does: \n \t \r \" \\ and \u with four hexadecimal digits"
        raise TextError(f"{match[0]} is no character", hint, match.start() + 1, len(match[0]))

    return _ESCAPE.sub(character, literal[1:-1])
