"""What tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.turbomind_child import Child


@pytest.fixture(scope="session")
def child() -> Iterator[Child]:
    """A process that runs TurboMind, for all tests; it starts when first called."""
    child = Child()
    yield child
    child.close()
