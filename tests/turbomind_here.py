"""Whether this machine can run TurboMind over the toy model."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest


def torch_has_cuda() -> bool:
    """Whether torch is built for CUDA, whose libraries then leave no place for the toy's.

    Its version.py says so; to import it takes seconds.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    told = Path(spec.origin).with_name("version.py").read_text("utf-8")
    return re.search(r"^cuda\b.*= *['\"]", told, re.MULTILINE) is not None


_MISSING = [
    what
    for what, is_here in (
        ("lmdeploy (pip install --no-deps lmdeploy==0.11.0)", importlib.util.find_spec("lmdeploy")),
        ("a C++ compiler", shutil.which("c++")),
        ("a torch that is built for CPUs", not torch_has_cuda()),
    )
    if not is_here
]

needs_turbomind = pytest.mark.skipif(
    bool(_MISSING), reason=f"TurboMind over the toy model needs {' and '.join(_MISSING)}"
)
