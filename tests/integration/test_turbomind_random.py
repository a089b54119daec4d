"""Whatever is decided, TurboMind never aborts, its tokens are exact and it computes what was said.

Random requests and decisions against the wheel's own engine over the toy model, in a process of its
own; a run that kills it fails with its case.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.turbomind_child import Child
from tests.turbomind_here import needs_turbomind

pytestmark = needs_turbomind

REQUESTS = st.tuples(
    st.integers(0, 60),  # the question at which it comes
    st.sampled_from([0, 16, 32, 40]),  # tokens that it shares with others
    st.integers(1, 70),  # tokens of its own
    st.integers(1, 14),  # tokens to generate
    st.one_of(st.just(0), st.just(0), st.integers(1, 80)),  # the question at which it is cancelled
)


def cases(requests: st.SearchStrategy[Any], least: int, most: int) -> st.SearchStrategy[Any]:
    """Any instance, and so many requests for it; the largest needs eight blocks of 16 tokens."""
    return st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**32),
            "requests": st.lists(requests, min_size=least, max_size=most),
            "kv_blocks": st.sampled_from([8, 9, 12, 20, 120]),
            "prefix_cache": st.booleans(),
            "tp": st.sampled_from([1, 1, 1, 2]),
            "step_tokens": st.sampled_from([64, 256]),
            "max_batch": st.sampled_from([1, 4, 16]),
            "strict": st.booleans(),
            "wild": st.booleans(),
            "stalls": st.booleans(),
        }
    )


CASES = cases(REQUESTS, 4, 12)


def unhurried(max_examples: int) -> Any:
    """Settings of a test whose examples take long because an engine runs in each."""
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(max_examples=max_examples, suppress_health_check=slow)


@unhurried(max_examples=60)
@given(case=CASES)
def test_tokens_are_exact_whatever_is_decided(child: Child, case: dict[str, Any]) -> None:
    assert child.call("tests.turbomind_random", "run", case=case) >= 0


@pytest.mark.slow
@unhurried(max_examples=600)
@given(case=CASES)
def test_tokens_are_exact_whatever_is_decided_for_long(child: Child, case: dict[str, Any]) -> None:
    assert child.call("tests.turbomind_random", "run", case=case) >= 0
