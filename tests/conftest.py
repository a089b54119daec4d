"""Pages of tests/filecheck as pytest items, and threads that do not fight each other.

A page is a .mlir or .sage file with RUN lines. Pipes of `sagec` and `filecheck` run inside of this
process, which is twenty times faster than a shell with two pythons; any other RUN line runs in
bash. `lit tests/filecheck` runs the same pages the slow way.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

PAGES = Path(__file__).parent / "filecheck"


def pytest_configure(config: pytest.Config) -> None:
    with contextlib.suppress(ImportError):
        from hypothesis import settings

        # A loaded machine makes examples slow without making them wrong.
        settings.register_profile("sagec", deadline=None, print_blob=True)
        settings.load_profile("sagec")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if file_path.suffix in (".mlir", ".sage") and PAGES in file_path.parents:
        return Page.from_parent(parent, path=file_path)
    return None


class PageError(Exception):
    """A page whose output is not what it says; the text is for people."""


class Page(pytest.File):
    def collect(self) -> Iterator[pytest.Item]:
        for number, command in enumerate(run_lines(self.path)):
            yield RunLine.from_parent(self, name=f"RUN-{number + 1}", command=command)


class RunLine(pytest.Item):
    """One RUN line of a page."""

    def __init__(self, *, command: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.command = command

    def runtest(self) -> None:
        for program in re.findall(r"REQUIRES:\s*(\S+)", self.path.read_text("utf-8")):
            if shutil.which(program) is None:
                pytest.skip(f"{program} is not installed here")
        temporary = Path(self.config.rootpath, "out", "filecheck", self.path.stem + ".tmp")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        command = self.command.replace("%s", str(self.path)).replace("%t", str(temporary))
        stages = pipe(command)
        if stages is None:
            in_bash(command)
        else:
            in_process(stages)

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        if isinstance(excinfo.value, PageError):
            return f"{self.path}\nRUN: {self.command}\n{excinfo.value}"
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"{self.path.name}: {self.command}"


def run_lines(path: Path) -> list[str]:
    """Commands of a page; a backslash at the end of a line goes on in the next RUN line."""
    joined, commands = "", []
    for line in re.findall(r"RUN:\s*(.*?)\s*$", path.read_text("utf-8"), re.MULTILINE):
        joined += line
        if joined.endswith("\\"):
            joined = joined[:-1]
        else:
            commands.append(joined)
            joined = ""
    return commands


def pipe(command: str) -> list[list[str]] | None:
    """Words of each stage where all of them are sagec or filecheck; None for a shell's work."""
    lexer = shlex.shlex(command.replace("2>&1", "STDERR"), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    stages: list[list[str]] = [[]]
    for word in lexer:
        if word == "|":
            stages.append([])
        elif set(word) & set("<>&;()"):
            return None
        else:
            stages[-1].append(word)
    known = all(stage and stage[stage[0] == "not" :][0] in _STAGES for stage in stages)
    return stages if known else None


def in_process(stages: list[list[str]]) -> None:
    """Run the stages one after the other, each on the output of the one before."""
    text = ""
    for stage in stages:
        wanted_failure = stage[0] == "not"
        words = stage[1:] if wanted_failure else stage
        merged = words[-1] == "STDERR"
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out if merged else err):
            stdin, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(text.encode()))
            try:
                code = _STAGES[words[0]](words[1 : len(words) - merged], text)
            finally:
                sys.stdin = stdin
        if (code != 0) != wanted_failure:
            raise PageError(
                f"{' '.join(words)}: exit code {code}\n{err.getvalue()}{out.getvalue()}"
            )
        text = out.getvalue()


def in_bash(command: str) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = f'set -o pipefail\nnot() {{ ! "$@"; }}\n{command}'
    done = subprocess.run(
        ["bash", "-c", script],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise PageError(f"exit code {done.returncode}\n{done.stderr}{done.stdout}")


def _sagec(words: list[str], _: str) -> int:
    from sagec.cli import main

    return main(words)


def _filecheck(words: list[str], text: str) -> int:
    from filecheck.finput import FInput
    from filecheck.matcher import Matcher
    from filecheck.options import parse_argv_options
    from filecheck.parser import Parser

    options = parse_argv_options(["filecheck", *words])
    return Matcher(options, FInput("-", text), Parser.from_opts(options)).run()


_STAGES = {"sagec": _sagec, "filecheck": _filecheck}
