"""What this machine has, and what sagec can do with it; nothing heavy is imported to find out."""

from __future__ import annotations

import ast
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import msgspec

TOOLS = {
    "C compiler": (("cc", "gcc", "clang"), "apt-get install gcc", "fast paged attention"),
    "C++ compiler": (("c++", "g++", "clang++"), "apt-get install g++", "the turbomind engine"),
    "mlir-opt": (("mlir-opt-22", "mlir-opt"), "apt-get install mlir-22-tools", "one test"),
}
"""Programs by purpose: names to look for, what installs one, and what is lost without."""

BROUGHT_BY = {"_turbomind": "lmdeploy", "_xgrammar": "lmdeploy"}
"""Modules that lie within a package, which puts them on the path when it is imported."""

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "bf16")


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `sagec doctor`. remedy: the command that would add what is not here."""

    group: str
    name: str
    here: bool
    detail: str = ""
    remedy: str = ""


def findings() -> list[Finding]:
    """Everything that the doctor looks at, in the order in which it is told."""
    patches = _patches()
    return [*_system(), *_packages(), *_tools(), *_devices(), *_engines(patches), patches]


def _system() -> list[Finding]:
    release = platform.python_version()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        Finding(group="machine", name="python", here=True, detail=f"{release} ({sys.executable})"),
        Finding(group="machine", name="system", here=True, detail=platform.platform()),
        Finding(group="machine", name="cpu", here=True, detail=f"{cores} cores; {_flags()}"),
        _shared_memory(),
    ]


def _flags() -> str:
    """Vector units that Linux reports of the processor."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return platform.machine()
    text = path.read_text("utf-8", errors="replace")
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    found = line.group(1).split() if line else []
    return ", ".join(flag for flag in FLAGS if flag in found) or platform.machine()


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        detail = "no /dev/shm here; KV moves between instances of one process only"
        return Finding(group="machine", name="shared memory", here=False, detail=detail)
    free_mb = shutil.disk_usage(folder).free >> 20
    detail = f"{free_mb} MiB free, for KV between instances"
    return Finding(group="machine", name="shared memory", here=True, detail=detail)


def _requirements() -> list[str]:
    """What sagec requires, as its metadata says; nothing where it runs without being installed."""
    try:
        return requires("sagec") or []
    except PackageNotFoundError:
        return []


def _packages() -> list[Finding]:
    """Versions of what sagec requires, and of what each of its extras would add."""
    found = []
    for text in _requirements():
        requirement, _, marker = text.partition(";")
        name = re.split(r"[<>=!~\s\[]", requirement, maxsplit=1)[0]
        extra = re.search(r"extra\s*==\s*[\"']([\w-]+)", marker)
        source = f"sagec[{extra.group(1)}]" if extra else name
        try:
            detail, here = version(name), True
        except PackageNotFoundError:
            detail, here = f"not installed ({requirement.strip()})", False
        remedy = "" if here else f"pip install '{source}'"
        group = f"packages, extra {extra.group(1)}" if extra else "packages"
        found.append(Finding(group=group, name=name, here=here, detail=detail, remedy=remedy))
    return found


def _tools() -> list[Finding]:
    found = []
    for name, (programs, remedy, loss) in TOOLS.items():
        path = next(filter(None, map(shutil.which, programs)), None)
        detail = path or f"none of {', '.join(programs)}; without it goes {loss}"
        here = path is not None
        remedy = "" if here else remedy
        found.append(Finding(group="tools", name=name, here=here, detail=detail, remedy=remedy))
    return found


def _devices() -> list[Finding]:
    program = shutil.which("nvidia-smi")
    if program is None:
        detail = "no NVIDIA driver here; the torch engine runs on the CPU"
        return [Finding(group="tools", name="gpu", here=False, detail=detail)]
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    if done.returncode:
        detail = f"nvidia-smi fails: {' '.join((done.stderr or done.stdout).split())}"
        return [Finding(group="tools", name="gpu", here=False, detail=detail)]
    names = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return [Finding(group="tools", name="gpu", here=True, detail="; ".join(names))]


def _engines(patches: Finding) -> list[Finding]:
    """Each engine, with what its files import that is not installed; patches: TurboMind's."""
    from sagec.runtime import engines

    found = []
    extras = {text.partition("extra ==")[2].strip(" \"'") for text in _requirements()}
    for name in engines.known():
        missing = sorted(_missing_imports(Path(engines.__path__[0]), name))
        patched = patches.here or not patches.name.startswith(name)
        usable = "usable" if patched else "not usable without its patches"
        found.append(
            Finding(
                group="engines",
                name=name,
                here=patched and not missing,
                detail=f"needs {', '.join(missing)}" if missing else usable,
                remedy=_remedy(name, missing, extras),
            )
        )
    return found


def _remedy(engine: str, missing: list[str], extras: set[str]) -> str:
    """The command that installs what an engine misses."""
    from sagec.runtime.engines.turbomind import wheel

    if missing == ["lmdeploy"]:
        return wheel.known().remedy
    package = f"sagec[{engine}]" if engine in extras else " ".join(missing)
    return f"pip install '{package}'" if missing else ""


def _patches() -> Finding:
    """Whether TurboMind's patches are made for the lmdeploy that is here, and built."""
    from sagec.cli import patches

    told = patches.status()
    can_build = told["compiler"] is not None
    later = "the first engine builds them" if can_build else "no C++ compiler builds them"
    return Finding(
        group="engines",
        name="turbomind's patches",
        here=told["known"] and (told["patches"] is not None or can_build),
        detail=told["refusal"] or told["patches"] or f"not built yet: {later}",
    )


def _missing_imports(folder: Path, engine: str) -> set[str]:
    """Packages that the files of an engine import and this Python does not have."""
    path = folder / engine
    files = sorted(path.glob("**/*.py")) if path.is_dir() else [path.with_suffix(".py")]
    names: set[str] = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    names = {BROUGHT_BY.get(name, name) for name in names}
    return {name for name in names if importlib.util.find_spec(name) is None}


def as_json(found: list[Finding]) -> list[dict[str, Any]]:
    """The findings as JSON objects."""
    return [msgspec.to_builtins(finding) for finding in found]
