"""What the patched TurboMind is put through, over the toy model, through its C ABI."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.turbomind_child import ROOT, Child
from tests.turbomind_here import needs_turbomind

pytestmark = needs_turbomind

MODULE = "tests.turbomind_scenarios"
UNPATCHED = "tokens_are_exact_where_nothing_is_patched"

VARIED: dict[str, tuple[dict[str, Any], ...]] = {
    "prompts_are_cut_into_chunks_of_any_size": tuple({"chunk": n} for n in (1, 33, 48, 64)),
    "prefixes_are_cached_under_any_order": tuple({"chunk": n} for n in (7, 48)),
    "kv_is_handed_over": tuple(
        {"prefix_cache": cached, "tp": tp} for cached in (False, True) for tp in (1, 2)
    ),
    "kv_of_a_cancelled_session_goes_on_under_another_one": (
        {"prefix_cache": False},
        {"prefix_cache": True},
    ),
    "ranks_take_the_same_steps": tuple({"chunk": n} for n in (5, 40)),
    "a_plan_is_computed_chunk_by_chunk": tuple({"chunk": n} for n in (1, 16, 50)),
}
"""Scenarios that are played more than once, with what they are given."""


def played() -> Iterator[Any]:
    """Every scenario of the module with every set of arguments."""
    from tests import turbomind_scenarios

    for name, function in inspect.getmembers(turbomind_scenarios, inspect.isfunction):
        wanted = inspect.signature(function)
        is_scenario = function.__module__ == MODULE and wanted.return_annotation == "None"
        if not is_scenario or name == UNPATCHED:
            continue
        for arguments in VARIED.get(name, ({},)):
            values = "-".join(str(value) for value in arguments.values())
            yield pytest.param(name, arguments, id=f"{name}-{values}" if values else name)


@pytest.mark.parametrize(("scenario", "arguments"), [*played()])
def test_under_the_patches(child: Child, scenario: str, arguments: dict[str, Any]) -> None:
    child.call(MODULE, scenario, **arguments)


def test_tokens_are_exact_where_nothing_is_patched() -> None:
    child = Child()
    child.call(MODULE, UNPATCHED)
    child.close()


def test_the_benchmark_of_the_hooks_runs_and_says_what_it_measured(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "hooks.py", "--quick", "--out", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "hooks.json").read_text())
    timed = {(timing["sequences"], timing["kind"]) for timing in found["timings"]}
    assert timed == {(n, kind) for n in (1, 64, 256) for kind in ("stock", "hooked", "planned")}
    assert "budget" in (tmp_path / "hooks.md").read_text()
