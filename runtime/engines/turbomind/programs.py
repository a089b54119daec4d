"""Run somebody's Python program in this process, with TurboMind patched as it is imported."""

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import runpy
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from sagec.runtime.engines.turbomind.patching import MODULE


class ProgramError(RuntimeError):
    """There is no such program, or none in Python; says what would be one."""


class AfterImport:
    """A finder that calls `then` once TurboMind has been imported by whoever wanted it."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """TurboMind's spec, as the path finder has it, with its loader wrapped; None for others."""
        if name != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Calling(spec.loader, self._then)
        return spec


class _Calling(importlib.abc.Loader):
    """A loader that calls `then` when its module has been executed."""

    def __init__(self, loader: Any, then: Callable[[], None]) -> None:
        self._loader = loader
        self._then = then

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._then()


def run(command: Sequence[str], after_import: Callable[[], None]) -> int:
    """Run a console script, `-m MODULE` or a file of Python, with its arguments; its exit code.

    after_import is called when TurboMind has been imported. Raises ProgramError.
    """
    finder = AfterImport(after_import)
    argv, path = sys.argv, sys.path
    sys.meta_path.insert(0, finder)
    try:
        sys.path = [*_folder(command[0]), *path]
        start = _starting(command)
        sys.argv = list(command[1:] if command[0] == "-m" else command)
        return _exit_code(start)
    finally:
        sys.argv, sys.path = argv, path
        sys.meta_path.remove(finder)


def _folder(program: str) -> list[str]:
    """Where `python` would look first for what the program imports."""
    if program == "-m":
        return [str(Path.cwd())]
    return [str(Path(program).resolve().parent)] if Path(program).is_file() else []


def _starting(command: Sequence[str]) -> Callable[[], object]:
    """What runs the program, as `python` or its console script would."""
    program = command[0]
    if program == "-m":
        if len(command) < 2:
            raise ProgramError("-m wants the name of a module behind it")
        if not _is_module(command[1]):
            raise ProgramError(f"no module named {command[1]!r} in {sys.executable}")
        return lambda: runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    scripts = importlib.metadata.entry_points(group="console_scripts", name=program)
    if scripts:
        (script, *_) = scripts
        return lambda: sys.exit(script.load()())
    path = program if Path(program).is_file() else shutil.which(program)
    if path is None:
        raise ProgramError(f"no program {program!r}: a console script, -m MODULE or a file is one")
    if not _is_python(Path(path)):
        raise ProgramError(f"{path} is no Python program; only those run in this process")
    return lambda: runpy.run_path(path, run_name="__main__")


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):  # a package before its last dot; no name
        return False


def _is_python(path: Path) -> bool:
    if path.suffix == ".py":
        return True
    with path.open("rb") as file:
        first = file.readline(200)
    return first.startswith(b"#!") and b"python" in first


def _exit_code(start: Callable[[], object]) -> int:
    """Run it to its end, which is told as Python tells it."""
    try:
        start()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0
