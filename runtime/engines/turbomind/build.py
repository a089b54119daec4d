"""libsagec_turbomind.so, built from third_party/patches/lmdeploy with the system's C++ compiler."""

import os
from pathlib import Path

from sagec import third_party
from sagec.runtime.compiled import Recipe

PATCHES = Path(third_party.__file__).parent / "patches" / "lmdeploy"

LANGUAGE = ("-std=c++17", "-D_GLIBCXX_USE_CXX11_ABI=0")
"""TurboMind's wheels are built with the old strings of GCC's C++ library."""

WARNINGS = ("-Wall", "-Wextra", "-Wno-invalid-offsetof")


def build(library_sha256: str) -> Path:
    """The patches for the TurboMind library with this checksum, built unless the cache has them.

    Raises Unbuilt.
    """
    return recipe(library_sha256).build()


def recipe(library_sha256: str) -> Recipe:
    """How the patches are built.

    For tests, SAGEC_SANITIZE names sanitizers, as "address,undefined"; whoever starts Python
    preloads their runtime.
    """
    exports = f"-Wl,--version-script={PATCHES / 'exports.map'}"
    return Recipe(
        name="libsagec_turbomind",
        sources=sorted(PATCHES.glob("*.cc")),
        flags=(*LANGUAGE, *optimised(), *WARNINGS, "-fvisibility=hidden", "-pthread", exports),
        key=(library_sha256,),
    )


def optimised() -> tuple[str, ...]:
    """-O2, or what the sanitizers of SAGEC_SANITIZE need."""
    if sanitizers := os.environ.get("SAGEC_SANITIZE"):
        return ("-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=undefined")
    return ("-O2",)
