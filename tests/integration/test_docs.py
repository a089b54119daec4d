"""Commands in README.md and docs/*.md run, and show what the page says they show.

A block that begins with ```sh run is executed by bash, after those before it on its page and in
the same folder, a fresh copy of the examples. It must end with 0. Where a block that begins with
```text output follows, what was printed (stdout, then stderr) is compared with it: white space at
the ends of lines does not count, `...` stands for any text of a line, and a line of nothing else
for any lines.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FENCE = re.compile(r"^```(\w*)[ \t]*(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """Commands of a page from this line on; output is None where the page shows none."""

    line: int
    commands: str
    output: str | None


def blocks(page: str) -> list[Block]:
    found: list[Block] = []
    end = 0
    for match in FENCE.finditer(page):
        kind = (match[1], match[2])
        if kind == ("sh", "run"):
            found.append(Block(page.count("\n", 0, match.start()) + 1, match[3], None))
            end = match.end()
        elif kind == ("text", "output"):
            assert found and found[-1].output is None, "an output block follows a run block"
            assert page.count("```", end, match.start()) == 0, "an output block follows at once"
            found[-1] = found[-1]._replace(output=match[3])
    return found


def pattern(output: str) -> re.Pattern[str]:
    """What matches text like `output`."""
    lines = []
    for line in output.rstrip("\n").split("\n"):
        if line.strip() == "...":
            lines.append(r"(?:[^\n]*\n)*?")
        else:
            lines.append(re.escape(line.rstrip()).replace(r"\.\.\.", r"[^\n]*") + r"\n")
    return re.compile("".join(lines))


def printed(commands: str, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env={**os.environ, "PATH": path, "COLUMNS": "100", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout}{done.stderr}"
    return "".join(f"{line.rstrip()}\n" for line in (done.stdout + done.stderr).splitlines())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_do_what_it_says(page: Path, tmp_path: Path) -> None:
    if not page.is_file():
        pytest.skip(f"{page.name} is not written yet")
    found = blocks(page.read_text("utf-8"))
    if not found:
        pytest.skip("no command on this page is marked to be run")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for block in found:
        shown = printed(block.commands, tmp_path)
        if block.output is not None:
            place = f"{page.relative_to(ROOT)}:{block.line}"
            assert pattern(block.output).fullmatch(shown), f"{place} now shows:\n{shown}"


def test_what_is_generated_is_what_the_code_says() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_block_of_commands_is_found_with_its_output() -> None:
    page = "a\n```sh run\nls\n```\n\n```text output\nx\n```\n```sh\nrm\n```\n```sh run\npwd\n```\n"
    assert blocks(page) == [Block(2, "ls\n", "x\n"), Block(12, "pwd\n", None)]


def test_dots_stand_for_text_or_for_lines() -> None:
    assert pattern("took ... ms\n...\nend\n").fullmatch("took 3 ms\none\ntwo\nend\n")
    assert pattern("took ... ms\n...\nend\n").fullmatch("took 3 ms\nend\n")
    assert not pattern("took ... ms\n").fullmatch("took 3 s\n")
