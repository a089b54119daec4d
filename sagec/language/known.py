"""Strategies and engines there are, found by their files; none is loaded."""

from __future__ import annotations

import importlib.util
import pkgutil


def strategies() -> list[str]:
    """Names of the strategies.

    >>> "fifo" in strategies()
    True
    """
    return [name.replace("_", "-") for name in _modules("sagec.runtime.strategies", packages=False)]


def engines() -> list[str]:
    """The engines that can run here or that plans can be compiled for."""
    return sorted({*_modules("sagec.runtime.engines"), *_modules("sagec.lowering.targets")})


def _modules(package: str, packages: bool = True) -> list[str]:
    """Names of the public modules in a package, perhaps with packages; none of them is loaded."""
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec else None
    found = pkgutil.iter_modules(places)
    names = (module.name for module in found if packages or not module.ispkg)
    return sorted(name for name in names if not name.startswith("_"))
