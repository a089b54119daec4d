"""Strategies and engines there are, found by their files; none is loaded."""

from __future__ import annotations

import importlib.util
import pkgutil


def strategies() -> list[str]:
    """Names of the strategies.

    >>> "fifo" in strategies()
    True
    """
    return [name.replace("_", "-") for name in _modules("sagec.runtime.strategies")]


def engines() -> list[str]:
    """The engines that can run here or that plans can be compiled for."""
    return sorted({*_modules("sagec.runtime.engines"), *_modules("sagec.lowering.targets")})


def _modules(package: str) -> list[str]:
    """Names of the public modules in a package, none of which is loaded."""
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec else None
    names = (module.name for module in pkgutil.iter_modules(places))
    return sorted(name for name in names if not name.startswith("_"))
