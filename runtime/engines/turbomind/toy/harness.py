"""Stand-ins for CUDA and NCCL, and the toy model, loaded into this process under TurboMind.

A library that is loaded already satisfies whoever needs one of the same SONAME, so the stand-ins
need no place where the system looks for libraries, and nothing of NVIDIA's is downloaded or loaded.
"""

import ctypes
import dataclasses
import importlib
import importlib.util
import threading
from pathlib import Path

from sagec.runtime.compiled import Recipe, Unbuilt
from sagec.runtime.engines.turbomind.build import LANGUAGE, PATCHES, WARNINGS, optimised
from sagec.runtime.engines.turbomind.patching import PatchError, import_turbomind
from sagec.runtime.engines.turbomind.wheel import WheelError, supported

FOLDER = Path(__file__).parent

STAND_INS = {
    "libcuda.so.1": ("host_driver.c", "exports.map"),
    "libcudart.so.12": ("host_cuda.c", "cudart.map"),
    "libcublasLt.so.12": ("host_cublas.c", "cublas.map"),
    "libcublas.so.12": ("host_cublas.c", "cublas.map"),
    "libnccl.so.2": ("host_nccl.c", "exports.map"),
}
"""By the name that TurboMind's library needs: our source, and the versions of its symbols."""


class ToyError(RuntimeError):
    """The toy cannot be had in this process; says why and what would help."""


@dataclasses.dataclass(frozen=True)
class ToyStep:
    """A step as a rank's model computed it: session to the half-open range of its tokens."""

    rank: int
    rows: dict[int, tuple[int, int]]


class Toy:
    """The toy models of this process, from outside."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.sagec_toy_set_pace.argtypes = (ctypes.c_int64, ctypes.c_int64)
        library.sagec_toy_flip.argtypes = (ctypes.c_uint64, ctypes.c_int32, ctypes.c_int32)
        library.sagec_toy_trace.argtypes = (ctypes.c_int32,)
        library.sagec_toy_take_trace.argtypes = (ctypes.POINTER(ctypes.c_int64), ctypes.c_int64)
        library.sagec_toy_take_trace.restype = ctypes.c_int64
        library.sagec_toy_steps.restype = ctypes.c_int64

    @property
    def steps(self) -> int:
        """Steps that all engines of this process have computed."""
        return int(self._library.sagec_toy_steps())

    def set_pace(self, step_us: int = 0, token_us: int = 0) -> None:
        """How long a step and each of its tokens take the engines that are made from now on."""
        self._library.sagec_toy_set_pace(step_us, token_us)

    def flip(self, session: int, position: int, bit: int = 0) -> None:
        """Let the session's next step flip a bit of the KV of its token at `position`."""
        self._library.sagec_toy_flip(session, position, bit)

    def trace(self, on: bool = True) -> None:
        """Note every step from now on, or none; what was noted is forgotten."""
        self._library.sagec_toy_trace(on)

    def take_trace(self) -> list[ToyStep]:
        """The steps noted since the last call, of all engines and ranks, as they were computed."""
        capacity = 1024
        while True:
            numbers = (ctypes.c_int64 * capacity)()
            size = self._library.sagec_toy_take_trace(numbers, capacity)
            if size <= capacity:
                return _steps(numbers[:size])
            capacity = 2 * size


def _steps(numbers: list[int]) -> list[ToyStep]:
    steps, at = [], 0
    while at < len(numbers):
        rank, num_rows = numbers[at : at + 2]
        end = at + 2 + 3 * num_rows
        rows = [numbers[each : each + 3] for each in range(at + 2, end, 3)]
        steps.append(ToyStep(rank, {session: (begin, end) for session, begin, end in rows}))
        at = end
    return steps


_lock = threading.Lock()
_toy: Toy | None = None
_held: list[ctypes.CDLL] = []


def install() -> Toy:
    """TurboMind of this process with the toy in the place of its model; a second call is the first.

    Raises ToyError where it is loaded over real CUDA already, or something cannot be built.
    """
    global _toy
    with _lock:
        if _toy is None:
            _load_stand_ins()
            try:
                import_turbomind(supported())
            except (WheelError, PatchError) as error:
                raise ToyError(str(error)) from None
            _toy = Toy(_install_model())
        return _toy


def load_stand_ins() -> None:
    """Only CUDA and NCCL: enough to load TurboMind and look at it. Raises ToyError."""
    with _lock:
        _load_stand_ins()


def _load_stand_ins() -> None:
    if _held:
        return
    paths = build()
    if importlib.util.find_spec("torch") is not None:
        importlib.import_module("torch")  # one that is built for CUDA would need the real one later
    if real := cuda_libraries():
        raise ToyError(
            f"{real[0]} is loaded, so the toy's stand-in cannot take its place; use a process of "
            "its own, with a torch that is built for CPUs"
        )
    _held.extend([ctypes.CDLL(str(path)) for path in paths.values()])


def _install_model() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_built(_model())))
    library.sagec_toy_install.restype = ctypes.c_char_p
    if (refusal := library.sagec_toy_install()) is not None:
        raise ToyError(f"the toy model does not fit TurboMind: {refusal.decode()}")
    return library


def build() -> dict[str, Path]:
    """The stand-ins, built unless the cache has them. Raises ToyError."""
    return {soname: _built(_stand_in(soname)) for soname in STAND_INS}


def cuda_libraries() -> list[str]:
    """Paths of libraries loaded into this process that the stand-ins would be in the way of."""
    lines = Path("/proc/self/maps").read_text("utf-8").splitlines()
    paths = dict.fromkeys(line.split(maxsplit=5)[-1] for line in lines if "/" in line)
    names = {soname: soname.partition(".so")[0] + ".so" for soname in STAND_INS}
    return [path for path in paths if any(Path(path).name.startswith(n) for n in names.values())]


def _stand_in(soname: str) -> Recipe:
    source, exports = STAND_INS[soname]
    return Recipe(
        name=f"host-{soname.partition('.so')[0]}",
        sources=[FOLDER / source],
        flags=(
            *("-std=gnu11", *optimised(), "-Wall", "-Wextra", "-pthread"),
            *(f"-Wl,-soname,{soname}", f"-Wl,--version-script={FOLDER / exports}"),
        ),
    )


def _model() -> Recipe:
    exports = f"-Wl,--version-script={FOLDER / 'exports.map'}"
    return Recipe(
        name="toy-model",
        sources=[FOLDER / "toy_model.cc", PATCHES / "library.cc"],
        flags=(*LANGUAGE, *optimised(), *WARNINGS, "-pthread", exports),
        includes=[PATCHES],
    )


def _built(recipe: Recipe) -> Path:
    try:
        return recipe.build()
    except Unbuilt as error:
        raise ToyError(f"the toy cannot be built: {error}") from None
