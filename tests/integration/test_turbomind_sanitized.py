"""The scenarios once more, with the native code built with address and undefined sanitizers.

Only our code is instrumented, TurboMind's is as it is in its wheel; every block of memory in the
process has guards, and a wrong access ends it.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_turbomind_scenarios import MODULE, played
from tests.turbomind_child import Child, Failed
from tests.turbomind_here import needs_turbomind


def runtime(name: str) -> str:
    """Path of a library of the compiler, or "" where it has none."""
    if shutil.which("c++") is None:
        return ""
    asked = ["c++", f"-print-file-name={name}"]
    path = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    return path if Path(path).is_absolute() else ""


PRELOADED = [runtime(name) for name in ("libasan.so", "libstdc++.so")]

pytestmark = [
    pytest.mark.slow,
    needs_turbomind,
    pytest.mark.skipif(not all(PRELOADED), reason="the compiler here has no address sanitizer"),
]

SANITIZED = {
    "SAGEC_SANITIZE": "address,undefined",
    "LD_PRELOAD": ":".join(PRELOADED),
    "ASAN_OPTIONS": "detect_leaks=0",  # Python's own would drown ours
    "UBSAN_OPTIONS": "print_stacktrace=1",
}

CASE = {"kv_blocks": 9, "max_batch": 4, "step_tokens": 64}


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    child = Child(SANITIZED)
    yield child
    child.close()


@pytest.mark.parametrize(("scenario", "arguments"), [*played()])
def test_under_the_patches(child: Child, scenario: str, arguments: dict[str, Any]) -> None:
    child.call(MODULE, scenario, **arguments)


@pytest.mark.parametrize("seed", range(20))
def test_under_random_decisions(child: Child, seed: int) -> None:
    requests = [[3 * i, 16 * (i % 3), 5 + 7 * i % 61, 4, 20 * (i % 4 == 3)] for i in range(9)]
    flags = {"prefix_cache": seed % 2 == 0, "strict": seed % 3 > 0, "wild": seed % 5 == 0}
    flags["stalls"] = seed % 7 == 0
    case = {**CASE, **flags, "seed": seed, "tp": 1 + (seed % 4 == 0), "requests": requests}
    child.call("tests.turbomind_random", "run", case=case)


def test_an_access_behind_the_end_would_be_found() -> None:
    """The control: our own crc32c, told to read beyond a buffer."""
    child = Child(SANITIZED)
    with pytest.raises(Failed, match="heap-buffer-overflow"):
        child.call(MODULE, "read_behind_the_end")
