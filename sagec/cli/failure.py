"""What the user reads when something is wrong, and the exit code that goes with it."""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Callable, Collection
from typing import Any, TextIO

BAD_INPUT, BAD_USAGE, INTERNAL, INTERRUPTED = 1, 2, 70, 130

LISTED = 20
"""A message lists what there is up to so many names; a longer list helps nobody."""


class UsageError(Exception):
    """The command line is wrong; says which word of it and what would be right."""


class InputError(Exception):
    """An input is wrong in a way that only the command line can see; says where and what."""


def unknown(kind: str, name: str, known: Collection[str]) -> str:
    """What to say where `name` is none of the known ones.

    >>> unknown("pass", "ordr", ["order", "legalize"])
    "no pass 'ordr'; did you mean 'order'? (there are: legalize, order)"
    """
    from sagec.diagnostics import did_you_mean, there_are

    if len(known) <= LISTED:
        return f"no {kind} {name!r}; {there_are(name, known)}"
    close = did_you_mean(name, known)
    return f"no {kind} {name!r}" + (f"; did you mean {close!r}?" if close else "")


def report(error: BaseException, stream: TextIO) -> int:
    """Write what `error` means to the user to the stream; the exit code."""
    if isinstance(error, KeyboardInterrupt):
        stream.write("sagec: interrupted\n")
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        # Whoever read our output has had enough, which is no error.
        _drop_stdout()
        return 0
    if isinstance(error, OSError) and error.filename is None and not _takes_output():
        _drop_stdout()
        error.filename = "stdout"
    if (text := message(error)) is not None:
        stream.write(f"{text}\n")
        return BAD_USAGE if isinstance(error, UsageError) else BAD_INPUT
    what = _one_line(f"{type(error).__name__}: {error}")
    stream.write(
        f"sagec: internal error: {what[:400]} (a fault of sagec, not of your input: set "
        "SAGEC_DEBUG=1 to see where, and report it with the command and the file)\n"
    )
    return INTERNAL


def _takes_output() -> bool:
    """Whether stdout does; only writing tells, so that an empty line ends what was printed."""
    try:
        print(flush=True)
    except OSError:
        return False
    return True


def _drop_stdout() -> None:
    """Nothing more is written there; Python would complain once more when it closes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def message(error: BaseException) -> str | None:
    """What the user is told of an error that input can cause; None for one that it must not."""
    for kind in type(error).__mro__:
        if render := _RENDER.get(f"{kind.__module__}.{kind.__qualname__}"):
            return render(error)
    return None


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _plain(error: Any) -> str:
    return f"error: {_one_line(error)}"


def _usage(error: Any) -> str:
    return f"sagec: error: {_one_line(error)}"


def _os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"error: {where}{error.strerror or _one_line(error)}{_nearby(error)}"


def _nearby(error: OSError) -> str:
    """The name of a file beside the missing one that looks like it."""
    if not isinstance(error, FileNotFoundError) or not isinstance(error.filename, str):
        return ""
    folder, name = os.path.split(error.filename)
    if not os.path.isdir(folder or "."):
        return ""
    close = difflib.get_close_matches(name, os.listdir(folder or "."), n=1)
    return f"; did you mean {os.path.join(folder, close[0])!r}?" if close else ""


def _too_deep(_: RecursionError) -> str:
    return "error: the input nests too deeply; 200 levels are enough for anybody"


def _placed(error: Any) -> str:
    """An error of a text: a place, the line of the file and a caret, where these are known."""
    from sagec.source import diagnostic_of

    found = diagnostic_of(error)
    for each in (found, *found.others):
        if each.text is None and each.source and each.line_number:
            each.text = _line_of(each.source, each.line_number)
    return str(found)


def _line_of(path: str, line: int) -> str | None:
    """A line of a file, counted from 1; None where it cannot be read again, as stdin cannot."""
    try:
        with open(path, encoding="utf-8") as file:
            text = next(itertools.islice(file, line - 1, None), None)
    except (OSError, ValueError):
        return None
    return None if text is None else text.rstrip("\r\n")


def _spec_error(error: Any) -> str:
    """xDSL's ArgSpecParseError: only the line with the caret says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    where = re.sub(r"^\^+\s*", "", lines[-1]) if lines else "?"
    return f"sagec: error: the pass pipeline does not parse: {_one_line(where)}"


# By name, so that nothing has to be loaded to compare with.
_RENDER: dict[str, Callable[[Any], str]] = {
    "sagec.cli.failure.UsageError": _usage,
    "sagec.cli.failure.InputError": _plain,
    "sagec.diagnostics.Diagnostic": _placed,
    "sagec.runtime.plan.PlanError": _plain,
    "sagec.runtime.profile.ProfileError": _plain,
    "sagec.runtime.request.RequestError": _plain,
    "sagec.runtime.engines.EngineError": _plain,
    "sagec.runtime.engines.turbomind.native.NativeError": _plain,
    "sagec.runtime.engines.turbomind.patching.PatchError": _plain,
    "sagec.runtime.engines.turbomind.programs.ProgramError": _plain,
    "sagec.runtime.engines.turbomind.toy.harness.ToyError": _plain,
    "sagec.runtime.engines.turbomind.wheel.WheelError": _plain,
    "sagec.runtime.comm.ChannelError": _plain,
    "sagec.runtime.compiled.Unbuilt": _plain,
    "sagec.runtime.executor.ExecutorError": _plain,
    "sagec.runtime.loop.LoopError": _plain,
    "sagec.runtime.recording.frames.RecordingError": _plain,
    "sagec.runtime.state.StateError": _plain,
    "sagec.runtime.strategies.StrategyError": _plain,
    "xdsl.utils.exceptions.ParseError": _placed,
    "xdsl.utils.exceptions.ArgSpecParseError": _spec_error,
    "xdsl.utils.exceptions.DiagnosticException": _placed,
    "builtins.OSError": _os_error,
    "builtins.RecursionError": _too_deep,
}
