"""Examples in docstrings give what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import sagec


def modules() -> list[str]:
    """Every module of sagec that has an example."""
    found = []
    for module in pkgutil.walk_packages(sagec.__path__, "sagec."):
        spec = module.module_finder.find_spec(module.name, None)
        if spec and spec.origin and not module.name.endswith("__main__"):
            with open(spec.origin, encoding="utf-8") as file:
                if ">>> " in file.read():
                    found.append(module.name)
    return found


@pytest.mark.parametrize("name", modules())
def test_the_examples_of_a_module_run(name: str) -> None:
    if name.startswith("sagec.runtime.engines.torch"):
        pytest.importorskip("torch")
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0
