"""A Python of its own that runs TurboMind: an abort of the engine is a failure, not the end.

`Child` is the side of the test: it sends calls, by module, function and JSON arguments, and starts
a new process where the last one died. Run as a module, this is the process: it answers calls on
the pipe that was its standard output, and whatever prints there prints to standard error.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HUNG_S = 600.0
"""A call that takes longer is ended, for an engine that hangs is a failure too; the first one may
have to build everything."""


class Failed(AssertionError):
    """What was called raised, or the process died or hung; the text is for people."""


class Child:
    """Calls functions in one process, kept from call to call while it lives."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        self._process: subprocess.Popen[str] | None = None

    def call(self, module: str, function: str, **arguments: Any) -> Any:
        """What the function returns. Raises Failed with its traceback, or with the last words."""
        process = self._process or self._start()
        assert process.stdin and process.stdout
        watchdog = threading.Timer(HUNG_S, process.send_signal, (signal.SIGABRT,))
        watchdog.start()
        try:
            process.stdin.write(json.dumps([module, function, arguments]) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            watchdog.cancel()
        if not answer:
            raise Failed(f"{function}({arguments}): {self._died()}")
        result, error = json.loads(answer)
        if error:
            raise Failed(f"{function}({arguments})\n{error}")
        return result

    def close(self) -> None:
        """End the process; its exit code must be 0: an engine ends without a crash too."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.communicate(timeout=HUNG_S)
        if process.returncode:
            raise Failed(f"at exit: code {process.returncode}\n{self._last_words()}")

    def _start(self) -> subprocess.Popen[str]:
        self._words = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115, till the next
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "tests.turbomind_child"],
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
        )
        return self._process

    def _died(self) -> str:
        assert self._process is not None
        process, self._process = self._process, None
        return f"the process ended with code {process.wait(HUNG_S)}\n{self._last_words()}"

    def _last_words(self) -> str:
        self._words.seek(0)
        return "\n".join(self._words.read().splitlines()[-60:])


def main() -> None:
    """Answer calls until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        module, function, arguments = json.loads(line)
        result, error = None, ""
        try:
            result = getattr(importlib.import_module(module), function)(**arguments)
        except Exception:
            error = traceback.format_exc()
        answers.write(json.dumps([result, error]) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
