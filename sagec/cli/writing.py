"""Where output goes: a file or stdout, plain or with colour, and never half a file."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def check_writable(path: str | None) -> None:
    """Raise OSError where a file at `path` could not be written; before long work."""
    if path is None or path == "-":
        return
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(2, "no such folder to write to", str(target.parent))
    if target.is_dir():
        raise IsADirectoryError(21, "a folder; the name of a file is wanted", path)
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise PermissionError(13, "it may not be written here", path)


def write_text(path: str | None, text: str) -> None:
    """Write `text` to a file, whole or not at all, or to stdout where `path` is None or `-`."""
    if path is None or path == "-":
        sys.stdout.write(text)
        return
    check_writable(path)
    target = Path(path)
    if target.exists() and not target.is_file():
        _write_to_device(target, text)
        return
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _write_to_device(target: Path, text: str) -> None:
    """Write to a pipe or a device, which cannot be replaced."""
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from None


def is_terminal() -> bool:
    """Whether a person watches stdout."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def console(*, stderr: bool = False, width: int | None = None) -> Console:
    """A console of rich, which writes plainly where nobody watches.

    width: letters of a line where nobody watches; a terminal knows its own.
    """
    from rich.console import Console

    class PipedConsole(Console):
        """Where the reader of a pipe has left, rich would end the process by itself."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    watched = sys.stderr.isatty() if stderr else is_terminal()
    return PipedConsole(
        stderr=stderr, highlight=False, soft_wrap=not watched, width=None if watched else width
    )


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Say on stderr what takes a while: a spinner where somebody watches, else nothing."""
    if not sys.stderr.isatty():
        yield
        return
    with console(stderr=True).status(what):
        yield


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def print_json(value: object) -> None:
    """One JSON document on stdout, for programs."""
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")
