"""Files into text."""

from __future__ import annotations

import sys
from pathlib import Path

from sagec.cli.failure import InputError


def read_bytes(path: str) -> bytes:
    """The bytes of a file, or of stdin for `-`."""
    return sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()


def shown(path: str) -> str:
    """What messages call a file."""
    return "<stdin>" if path == "-" else path


def decoded(content: bytes, name: str) -> str:
    """The text of a file. Raises InputError where it is not UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise InputError(f"{name}:{line}: byte 0x{byte:02x} is not UTF-8 text") from None
