"""The lmdeploy of this Python: which it is, and whether it is one that the patches are made for.

Nothing of it is imported to find out.
"""

import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from sagec import third_party
from sagec.runtime.compiled import cache_folder

VERSION = Path(third_party.__file__).parent / "lmdeploy" / "VERSION"


class WheelError(RuntimeError):
    """There is no TurboMind here that can be patched; says why and what would help."""


class KnownWheel(msgspec.Struct, frozen=True):
    """A wheel of the package index: its file, and the sha256 of the library in it."""

    file: str
    library: str
    sha256: str


class Known(msgspec.Struct, frozen=True):
    """third_party/lmdeploy/VERSION; wheels by CPython's tag, as in cp311."""

    package: str
    version: str
    tag: str
    commit: str
    upstream: str
    licence: str
    wheels: dict[str, KnownWheel]

    @property
    def remedy(self) -> str:
        """The command that installs the version that the patches are made for."""
        return f"pip install --no-deps {self.package}=={self.version}"


class Wheel(msgspec.Struct, frozen=True):
    """An installed lmdeploy. library: path of its `_turbomind*.so`; sha256: of that file."""

    version: str
    library: Path
    sha256: str


def known() -> Known:
    """What the patches are made for."""
    return msgspec.convert(tomllib.loads(VERSION.read_text("utf-8")), Known)


def find() -> Wheel:
    """The lmdeploy of this Python, whether known or not.

    Raises WheelError where there is none, or none with TurboMind.
    """
    wanted = known()
    _check_platform(wanted)
    spec = importlib.util.find_spec(wanted.package)
    if spec is None or not spec.submodule_search_locations:
        raise WheelError(f"no lmdeploy in {sys.prefix}; install it with: {wanted.remedy}")
    folder = Path(spec.submodule_search_locations[0]) / "lib"
    libraries = sorted(folder.glob("_turbomind*.so"))
    if not libraries:
        raise WheelError(f"no _turbomind*.so in {folder}; install one with: {wanted.remedy}")
    try:
        found = version(wanted.package)
    except PackageNotFoundError:
        found = "unknown"
    return Wheel(found, libraries[0], remembered_hash_of(libraries[0]))


def supported() -> Wheel:
    """The lmdeploy of this Python, where the patches are made for it. Raises WheelError."""
    wheel = find()
    check(wheel)
    return wheel


def check(wheel: Wheel) -> None:
    """Raise WheelError unless the patches are made for this very library and this Python."""
    wanted = known()
    if wheel.version != wanted.version:
        raise WheelError(
            f"lmdeploy {wheel.version} is installed; the patches are for {wanted.version}: "
            f"{wanted.remedy}"
        )
    made_for = {each.sha256: tag for tag, each in wanted.wheels.items()}
    if wheel.sha256 not in made_for:
        raise WheelError(
            f"{wheel.library} has sha256 {wheel.sha256[:16]}..., as no wheel of lmdeploy "
            f"{wanted.version} has: it was changed, or built anew; get it back with: "
            f"{wanted.remedy} --force-reinstall"
        )
    if (tag := made_for[wheel.sha256]) != python_tag():
        raise WheelError(f"{wheel.library} is for {tag}; this Python is {python_tag()}")


def python_tag() -> str:
    """This Python's tag in the names of wheels.

    >>> python_tag().startswith("cp3")
    True
    """
    kind = {"cpython": "cp"}.get(sys.implementation.name, sys.implementation.name)
    return f"{kind}{sys.version_info[0]}{sys.version_info[1]}"


def hash_of(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_hash_of(path: Path) -> str:
    """The sha256 of a large file; the cache folder remembers it by path, size and time."""
    found = path.stat()
    name = f"{path.resolve()} {found.st_size} {found.st_mtime_ns} {found.st_ino}"
    kept = cache_folder() / f"sha256-{hashlib.sha256(name.encode()).hexdigest()[:20]}"
    # A cache that cannot be read or written costs half a second each time, and nothing else.
    with contextlib.suppress(OSError):
        if re.fullmatch("[0-9a-f]{64}", remembered := kept.read_text("ascii", "replace")):
            return remembered
    digest = hash_of(path)
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        fresh = kept.with_suffix(f".{os.getpid()}")
        fresh.write_text(digest, "ascii")
        fresh.replace(kept)
    return digest


def _check_platform(wanted: Known) -> None:
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        raise WheelError(f"TurboMind is patched on Linux x86_64 alone; this is {system} {machine}")
    if python_tag() not in wanted.wheels:
        tags = ", ".join(wanted.wheels)
        raise WheelError(
            f"lmdeploy {wanted.version} has no wheel for {python_tag()}; it has {tags}"
        )
