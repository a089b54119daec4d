"""How long recorded steps took, against what the compiler predicted of them.

for times in step_times(Recording("serve.rec")):
    print(times.instance, times.ratio_p50)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from sagec.runtime.recording import Recording, Round
from sagec.runtime.recording.columns import unpack
from sagec.runtime.recording.entries import Step
from sagec.runtime.telemetry.metrics import HIT_RATIO


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """The steps of an instance whose time was predicted: how many, medians in µs, and measured
    over predicted time. num_close: steps within 25% of it. num_unknown: steps without one, as of
    plans that are not in the recording."""

    instance: str
    num_steps: int
    num_unknown: int
    predicted_us: float | None
    measured_us: float | None
    ratio_p50: float | None
    ratio_p99: float | None
    num_close: int

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        return dataclasses.asdict(self)


def step_times(recording: Recording) -> list[StepTimes]:
    """A row an instance, in the order of their first steps. Several like steps in one, as a
    simulator reports them, count as so many that took the mean."""
    predicted: dict[str, npt.NDArray[np.int64]] = {}
    found: dict[str, list[tuple[float, float]]] = {}
    for entry in recording.everything():
        if isinstance(entry, Round):
            for note in entry.plans:
                predicted[note.plan_id] = unpack(note.step_us, note.num_estimates)
        elif isinstance(entry, Step):
            known = predicted.get(entry.plan_id, np.zeros(0))
            pairs = found.setdefault(entry.instance, [])
            pairs += _pairs(entry, known[entry.step : entry.step + entry.steps].tolist())
    return [_of(instance, pairs) for instance, pairs in found.items()]


def _pairs(step: Step, predicted_us: list[int]) -> Iterable[tuple[float, float]]:
    """Predicted and measured time of each step; predicted 0 where nobody said."""
    measured_us = (step.end_us - step.begin_us) / step.steps
    known = [*predicted_us, *[0] * (step.steps - len(predicted_us))]
    return [(each, measured_us) for each in known]


def _of(instance: str, pairs: list[tuple[float, float]]) -> StepTimes:
    table = np.array(pairs, np.float64)
    told = table[table[:, 0] > 0]
    unknown = len(table) - len(told)
    if not len(told):
        return StepTimes(instance, 0, unknown, None, None, None, None, 0)
    predicted_us, measured_us = np.median(told, axis=0).tolist()
    ratio = told[:, 1] / told[:, 0]
    p50, p99 = np.quantile(ratio, (0.5, 0.99)).tolist()
    close = int(np.count_nonzero(np.abs(ratio - 1) <= HIT_RATIO))
    return StepTimes(
        instance=instance,
        num_steps=len(told),
        num_unknown=unknown,
        predicted_us=round(predicted_us, 1),
        measured_us=round(measured_us, 1),
        ratio_p50=round(p50, 3),
        ratio_p99=round(p99, 3),
        num_close=close,
    )
