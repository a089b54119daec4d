"""From a step as TurboMind computed it to the report of it; the rows are written on the way."""

from collections.abc import Collection
from dataclasses import dataclass, field

from sagec.runtime.engines import DecidedBy, StepReport
from sagec.runtime.engines.turbomind.abi import (
    BY_ANSWER,
    BY_DEADLINE,
    BY_PLAN,
    BY_STOCK,
    ROW_SAMPLED,
)
from sagec.runtime.engines.turbomind.native_events import Step, StepRow
from sagec.runtime.engines.turbomind.rows import Row
from sagec.runtime.request import FinishReason

DECIDED_BY = {
    BY_STOCK: DecidedBy.STOCK,
    BY_PLAN: DecidedBy.PLAN,
    BY_ANSWER: DecidedBy.ANSWER,
    BY_DEADLINE: DecidedBy.DEADLINE,
}


@dataclass
class Settlement:
    """What a step did to the rows of this instance, in the order in which they stand in it."""

    chunks: list[tuple[str, int, int]] = field(default_factory=list)
    decodes: list[str] = field(default_factory=list)
    tokens: list[tuple[str, int, int]] = field(default_factory=list)
    finished: list[tuple[str, FinishReason]] = field(default_factory=list)
    reused: list[tuple[str, int]] = field(default_factory=list)
    deviations: list[tuple[str, int, int]] = field(default_factory=list)

    def settle(self, row: Row, part: StepRow, leaving: Collection[str]) -> FinishReason | None:
        """Write a row's part of the step down; why the request ends with it, if it does.

        leaving: requests that go to another instance when their first token is sampled.
        """
        id, begin, end, num_output = row.id, part.begin, part.end, row.num_output
        if part.planned_end != end:
            self._deviate(row, part)
        if end > begin:
            if num_output and begin == len(row.tokens) - 1:
                self.decodes.append(id)
            else:
                self.chunks.append((id, begin, end))
            row.computed = end
            if row.reused:
                self.tell_reused(row)
        if not part.flags & ROW_SAMPLED:
            return None
        reason = row.append(part.token, id in leaving)
        if reason is None or row.num_output > num_output:
            self.tokens.append((id, num_output, part.token))
        if reason is not None:
            self.finished.append((id, reason))
        return reason

    def tell_reused(self, row: Row) -> None:
        """Tell what a row began with, once."""
        if row.reused:
            self.reused.append((row.id, row.reused))
            row.reused = 0

    def _deviate(self, row: Row, part: StepRow) -> None:
        planned, computed = max(part.planned_end - part.begin, 0), part.end - part.begin
        joins_later = row.arrived is not None and not computed  # nobody waits for its KV
        if planned != computed and not joins_later:
            self.deviations.append((row.id, planned, computed))

    def report(self, step: Step, instance: str, plan_id: str) -> StepReport:
        """The report of the step that did this."""
        return StepReport(
            instance=instance,
            plan_id=plan_id,
            step=step.plan_step,
            begin_us=step.begin_us,
            end_us=step.end_us,
            chunks=tuple(self.chunks),
            decodes=tuple(self.decodes),
            tokens=tuple(self.tokens),
            finished=tuple(self.finished),
            kv_blocks_used=step.active_blocks,
            reused=tuple(self.reused),
            deviations=tuple(self.deviations),
            decided_by=DECIDED_BY[step.decided_by],
        )
