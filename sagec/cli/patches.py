"""What `sagec patch` finds out and does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sagec.cli.writing import console
from sagec.runtime.compiled import cache_folder
from sagec.runtime.engines.turbomind import patching, programs, wheel
from sagec.runtime.engines.turbomind.build import recipe
from sagec.runtime.engines.turbomind.native import Native
from sagec.runtime.engines.turbomind.patching import PatchError
from sagec.runtime.engines.turbomind.toy.harness import load_stand_ins

STAND_INS = "with stand-ins for CUDA: no GPU here"

Told = dict[str, Any]
"""A line each: what was looked at, and what was found."""


def status() -> Told:
    """Which lmdeploy is here, and what of the patches; nothing is imported or built."""
    found, refusal = None, None
    try:
        found = wheel.find()
        wheel.check(found)
    except wheel.WheelError as error:
        refusal = str(error)
    made = recipe(found.sha256 if found else "")
    return {
        "python": wheel.python_tag(),
        "lmdeploy": found and found.version,
        "library": found and str(found.library),
        "sha256": found and found.sha256,
        "known": refusal is None,
        "refusal": refusal,
        "patches": _path(made.built()) if refusal is None else None,
        "compiler": made.compiler(),
        "gpu": patching.has_driver(),
        "cache": str(cache_folder()),
    }


def build() -> Told:
    """Build the patches unless they are built."""
    made = recipe(wheel.supported().sha256)
    was_built, begun = made.built() is not None, time.monotonic()
    path = made.build()
    return {
        "patches": str(path),
        "built now": not was_built,
        "seconds": round(time.monotonic() - begun, 1),
    }


def verify() -> Told:
    """Checksum, read anew, seams and self-test."""
    found = wheel.supported()
    if wheel.hash_of(found.library) != found.sha256:
        raise PatchError(f"{found.library} has changed; get it back with: {wheel.known().remedy}")
    native, how = _load()
    native.seams()
    native.selftest()
    return {
        "library": str(found.library),
        "sha256": found.sha256,
        "seams": "all there",
        "self-test": "passed",
        "loaded": how,
    }


def selftest() -> Told:
    """The self-test alone."""
    native, how = _load()
    native.selftest()
    return {"self-test": "passed", "loaded": how}


def apply() -> Told:
    """Patch this process and put everything back."""
    native, how = _load()
    native.apply()
    patched = native.num_slots()
    native.revert()
    return {"slots patched": patched, "left patched": native.num_slots(), "loaded": how}


ACTIONS: dict[str, Callable[[], Told]] = {
    "status": status,
    "build": build,
    "verify": verify,
    "selftest": selftest,
    "apply": apply,
}


def show(told: Told) -> None:
    """Print what was found, a line each."""
    out = console()
    width = max(map(len, told))
    for name, found in told.items():
        text = _TEXT[found] if found is None or isinstance(found, bool) else str(found)
        out.print(f"{name:<{width}}  {text}", markup=False)


_TEXT = {None: "-", True: "yes", False: "no"}


def run_patched(program: Sequence[str]) -> int:
    """Run a program in this process; where TurboMind cannot be patched, it runs as it is.

    At its end, what its tensor-parallel ranks have sent one another is told on stderr.
    """
    code = programs.run(program, _patch_or_say_why)
    if (native := patching.patched()) is not None:
        for name, counted in native.collectives().items():
            if counted["calls"]:
                said = f"{name}: {counted['calls']} calls, {counted['bytes']} bytes"
                print(f"sagec: {said}", file=sys.stderr)
    return code


def _load() -> tuple[Native, str]:
    """The patches beside TurboMind, and how that came to be loaded."""
    if patching.has_driver():
        return patching.load(), "with CUDA"
    wheel.supported()  # before anything is loaded for it
    load_stand_ins()
    return patching.load(), STAND_INS


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _patch_or_say_why() -> None:
    try:
        patching.ensure_patched()
    except PatchError as error:
        print(f"sagec: TurboMind runs unpatched: {error}", file=sys.stderr)
