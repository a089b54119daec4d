"""The command line `sagec`: one file a command in `commands/`, found by its name.

Exit codes: 0 done; 1 the input is wrong; 2 the command line is wrong; 70 sagec itself is wrong;
130 interrupted. Errors are one line on stderr, with a caret where a file is meant, and never a
traceback (SAGEC_DEBUG=1 shows it). Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from sagec.cli import failure


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. argv: without the program's name, None: this process's."""
    from sagec.cli import arguments

    _open_closed_streams()
    try:
        args = arguments.parse(sys.argv[1:] if argv is None else argv)
        code: int = args.run(args)
        sys.stdout.flush()
    except SystemExit as end:  # argparse, after --help and --version
        return end.code if isinstance(end.code, int) else 0
    except BaseException as error:
        if os.environ.get("SAGEC_DEBUG") == "1":
            raise
        return failure.report(error, sys.stderr)
    return code


def _open_closed_streams() -> None:
    """A closed stdout or stderr goes nowhere, and no file of ours gets its number."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_WRONLY)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8"))
