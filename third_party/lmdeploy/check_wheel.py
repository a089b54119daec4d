"""Hold wheels of lmdeploy against VERSION and abi.h; needs g++, gdb, nm and readelf.

    pip download --no-deps --only-binary=:all: --python-version 3.12 \\
        --platform manylinux2014_x86_64 lmdeploy==0.11.0
    python -m sagec.third_party.lmdeploy.check_wheel lmdeploy-0.11.0-cp312-*.whl

A library outside of a wheel, as the installed one, will do too. It says whether the library has the
known checksum, exports every function that abi.h names and calls it through its PLT, and whether
every field that abi.h declares lies where abi.h has it in the library's debug information.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
ABI = FOLDER.parent / "patches" / "lmdeploy" / "abi.h"

TYPES = {
    "SequenceManager::Outcome": "Outcome",
    "SequenceManager::BlockConfig": "BlockConfig",
    "core::Buffer": "Buffer",
    "core::Tensor": "Tensor",
    "core::Allocator": "Allocator",
} | {
    name: name
    for name in (
        *("Sequence", "SequenceManager", "Block", "BlockManager", "BlockTrie", "Snapshot"),
        *("Request", "BatchState", "GenerationState", "LlamaBatch"),
    )
}
"""turbomind's types to those of abi.h."""

OPAQUE = re.compile(r"unused\d*|rest|pad")
"""Fields of abi.h that only take up room."""


class Field(NamedTuple):
    """A field of a type: bytes from its beginning, bytes that it takes, its name.

    depth: 1 for a field of the type itself, more for one of a struct in it.
    """

    offset: int
    size: int
    name: str
    depth: int


def main() -> int:
    """Check each wheel; 1 where anything differs."""
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        ours = declared(Path(scratch))
        faults = [fault for path in sys.argv[1:] for fault in check(Path(path), ours, scratch)]
    return 1 if faults else 0


def check(path: Path, ours: dict[str, list[Field]], scratch: str) -> list[str]:
    """What differs in a wheel, or in a library that lies outside of one; printed too."""
    library, known = _library_of(path, Path(scratch))
    faults = []
    if (found := hashlib.sha256(library.read_bytes()).hexdigest()) != known["sha256"]:
        faults.append(f"sha256 is {found}, known is {known['sha256']}")
    names = _names()
    faults += _seams(library, names)
    there = _layouts(library, [f"'turbomind::{theirs}'" for theirs in TYPES])
    for fields, mine in zip(there, TYPES.values(), strict=True):
        faults += differences(fields, ours[mine], mine)
    num_fields = sum(map(len, ours.values()))
    fine = (
        f"checksum, {len(names)} functions and {num_fields} fields of {len(TYPES)} types are as "
        "VERSION and abi.h have them"
    )
    for line in faults or [fine]:
        print(f"{path.name}: {line}")
    return faults


def _library_of(path: Path, scratch: Path) -> tuple[Path, dict[str, str]]:
    """The library in a wheel, or itself, and what VERSION says of it."""
    found = re.search(r"-(cp\d+)-|cpython-(\d+)-", path.name)
    if found is None:
        sys.exit(f"{path}: neither a wheel of lmdeploy nor a _turbomind*.so by its name")
    tag = found.group(1) or f"cp{found.group(2)}"
    wheels = tomllib.loads((FOLDER / "VERSION").read_text("utf-8"))["wheels"]
    if tag not in wheels:
        sys.exit(f"{path}: no wheel for {tag} is known; there are: {', '.join(wheels)}")
    known: dict[str, str] = wheels[tag]
    if path.suffix == ".so":
        return path, known
    return Path(zipfile.ZipFile(path).extract(known["library"], scratch / tag)), known


def _names() -> list[str]:
    """The mangled names in abi.h."""
    text = ABI.read_text("utf-8")
    prefixes = dict(re.findall(r'#define (SAGEC_\w+) "(\w+)"', text))
    literals = re.findall(r'inline constexpr char \w+\[\] =\s*((?:\w+\s*)?)"(\w+)"', text)
    return [prefixes.get(prefix.strip(), "") + rest for prefix, rest in literals]


def _seams(library: Path, names: list[str]) -> list[str]:
    exported = set(_output("nm", "-D", "--defined-only", str(library)).split())
    relocations = _output("readelf", "-rW", str(library))
    called = set(re.findall(r"JUMP_SLOT?\s+\S+\s+(\S+)", relocations))
    return [f"{name} is not exported" for name in names if name not in exported] + [
        f"{name} is not called through the PLT" for name in names if name not in called
    ]


def declared(scratch: Path) -> dict[str, list[Field]]:
    """The fields of abi.h's types as the compiler lays them out."""
    lines = [f'#include "{ABI}"', "using namespace sagec::tm;"]
    lines += [f"{name} of_{name};" for name in TYPES.values()]
    source, built = scratch / "ours.cc", scratch / "ours.so"
    source.write_text("\n".join(lines))
    flags = ("-std=c++17", "-g", "-D_GLIBCXX_USE_CXX11_ABI=0", "-shared", "-fPIC", "-w")
    subprocess.run(["g++", *flags, str(source), "-o", str(built)], check=True)
    found = _layouts(built, [f"of_{name}" for name in TYPES.values()])
    return {
        name: [each for each in fields if each.depth == 1 and not OPAQUE.fullmatch(each.name)]
        for name, fields in zip(TYPES.values(), found, strict=True)
    }


def differences(theirs: list[Field], ours: list[Field], name: str) -> list[str]:
    """Our fields that begin where none of theirs does, or are larger; smaller is a part of it."""
    there: dict[int, int] = {}
    for field in theirs:
        there[field.offset] = max(field.size, there.get(field.offset, 0))
    return [
        f"{name}.{field.name}: {field.size} bytes at {field.offset}, and no such field there"
        for field in ours
        if field.size > there.get(field.offset, 0)
    ]


def _layouts(library: Path, names: list[str]) -> list[list[Field]]:
    """The fields of each type, or of each variable's, in the debug information."""
    command = ["gdb", "-batch", "-nx", "-ex", "set print type methods off"]
    for name in names:
        command += ["-ex", "echo @@\\n", "-ex", f"ptype /o {name}"]
    return [_fields(text) for text in _output(*command, str(library)).split("@@\n")[1:]]


def _fields(text: str) -> list[Field]:
    """The fields that gdb shows of a type, and those of structs among them."""
    found: list[Field] = []
    begun: list[tuple[int, int]] = []
    for line in text.splitlines():
        if place := re.match(r"/\*\s+(\d+)\s+\|\s+(\d+) \*/", line):
            begun.append((int(place.group(1)), int(place.group(2))))
        elif line.endswith("{"):
            begun.append((0, 0))
        ends = re.search(r"(\w+)(?:\[\d+\])?;$", line)
        if ends and (place or "}" in line):  # those without a place are static
            found.append(Field(*begun.pop(), ends.group(1), len(begun)))
    return found


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
