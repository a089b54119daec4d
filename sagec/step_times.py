"""How long recorded steps took, against what the compiler predicted of them; and whether they
computed what they were told to.

for times in step_times(Recording("serve.rec")):
    print(times.instance, times.ratio_p50, times.conformance)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from sagec.explain import counted
from sagec.runtime.conformance import NO_STEPS, Conformance
from sagec.runtime.engines import DecidedBy
from sagec.runtime.recording import Recording, Round
from sagec.runtime.recording.columns import unpack
from sagec.runtime.recording.entries import Came, Step
from sagec.runtime.telemetry.metrics import HIT_RATIO


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """The steps of an instance whose time was predicted: how many, medians in µs, and measured
    over predicted time. num_close: steps within 25% of it. num_unknown: steps without one, as of
    plans that are not in the recording. deviations: a line each."""

    instance: str
    num_steps: int
    num_unknown: int
    predicted_us: float | None
    measured_us: float | None
    ratio_p50: float | None
    ratio_p99: float | None
    num_close: int
    conformance: Conformance = NO_STEPS
    deviations: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        return dataclasses.asdict(self)


def step_times(recording: Recording) -> list[StepTimes]:
    """A row an instance, in the order of their first steps. Several like steps in one, as a
    simulator reports them, count as so many that took the mean."""
    predicted: dict[str, npt.NDArray[np.int64]] = {}
    found: dict[str, list[tuple[float, float]]] = {}
    steps: dict[str, list[Step]] = {}
    ids: dict[int, str] = {}
    for entry in recording.everything():
        if isinstance(entry, Round):
            for note in entry.plans:
                predicted[note.plan_id] = unpack(note.step_us, note.num_estimates)
        elif isinstance(entry, Came):
            ids[entry.number] = entry.request.id
        elif isinstance(entry, Step):
            known = predicted.get(entry.plan_id, np.zeros(0))
            pairs = found.setdefault(entry.instance, [])
            pairs += _pairs(entry, known[entry.step : entry.step + entry.steps].tolist())
            steps.setdefault(entry.instance, []).append(entry)
    return [
        dataclasses.replace(
            _of(instance, pairs),
            conformance=Conformance.of(steps[instance]),
            deviations=tuple(line for step in steps[instance] for line in deviations(step, ids)),
        )
        for instance, pairs in found.items()
    ]


def deviations(step: Step, ids: Mapping[int, str]) -> Iterator[str]:
    """What the step computed otherwise, a line a request; who decided, where no plan did.

    ids: of the requests, by number.
    """
    where = f"step {step.step} of {step.plan_id} on {step.instance}"
    if not step.plan_id:
        where = f"a step of {step.instance}"
    if step.decided_by is DecidedBy.DEADLINE:
        yield f"{where}: no decision came in time, it took its own"
    for number, planned, computed in step.deviations:
        name = ids.get(number, f"number {number}")
        yield f"{where}: planned {counted(planned, 'token')} of {name}, computed {computed}"


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
