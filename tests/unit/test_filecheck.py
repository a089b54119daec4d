"""The pages of tests/filecheck as a reader would run them: lit, a shell, one process a command.

The default suite runs every page inside of pytest (tests/conftest.py); this is the proof that both
ways agree.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def test_lit_runs_pages_with_real_processes() -> None:
    lit = shutil.which("lit", path=str(Path(sys.executable).parent)) or shutil.which("lit")
    if lit is None:
        pytest.skip("lit is not installed here (pip install lit)")
    command = [lit, "-v", "tests/filecheck", "--filter", r"dialects/(kv/ops|cluster/invalid)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Passed\s*:\s*2\b", done.stdout), done.stdout


def test_a_page_that_says_something_wrong_fails(tmp_path: Path) -> None:
    page = tmp_path / "wrong.mlir"
    text = "// RUN: sagec opt %s | filecheck %s\n// CHECK: @b\ncluster.switch @a\n"
    page.write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "tests" / "filecheck" / "lit.cfg.py", tmp_path)
    lit = shutil.which("lit", path=str(Path(sys.executable).parent)) or shutil.which("lit")
    if lit is None:
        pytest.skip("lit is not installed here (pip install lit)")
    command = [lit, "-v", str(page)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "@b" in done.stdout
