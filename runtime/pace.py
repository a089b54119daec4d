"""How fast instances are: estimated at first, then measured from what they report."""

from collections.abc import Sequence

import numpy as np

from sagec.runtime.cost import StepCost
from sagec.runtime.engines import StepReport
from sagec.runtime.state import Ints

WEIGHT = 0.125
"""Of a new measurement in the mean: about the last eight steps count."""


class Pace:
    """Smoothed times of each instance, as columns; what a mixed step took beside its decodes is
    its prompt tokens'."""

    def __init__(self, costs: Sequence[StepCost | None]) -> None:
        """costs: what to believe of each instance until it has reported; None: nothing."""
        self._prefill_ns = [_prefill_ns(cost) for cost in costs]
        self._decode_us = [0.0 if c is None else c.one_step_us(1, 1, 1, 1) for c in costs]
        self._measured: set[tuple[int, bool]] = set()

    @property
    def prefill_ns_per_token(self) -> Ints:
        """What a prompt token adds to a step, by instance; 0 where nobody knows."""
        return _column(self._prefill_ns)

    @property
    def decode_step_us(self) -> Ints:
        """What a step of decodes takes, by instance; 0 where nobody knows."""
        return _column(self._decode_us)

    def note(self, instance: int, report: StepReport) -> None:
        """Take a step into account; one that computed nothing, for all was cached, says nothing."""
        if not (report.chunks or report.decodes):
            return
        step_us = (report.end_us - report.begin_us) / report.steps
        prompt_tokens = sum(end - begin for _, begin, end in report.chunks) / report.steps
        if not prompt_tokens:
            self._mix(self._decode_us, instance, step_us, False)
            return
        if report.decodes:
            step_us = max(0.0, step_us - self._decode_us[instance])
        self._mix(self._prefill_ns, instance, 1e3 * step_us / prompt_tokens, True)

    def _mix(self, means: list[float], instance: int, value: float, prefill: bool) -> None:
        if (instance, prefill) in self._measured:
            means[instance] += WEIGHT * (value - means[instance])
        else:
            self._measured.add((instance, prefill))
            means[instance] = value


def _prefill_ns(cost: StepCost | None) -> float:
    return 0.0 if cost is None else 1e3 * float(cost.prefill_us(0, 1))


def _column(values: list[float]) -> Ints:
    column: Ints = np.array(values).astype(np.int64)
    column.flags.writeable = False
    return column
