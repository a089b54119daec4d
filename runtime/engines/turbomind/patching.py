"""TurboMind of this process, patched: the right wheel, built, loaded, seams, self-test, slots.

Whatever is not as the patches expect ends in a PatchError, and TurboMind stays as it was.
"""

import contextlib
import ctypes
import functools
import importlib.util
import os
import sys
import threading
from pathlib import Path

from sagec.runtime.compiled import Unbuilt
from sagec.runtime.engines.turbomind.build import build
from sagec.runtime.engines.turbomind.native import Native, NativeError
from sagec.runtime.engines.turbomind.wheel import Wheel, WheelError, supported

MODULE = "_turbomind"


class PatchError(RuntimeError):
    """TurboMind is not patched, and stock; says why and what would help."""


_lock = threading.Lock()
_patched: Native | None = None


def ensure_patched() -> Native:
    """The patches, applied to this process's TurboMind, which is imported unless it was.

    A second call finds what the first one did. Raises PatchError.
    """
    global _patched
    with _lock:
        if _patched is None:
            native = load()
            try:
                native.apply()
            except NativeError as error:
                raise PatchError(f"TurboMind cannot be patched, and stays stock: {error}") from None
            _patched = native
        return _patched


def patched() -> Native | None:
    """The patches of this process, None where none are applied."""
    return _patched


def load() -> Native:
    """The patches, loaded beside this process's TurboMind and not applied. Raises PatchError."""
    try:
        wheel = supported()
        path = build(wheel.sha256)
        import_turbomind(wheel)
        return Native(path)
    except (WheelError, NativeError) as error:
        raise PatchError(str(error)) from None
    except Unbuilt as error:
        raise PatchError(f"the patches of TurboMind cannot be built: {error}") from None


def import_turbomind(wheel: Wheel) -> None:
    """Import `_turbomind` from this wheel, where it is not imported yet.

    Raises PatchError where it does not load, or another one is loaded.
    """
    if (module := sys.modules.get(MODULE)) is not None:
        loaded = Path(str(module.__file__))
        if not loaded.samefile(wheel.library):
            raise PatchError(f"{loaded} is loaded, and not the {wheel.library} of this Python")
        return
    spec = importlib.util.spec_from_file_location(MODULE, wheel.library)
    assert spec is not None and spec.loader is not None  # its name ends as an extension's does
    os.environ.setdefault("TM_LOG_LEVEL", "ERROR")  # it reads that once
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise PatchError(f"TurboMind does not load: {error}; {_REMEDY[has_driver()]}") from None
    sys.modules[MODULE] = module


@functools.cache
def has_driver() -> bool:
    """Whether there is an NVIDIA driver; asked once, before stand-ins take its place."""
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        return True
    return False


_REMEDY = {
    True: "its CUDA libraries are: pip install nvidia-cuda-runtime-cu12==12.8.90 "
    "nvidia-cublas-cu12==12.8.4.1 nvidia-nccl-cu12==2.27.3",
    False: "there is no NVIDIA driver here; the engine option maths=toy runs TurboMind's own "
    "scheduler on the CPU, with a toy model",
}
"""What to do where TurboMind does not load, by whether there is a driver."""
