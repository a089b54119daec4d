"""Shared libraries built from C and C++ with the system's compiler, and kept in a cache folder.

A build's name holds a hash of all that it was made of: sources, the headers beside them, flags, the
compiler. So nothing stale is ever found, two processes may build at once, and building a second
time is a look at the folder. Where there is no compiler, a build of the same sources that lies
there already will do. Behind each file lies its checksum, which loaders and linkers pass over: one
that was cut or damaged, which would end the process that loads it, is built again.
"""

import contextlib
import dataclasses
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent import futures
from functools import cache, cached_property, partial
from pathlib import Path

CPP = (".cc", ".cpp")
"""Suffixes of sources in C++; all others are C."""

_BESIDE = (".h", ".map")
"""What lies beside a source and is part of it: headers and version scripts."""


_SCRATCH = "building-"
"""How the folders begin in which compilers write."""


class Unbuilt(RuntimeError):
    """There is no library; says why, and what would help."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A shared library to be built, in C++ where a source ends in .cc.

    flags: of compiler and linker, without -shared -fPIC. key: what else the build depends on.
    includes: folders to look for headers in. CC and CXX name other compilers than cc and c++.
    """

    name: str
    sources: Sequence[Path]
    flags: tuple[str, ...] = ()
    key: tuple[object, ...] = ()
    includes: Sequence[Path] = ()

    def build(self) -> Path:
        """The library, `<cache>/<name>-<hash>-<compiler>.so`, built unless it is there.

        Raises Unbuilt where there is no compiler, it fails, or the cache cannot be written.
        """
        if (found := self.built()) is not None:
            return found
        compiler = self.compiler()
        if compiler is None:
            raise Unbuilt(
                f"no {self._language} compiler ({self._program}, or the one that {self._variable} "
                "names); on Debian: apt-get install g++"
            )
        return self._compile(compiler)

    def built(self) -> Path | None:
        """The library where the cache has it, else None."""
        compiler = self.compiler()
        ending = "*" if compiler is None else _hash(_version(compiler))[:8]
        found = sorted(cache_folder().glob(f"{self.name}-{self._made_of}-{ending}.so"))
        return next(filter(_is_whole, reversed(found)), None)

    def compiler(self) -> str | None:
        """Path of the compiler, None where there is none."""
        return shutil.which(self._program)

    @property
    def _language(self) -> str:
        return "C++" if any(source.suffix in CPP for source in self.sources) else "C"

    @property
    def _variable(self) -> str:
        return {"C": "CC", "C++": "CXX"}[self._language]

    @property
    def _program(self) -> str:
        return os.environ.get(self._variable) or {"C": "cc", "C++": "c++"}[self._language]

    @cached_property
    def _made_of(self) -> str:
        texts = [(source.name, source.read_bytes()) for source in self.sources]
        return _hash(texts, self._beside, self.flags, self.key, platform.machine())[:20]

    @cached_property
    def _beside(self) -> str:
        folders = dict.fromkeys([*(source.parent for source in self.sources), *self.includes])
        found = (path for each in folders for path in each.iterdir() if path.suffix in _BESIDE)
        return _hash([(path.name, path.read_bytes()) for path in sorted(found)])

    def _compile(self, compiler: str) -> Path:
        folder = cache_folder()
        stem = f"{self.name}-{self._made_of}-{_hash(_version(compiler))[:8]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder):
                if (found := self.built()) is not None:  # another process was faster
                    return found
                for left in folder.glob(f"**/{_SCRATCH}*"):  # by a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
                with futures.ThreadPoolExecutor(os.cpu_count()) as several:
                    objects = [*several.map(partial(self._object, compiler), self.sources)]
                command = [compiler, "-shared", *self.flags, *map(str, objects), "-lm"]
                return _make(command, folder / f"{stem}.so")
        except OSError as error:
            is_file = isinstance(error, FileExistsError | NotADirectoryError)
            why = "it is no folder" if is_file else error.strerror
            raise Unbuilt(
                f"{folder} cannot keep what is built: {why}; SAGEC_CACHE names another folder"
            ) from None

    def _object(self, compiler: str, source: Path) -> Path:
        """The source compiled; kept too, so that a change of another one does not compile it."""
        told = (source.name, source.read_bytes(), self._beside, self.flags, _version(compiler))
        path = cache_folder() / "objects" / f"{source.stem}-{_hash(*told)[:20]}.o"
        if _is_whole(path):
            return path
        path.parent.mkdir(exist_ok=True)
        includes = [f"-I{include}" for include in self.includes]
        return _make([compiler, "-c", "-fPIC", *self.flags, *includes, str(source)], path)


def compiled(
    name: str, sources: Sequence[Path], flags: Sequence[str] = (), key: Sequence[object] = ()
) -> Path:
    """The library of this `Recipe`, built unless the cache has it. Raises Unbuilt."""
    return Recipe(name=name, sources=sources, flags=tuple(flags), key=tuple(key)).build()


def cache_folder() -> Path:
    """Where builds are kept: SAGEC_CACHE, or sagec in XDG_CACHE_HOME, which is ~/.cache unless set.

    It need not exist yet.
    """
    if own := os.environ.get("SAGEC_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sagec"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time: what the first one builds, the others find."""
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _make(command: Sequence[str], path: Path) -> Path:
    """Run a command that writes to what -o says: `path`, which is there whole or not at all.

    Raises Unbuilt, with the first error that it names.
    """
    log = path.with_suffix(".log")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_SCRATCH) as scratch:
        fresh = Path(scratch) / path.name
        whole = [*command, "-o", str(fresh)]
        done = subprocess.run(whole, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            log.unlink(missing_ok=True)
            content = fresh.read_bytes()
            with fresh.open("ab") as file:
                file.write(hashlib.sha256(content).digest())
            return fresh.replace(path)
    log.write_text(f"{' '.join(whole)}\n{done.stderr}", encoding="utf-8")
    raise Unbuilt(f"{command[0]} failed: {_first_error(done.stderr)} (all that it said: {log})")


def _is_whole(path: Path) -> bool:
    """Whether a file is there as `_make` left it, with its checksum at its end."""
    try:
        content = memoryview(path.read_bytes())
    except OSError:
        return False
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


def _first_error(text: str) -> str:
    lines = text.splitlines()
    telling = [line for line in lines if re.search(r"error:|undefined reference", line)]
    first = (telling or lines or ["it does not say why"])[0]
    return re.sub(r"^\S*/", "", " ".join(first.split()))[:200]


@cache
def _version(compiler: str) -> str:
    """What a compiler says of itself; its path where it says nothing."""
    command = [compiler, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0] or compiler


def _hash(*told: object) -> str:
    return hashlib.sha256(repr(told).encode()).hexdigest()
