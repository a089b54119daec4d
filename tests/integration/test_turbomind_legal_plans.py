"""No plan that passes `legalize` makes TurboMind's scheduler abort, or gives a wrong token.

TurboMind runs with the toy maths in a process of its own, so that an abort is a failure that shows
the serving it happened in; see `tests/turbomind_plans.py` for what is drawn.
"""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import HealthCheck, event, given, settings

from sagec.runtime.engines.turbomind.toy.reference import generate
from tests.turbomind_child import Child
from tests.turbomind_here import needs_turbomind
from tests.turbomind_plans import Outcome, Serving, expected, servings, wrong

pytestmark = needs_turbomind

NO_HURRY_US = 120_000_000
"""A deadline that no loop on a busy machine misses: each step is to be one that a plan decided."""


def served(child: Child, serving: Serving) -> Outcome:
    answer = child.call(
        "tests.turbomind_plans",
        "on_turbomind",
        serving=msgspec.to_builtins(serving),
        options={"deadline_us": str(NO_HURRY_US)},
    )
    return msgspec.convert(answer, Outcome)


def check(child: Child, serving: Serving) -> None:
    outcome = served(child, serving)
    for what in ("preempted", "swapped", "moves", "reused_tokens"):
        event(f"{what}: {'some' if getattr(outcome, what) else 'none'}")
    assert wrong(serving, outcome, expected(serving, generate)) == []
    # KV that comes may find no room yet, a cache less than it had: then a row computes less than
    # planned. Nobody computes more.
    assert [one for one in outcome.deviations if one[2] <= one[3]] == []
    assert outcome.conformance["at_deadline"] == outcome.conformance["stock"] == 0


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(serving=servings())
def test_tokens_of_legal_plans_are_exact_and_nothing_is_computed_that_is_not_planned(
    child: Child, serving: Serving
) -> None:
    check(child, serving)


@pytest.mark.slow
@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(serving=servings(most_requests=14))
def test_over_thousands_of_steps(child: Child, serving: Serving) -> None:
    check(child, serving)
