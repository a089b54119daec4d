"""Recorded workloads: Azure's CSV and Mooncake's JSON lines."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from sagec.diagnostics import Diagnostic, Source, there_are

AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE = ("timestamp", "input_length", "output_length")

MOONCAKE_BLOCK_TOKENS = 512
"""Tokens that each of Mooncake's hash_ids stands for."""

MOST_TOKENS = 2**31 - 2


class Recorded(NamedTuple):
    """A request of a trace: when, relative to the first, and how long.

    blocks: ids of its leading blocks of MOONCAKE_BLOCK_TOKENS tokens; equal ids, equal tokens.
    """

    arrival_us: int
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


Parsed = tuple[int, int, int, tuple[int, ...]]


def read_trace(
    path: Path, limit: int | None = None, skipped: list[Diagnostic] | None = None
) -> list[Recorded]:
    """The requests of a trace, in order of arrival; at most `limit`.

    skipped: gets what is wrong with lines that do not parse, which are left out then.

    Raises Diagnostic, with the line of the trace, where `skipped` is None; OSError.
    """
    source = Source(str(path), path.read_bytes().decode("utf-8", "replace"))
    lines = ((n, line) for n, line in enumerate(source.text.split("\n"), 1) if line.strip())
    first = next(lines, None)
    if first is None:
        raise source.error(0, 0, "the trace is empty", f"as in: {','.join(AZURE)}")
    parse = _parse_mooncake if first[1].lstrip().startswith("{") else _parse_azure
    rows = [first] if parse is _parse_mooncake else []
    if parse is _parse_azure:
        _check_header(source, first)
    parsed = list(_read(source, parse, itertools.chain(rows, lines), limit, skipped))
    if not parsed:
        why = f": {what_was_skipped(skipped)}" if skipped else ""
        hint = "a line for each, after the header"
        raise source.error(0, 0, f"the trace has no requests{why}", hint)
    begin_us = min(row[0] for row in parsed)
    recorded = [Recorded(row[0] - begin_us, *row[1:]) for row in parsed]
    return sorted(recorded, key=lambda row: row.arrival_us)


def what_was_skipped(skipped: list[Diagnostic]) -> str:
    """How many lines were left out, one at least, and what is wrong with the first."""
    first, lines = skipped[0], "line" if len(skipped) == 1 else "lines"
    return f"{len(skipped)} {lines} skipped; the first: {first.place}: {first.message}"


def _read(
    source: Source,
    parse: Callable[[str], Parsed],
    lines: Iterable[tuple[int, str]],
    limit: int | None,
    skipped: list[Diagnostic] | None,
) -> Iterator[Parsed]:
    count = 0
    for number, line in lines:
        if count == limit:
            return
        try:
            parsed = parse(line.rstrip("\r"))
        except _BadLine as error:
            wrong = _line_error(source, number, line, error)
            if skipped is None:
                raise wrong from None
            skipped.append(wrong)
            continue
        count += 1
        yield parsed


class _BadLine(ValueError):
    """What is wrong with a line, the wrong part of it from `begin`, and what would be right."""

    def __init__(self, message: str, part: str, hint: str, begin: int = 0) -> None:
        super().__init__(message)
        self.message, self.part, self.hint, self.begin = message, part, hint, begin


def _line_error(source: Source, number: int, line: str, error: _BadLine) -> Diagnostic:
    column = max(line.find(error.part, error.begin), 0)
    return Diagnostic(
        error.message,
        hint=error.hint,
        source=source.name,
        line=number,
        column=column + 1,
        length=len(error.part),
        text=line.rstrip("\r"),
    )


def _check_header(source: Source, first: tuple[int, str]) -> None:
    names = [name.strip() for name in first[1].lstrip("\ufeff").split(",")]
    if names != list(AZURE):
        wrong = next((name for name in names if name not in AZURE), names[0])
        hint = f"traces are CSV with {','.join(AZURE)} or JSON lines with {', '.join(MOONCAKE)}"
        message = f"no trace that sagec knows: {wrong!r} is no column of one"
        raise _line_error(source, *first, _BadLine(message[:120], wrong, hint))


_MOMENT = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(?:Z|\+00:00)?", re.ASCII)


def _parse_azure(line: str) -> Parsed:
    cells = line.split(",")
    if len(cells) != len(AZURE):
        raise _BadLine(f"{len(cells)} columns where there are 3", line, ",".join(AZURE))
    moment = _MOMENT.fullmatch(cells[0].strip())
    hint = "as in: 2023-11-16 18:15:46.680590"
    if moment is None:
        raise _BadLine(f"{cells[0][:40]!r} is no TIMESTAMP", cells[0], hint)
    try:
        since = datetime.fromisoformat(moment[1]) - datetime(1970, 1, 1)
    except ValueError:
        raise _BadLine(f"{cells[0][:40]!r} is no TIMESTAMP", cells[0], hint) from None
    fraction_us = int((moment[2] or "").ljust(6, "0")[:6])
    us = (since.days * 86400 + since.seconds) * 1_000_000 + fraction_us
    return us, _count(cells, 1), _count(cells, 2), ()


def _count(cells: list[str], index: int) -> int:
    text = cells[index].strip()
    if not re.fullmatch(r"[0-9]{1,10}", text) or not 1 <= int(text) <= MOST_TOKENS:
        message = f"{AZURE[index]} is {text[:40]!r}"
        begin = len(",".join(cells[:index])) + 1
        raise _BadLine(message, cells[index], "what does: 1 or more", begin)
    return int(text)


def _parse_mooncake(line: str) -> Parsed:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise _BadLine("the line is no JSON object", line, _mooncake_hint()) from None
    if not isinstance(row, dict):
        raise _BadLine("the line is no JSON object", line, _mooncake_hint())
    for name in MOONCAKE:
        if name not in row:
            raise _BadLine(f"the line has no {name}", line, there_are(name, MOONCAKE))
    moment_ms = row["timestamp"]
    if type(moment_ms) not in (int, float) or not 0 <= moment_ms < 1e15:
        raise _bad_value(line, row, "timestamp", "milliseconds, from 0")
    prompt, output = _length(line, row, "input_length"), _length(line, row, "output_length")
    blocks = row.get("hash_ids", [])
    if not isinstance(blocks, list) or not all(
        type(block) is int and 0 <= block < 2**63 for block in blocks
    ):
        raise _BadLine("hash_ids is no list of integers", '"hash_ids"', "as in: [0, 1, 2]")
    return round(moment_ms * 1000), prompt, output, tuple(blocks)


def _mooncake_hint() -> str:
    return 'as in: {"timestamp": 0, "input_length": 512, "output_length": 6}'


def _length(line: str, row: dict[str, Any], name: str) -> int:
    value = row[name]
    if type(value) is not int or not 1 <= value <= MOST_TOKENS:
        raise _bad_value(line, row, name, "a whole number, 1 or more")
    return value


def _bad_value(line: str, row: dict[str, Any], name: str, hint: str) -> _BadLine:
    value = json.dumps(row[name])
    begin = max(line.find(f'"{name}"'), 0)
    return _BadLine(f"{name} is {value[:40]}", value, hint, begin)
