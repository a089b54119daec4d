"""What tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.turbomind_child import Child


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    """A process that runs TurboMind, for the tests of a file; it starts when first called.

    What those of another file left running in it would stand in the toy's trace.
    """
    child = Child()
    yield child
    child.close()
