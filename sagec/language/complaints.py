"""What to say where the text does not follow the grammar."""

from __future__ import annotations

import re
from typing import Any

from sagec.diagnostics import Diagnostic, Source, did_you_mean
from sagec.language.text import STRING, TOKEN

_SPOKEN = {
    "NAME": "a name",
    "NUMBER": "a number",
    "STRING": "a text in quotes",
    "OPEN": "'{'",
    "CLOSE": "'}'",
    "VALUE": "a value",
    "QUANTITY": "a number",
    "_LEFT": "'('",
    "_RIGHT": "')'",
    "PLUS": "an operator",
    "COMPARISON": "a comparison",
    "_TO": "to",
    "_FROM": "from",
    "_RANGE": "..",
    "_COMMA": "','",
}
_KEYWORDS = (
    "MODEL",
    "CLUSTER",
    "STRATEGY",
    "DEVICE",
    "SWITCH",
    "LINK",
    "INSTANCE",
    "SERVE",
    "REQUEST",
    "REPLAY",
    "ON",
    "ORDER",
    "ADMIT",
    "REJECT",
    "PLACE",
    "PREFILL",
    "DECODE",
    "PREEMPT",
    "MODE",
    "CHUNK",
    "HORIZON",
    "BY",
    "WHILE",
    "WHEN",
    "AND",
    "OR",
    "NOT",
    "DESC",
    "MIN",
    "MAX",
    "LATEST",
    "OLDEST",
)

_SPELLED = {"=": "==", "&": "and", "|": "or", "!": "not"}
"""How expressions write what other languages write so."""

_SEPARATED = {
    "=": "settings are written without it: name value",
    ":": "settings are written without it: name value",
    ",": "settings stand one after the other, without commas",
}


def syntax_error(source: Source, error: Any) -> Diagnostic:
    """The diagnostic of lark's UnexpectedInput."""
    token = getattr(error, "token", None)
    if token is not None and token.type == "$END":
        return _too_short(source, _expected(error))
    begin = error.pos_in_stream if token is None else token.start_pos
    match = TOKEN.match(source.text, begin)
    found = match[0] if match else ""
    end = begin + len(found)
    if found == '"' and not re.compile(STRING).match(source.text, begin):
        line_end = source.text.find("\n", begin)
        end = len(source.text) if line_end < 0 else line_end
        hint = "a '\"' is missing; a new line in a text is \\n"
        return source.error(begin, end, "the text does not end on its line", hint)
    shown = found if found.isprintable() else f"U+{ord(found[0]):04X}"
    shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
    in_expression = not _names(error).isdisjoint(("COMPARISON", "QUANTITY"))
    spelled = _SPELLED.get(found) if in_expression else None
    hint = f"it is written: {spelled}" if spelled else _SEPARATED.get(found) or _hint(found, error)
    return source.error(begin, end, f"unexpected {_quoted(shown)}", hint)


def _quoted(found: str) -> str:
    return found if found.startswith('"') else f"'{found}'"


def _names(error: Any) -> set[str]:
    """The terminals that would have been right."""
    return set(getattr(error, "accepts", None) or getattr(error, "expected", None) or ()) | set(
        getattr(error, "allowed", None) or ()
    )


def _expected(error: Any) -> list[str]:
    names = _names(error)
    keywords = [name.lower() for name in _KEYWORDS if name in names]
    return [_SPOKEN[name] for name in _SPOKEN if name in names] + keywords


def _hint(found: str, error: Any) -> str:
    expected = _expected(error)
    listed = f"what does: {', '.join(expected)}" if expected else ""
    words = [name for name in expected if name.isalpha()]
    close = did_you_mean(found, words) if re.match(r"[A-Za-z]", found) else None
    return f"did you mean '{close}'? ({listed})" if close else listed


def _too_short(source: Source, expected: list[str]) -> Diagnostic:
    """The text ends in the middle of something: of a block, if one is open."""
    open_braces = []
    for match in TOKEN.finditer(source.text):
        if match.lastgroup == "mark" and match[0] == "{":
            open_braces.append(match.start())
        elif match.lastgroup == "mark" and match[0] == "}" and open_braces:
            open_braces.pop()
    if open_braces:
        begin = open_braces[-1]
        return source.error(begin, begin + 1, "'{' is not closed", "a '}' is missing")
    end = len(source.text.rstrip())
    hint = f"what does: {', '.join(expected)}" if expected else ""
    return source.error(end, end, "the file ends too early", hint)
