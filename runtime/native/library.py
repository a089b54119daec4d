"""The native simulation as a library: columns in, turns, columns out."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sagec.runtime.compiled import Recipe, Unbuilt, cache_folder

FOLDER = Path(__file__).parent

FLAGS = ("-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-fvisibility=hidden")
"""Floats are to be those of Python, so nothing may be contracted."""

TURNS = 20_000
"""Of the loop, in one call: a fraction of a second, for an interrupt is heard in between."""

Column = npt.NDArray[np.int64] | npt.NDArray[np.float64]
"""Numbers that a run is told, or tells."""


BlocksOf = Callable[[int, int], Sequence[int]]
"""The blocks of a request, by its number, with so many tokens of output behind its prompt."""

_PLAN = ctypes.CFUNCTYPE(ctypes.c_int)
_BLOCKS_OF = ctypes.CFUNCTYPE(
    ctypes.c_int64, ctypes.c_int32, ctypes.c_int64, ctypes.POINTER(ctypes.c_void_p)
)


class NotCovered(Exception):
    """A run that is left to Python; its text is the reason."""


class CoreError(RuntimeError):
    """A run that went wrong in a way that no input explains."""


def recipe() -> Recipe:
    """How the library is built."""
    return Recipe(name="simulation", sources=sorted(FOLDER.glob("*.cc")), flags=(*FLAGS, "-O2"))


def is_built() -> bool:
    """Whether it lies in the cache, so that using it costs no compiling."""
    return recipe().built() is not None


class Run:
    """A run in the library: told `columns`, then served, then asked what came of it."""

    def __init__(self, columns: Mapping[str, Column]) -> None:
        """Raises Unbuilt where there is no library."""
        self._library = load()
        self._handle = self._library.sagec_run_new()
        self._asked: Any = None
        self._answer: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._error: BaseException | None = None
        self._put(columns)

    def ask(self, plan: Callable[[], Mapping[str, Column]], blocks_of: BlocksOf | None) -> None:
        """Have the run ask for what it does not know itself, before `serve`.

        plan: of a round, whose state is in the columns, the plans. blocks_of: None: nobody caches.
        """

        def answer_blocks(request: int, output_tokens: int, at: Any) -> int:
            assert blocks_of is not None
            self._answer = np.array(blocks_of(request, output_tokens), np.int64)
            at[0] = self._answer.ctypes.data
            return len(self._answer)

        def answer_plans() -> int:
            self._put(plan())
            return 0

        asked = _PLAN(self._guarded(answer_plans)), _BLOCKS_OF(self._guarded(answer_blocks))
        self._asked = asked if blocks_of is not None else (asked[0], _BLOCKS_OF())
        self._library.sagec_run_ask(self._handle, *self._asked)

    def _guarded(self, answer: Callable[..., int]) -> Callable[..., int]:
        """Nothing can be raised through the library: what is, `serve` raises."""

        def guarded(*arguments: Any) -> int:
            try:
                return answer(*arguments)
            except BaseException as error:
                self._error = error
                return -1

        return guarded

    def _put(self, columns: Mapping[str, Column]) -> None:
        for name, column in columns.items():
            kind = "floats" if column.dtype == np.float64 else "ints"
            put = getattr(self._library, f"sagec_run_put_{kind}")
            put(self._handle, name.encode(), column.ctypes.data, len(column))

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._library.sagec_run_free(self._handle)

    def serve(self) -> None:
        """Simulate to the end. Raises NotCovered, CoreError, and what was raised when it asked."""
        while (state := self._library.sagec_run_advance(self._handle, TURNS)) == 1:
            pass
        if self._error is not None:
            raise self._error
        if state:
            reason = self._library.sagec_run_reason(self._handle).decode()
            raise NotCovered(reason) if state == -1 else CoreError(reason)

    def ints(self, name: str) -> npt.NDArray[np.int64]:
        """A column of the result."""
        return self._column("ints", name, np.dtype(np.int64))

    def floats(self, name: str) -> npt.NDArray[np.float64]:
        """A column of the result."""
        return self._column("floats", name, np.dtype(np.float64))

    def _column(self, kind: str, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        at = ctypes.c_void_p()
        count = getattr(self._library, f"sagec_run_{kind}")(
            self._handle, name.encode(), ctypes.byref(at)
        )
        if not count:
            return np.zeros(0, dtype)
        return np.frombuffer(ctypes.string_at(at.value or 0, 8 * count), dtype)


def lists(name: str, rows: Sequence[Sequence[float]], dtype: Any = np.int64) -> dict[str, Column]:
    """A column of lists: all their values, and `<name>.at`, where each begins and the last ends."""
    at = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=at[1:])
    flat = np.fromiter(itertools.chain.from_iterable(rows), dtype, int(at[-1]))
    return {name: flat, f"{name}.at": at}


def load() -> ctypes.CDLL:
    """The library, built unless it is there, which takes its time. Raises Unbuilt."""
    found = _loaded(os.environ.get("CXX", ""), cache_folder())
    if isinstance(found, Unbuilt):
        raise found
    return found


@functools.cache
def _loaded(_compiler: str, _folder: Path) -> ctypes.CDLL | Unbuilt:
    """The library, or why there is none: a compiler that fails is not asked again and again."""
    try:
        library = ctypes.CDLL(str(recipe().build()))
    except Unbuilt as error:
        return error
    handle, number, text = ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p
    signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "new": (handle, ()),
        "free": (None, (handle,)),
        "put_ints": (None, (handle, text, handle, number)),
        "put_floats": (None, (handle, text, handle, number)),
        "ask": (None, (handle, _PLAN, _BLOCKS_OF)),
        "advance": (ctypes.c_int, (handle, number)),
        "reason": (text, (handle,)),
        "ints": (number, (handle, text, handle)),
        "floats": (number, (handle, text, handle)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"sagec_run_{name}")
        function.restype, function.argtypes = result, arguments
    return library
