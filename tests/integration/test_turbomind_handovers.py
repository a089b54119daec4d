"""Whatever becomes of KV between two TurboMinds, neither aborts and no request's tokens change.

Random requests, moves and decisions against the wheel's own engine over the toy model, in a process
of its own; a run that kills it fails with its case.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from tests.integration.test_turbomind_random import cases, unhurried
from tests.turbomind_child import Child
from tests.turbomind_handovers import FATES
from tests.turbomind_here import needs_turbomind

pytestmark = needs_turbomind

LEGS = st.lists(st.tuples(st.integers(1, 25), st.sampled_from(FATES)), max_size=4)

REQUESTS = st.tuples(
    st.integers(0, 40),  # the turn at which it comes
    st.sampled_from([0, 16, 32, 40]),  # tokens that it shares with others
    st.integers(1, 70),  # tokens of its own
    st.integers(1, 14),  # tokens to generate
    LEGS,
)

CASES = cases(REQUESTS, 3, 10)


def check(child: Child, case: dict[str, Any]) -> None:
    counters = child.call("tests.turbomind_handovers", "run", case=case)
    for what in ("exports", "imports", "refused_imports", "preemptions", "matched_tokens"):
        event(f"{what}: {'some' if counters[what] else 'none'}")


@unhurried(max_examples=25)
@given(case=CASES)
def test_requests_that_move_between_engines_keep_their_tokens(
    child: Child, case: dict[str, Any]
) -> None:
    check(child, case)


@pytest.mark.slow
@unhurried(max_examples=400)
@given(case=CASES)
def test_requests_that_move_between_engines_keep_their_tokens_for_long(
    child: Child, case: dict[str, Any]
) -> None:
    check(child, case)
