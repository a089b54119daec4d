"""What an instance, a request and a plan are at, for those who ask."""

from collections.abc import Iterable
from enum import StrEnum

import msgspec

from sagec.runtime.engines import Event, Failed, PlanDone, StepReport
from sagec.runtime.plan import ExecutionPlan

REMEMBERED_PLANS = 1024
"""Of so many plans that are no longer at work the status is kept."""


class RequestPhase(StrEnum):
    """Where a request stands: arriving is its KV, leaving what was told to leave its instance."""

    WAITING = "waiting"
    RUNNING = "running"
    ARRIVING = "arriving"
    LEAVING = "leaving"


class InstanceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """An instance now: error is "" while it lives, plan_id None while no plan is at work."""

    instance: str
    plan_id: str | None = None
    steps: int = 0
    kv_blocks_used: int = 0
    error: str = ""


class RequestStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A request that has not ended.

    instance: where it is or its KV goes; None while it waits. attempts: how often it was started
    over because an instance failed. reason: what the last round said of it, while it waits.
    """

    request_id: str
    phase: RequestPhase
    instance: str | None = None
    output_tokens: int = 0
    attempts: int = 0
    preemptions: int = 0
    reason: str = ""


class PlanStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A plan that an instance was given: steps of num_steps are done.

    ended: nothing is left to do of it. superseded_by: the plan that took over, None where none did.
    error: why its instance died under it, else "".
    """

    plan_id: str
    instance: str
    num_steps: int
    steps: int = 0
    ended: bool = False
    superseded_by: str | None = None
    error: str = ""


class StatusBoard:
    """Keeps the status of instances and plans, from the plans given and the events heard."""

    def __init__(self, instances: Iterable[str]) -> None:
        self._instances = {name: InstanceStatus(instance=name) for name in instances}
        self._plans: dict[str, PlanStatus] = {}
        self._steps: dict[str, int] = {}  # by plan

    def instance(self, name: str) -> InstanceStatus | None:
        """None where there is no such instance."""
        return self._instances.get(name)

    def plan(self, plan_id: str) -> PlanStatus | None:
        """None where no such plan was given, or so long ago that it is forgotten."""
        if (plan := self._plans.get(plan_id)) is None:
            return None
        return msgspec.structs.replace(plan, steps=self._steps[plan_id])

    def live(self) -> list[str]:
        """Names of the instances that have not failed."""
        return [name for name, status in self._instances.items() if not status.error]

    def at_work(self) -> list[str]:
        """Ids of the plans at work."""
        ids = (status.plan_id for status in self._instances.values())
        return [plan_id for plan_id in ids if plan_id is not None]

    def give(self, plan: ExecutionPlan) -> None:
        """An instance was given a plan."""
        name = plan.target_instance_id
        older = self._instances[name].plan_id
        if older is not None and older != plan.plan_id:
            self._end(older, superseded_by=plan.plan_id)
        self._update(name, plan_id=plan.plan_id)
        self._plans.pop(plan.plan_id, None)
        self._steps[plan.plan_id] = 0
        self._plans[plan.plan_id] = PlanStatus(
            plan_id=plan.plan_id, instance=name, num_steps=plan.num_steps
        )
        if len(self._plans) > REMEMBERED_PLANS + len(self._instances):
            oldest = next(iter(self._plans))
            del self._plans[oldest], self._steps[oldest]

    def hear(self, event: Event) -> None:
        """Something happened on an instance."""
        if isinstance(event, StepReport):
            self._step(event)
        elif isinstance(event, PlanDone):
            self._end(event.plan_id)
            if event.plan_id == self._instances[event.instance].plan_id:
                self._update(event.instance, plan_id=None)
        elif isinstance(event, Failed) and event.request_id is None:
            self.fail(event.instance, event.error)

    def fail(self, name: str, error: str) -> None:
        """An instance has failed, and its plan with it."""
        if (plan_id := self._instances[name].plan_id) is not None:
            self._end(plan_id, error=error)
        self._update(name, plan_id=None, error=error)

    def revive(self, name: str) -> None:
        """An instance that had failed lives again, empty."""
        self._update(name, kv_blocks_used=0, error="")

    def _step(self, report: StepReport) -> None:
        steps = self._instances[report.instance].steps + report.steps
        self._update(report.instance, steps=steps, kv_blocks_used=report.kv_blocks_used)
        if report.plan_id in self._steps:
            self._steps[report.plan_id] += report.steps

    def _update(self, name: str, **changes: object) -> None:
        self._instances[name] = msgspec.structs.replace(self._instances[name], **changes)

    def _end(self, plan_id: str, superseded_by: str | None = None, error: str = "") -> None:
        if (plan := self._plans.get(plan_id)) is None:
            return
        self._plans[plan_id] = msgspec.structs.replace(
            plan,
            ended=True,
            superseded_by=superseded_by or plan.superseded_by,
            error=error or plan.error,
        )
