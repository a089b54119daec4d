"""A planner without a compiler: small, greedy and honest, for tests of the loop."""

import dataclasses

import numpy as np

from sagec.runtime.plan import Chunks, Decodes, ExecutionPlan, Moves, Preemptions, Rows
from sagec.runtime.state import ANY, Decision, State


def column(values):
    return np.array(list(values), np.int64)


def table(kind, rows):
    """Columns of `kind` from tuples in the order of its fields."""
    fields = kind.__struct_fields__
    return kind(**{name: column(row[i] for row in rows) for i, name in enumerate(fields)})


@dataclasses.dataclass
class Row:
    """A request as one instance's plan sees it."""

    id: str
    prompt: int
    computed: int
    remaining: int
    decode_on: int
    arriving: bool = False
    blocks: int = 0
    until: int = 0


@dataclasses.dataclass
class DirectPlanner:
    """Prompts in chunks under a step budget, all residents decode, KV goes where there is room."""

    chunk_tokens: int = 32
    step_tokens: int = 64
    horizon: int = 8
    announce: bool = True

    def plan(self, state: State, decision: Decision) -> list[ExecutionPlan]:
        rows = self._residents(state, decision)
        preempted = [[] for _ in rows]
        for r, how in zip(
            decision.preempt_rows.tolist(), decision.preempt_how.tolist(), strict=True
        ):
            preempted[state.running.instance[r]].append((state.running.ids[r], how))
        self._admit(state, decision, rows)
        alive = np.flatnonzero(state.instances.alive).tolist()
        plans = [self._plan(state, i, rows, preempted[i]) for i in alive]
        return [plan for plan in plans if plan is not None]

    def _residents(self, state: State, decision: Decision) -> list[list[Row]]:
        rows = [[] for _ in range(len(state.instances))]
        running = state.running
        leaving = set(decision.preempt_rows.tolist())
        for r in range(len(running)):
            if r not in leaving:
                rows[running.instance[r]].append(
                    Row(
                        running.ids[r],
                        int(running.prompt_tokens[r]),
                        int(running.computed_tokens[r]),
                        int(running.remaining_tokens[r]),
                        int(running.decode_on[r]),
                        bool(running.arriving[r]),
                    )
                )
        return rows

    def _admit(self, state: State, decision: Decision, rows: list[list[Row]]) -> None:
        instances, waiting = state.instances, state.waiting
        free = (instances.kv_blocks - instances.kv_blocks_used).copy()
        for w in decision.admitted.tolist():
            prompt = int(waiting.prompt_tokens[w])
            serves = instances.model == waiting.model[w]
            blocks = -(-(prompt + 1) // instances.block_tokens)
            prefills = np.flatnonzero(instances.prefills & serves & (free >= blocks))
            if not len(prefills):
                continue
            source = target = int(prefills[np.argmax(free[prefills])])
            if instances.role[source] == "prefill":
                decodes = np.flatnonzero(instances.decodes & serves)
                if not len(decodes):
                    continue
                target = int(decodes[np.argmax(free[decodes])])
            if decision.prefill_on[w] != ANY:
                source = int(decision.prefill_on[w])
                target = target if instances.role[source] == "prefill" else source
            if decision.decode_on[w] != ANY:
                target = int(decision.decode_on[w])
            free[source] -= blocks[source]
            if target != source:
                free[target] -= blocks[target]
            rows[source].append(
                Row(waiting.ids[w], prompt, 0, int(waiting.generate_tokens[w]), target)
            )

    def _plan(self, state, i, all_rows, preempted) -> ExecutionPlan | None:
        here = all_rows[i]
        announced = [
            dataclasses.replace(row, arriving=True)
            for j, others in enumerate(all_rows)
            for row in others
            if self.announce and j != i and row.decode_on == i
        ]
        rows = self._with_blocks(state, i, here + announced)
        if not rows and not preempted:
            return None
        chunks, first_decode, steps = self._schedule(rows, i)
        names = [row.id for row in rows] + [name for name, _ in preempted]
        peers = tuple(state.instances.ids.tolist())
        moving = [r for r, row in enumerate(rows) if row.decode_on != i]
        return ExecutionPlan(
            plan_id=f"round-{state.round}-{peers[i]}",
            round=state.round,
            target_instance_id=peers[i],
            mode="hybrid",
            num_steps=max(steps, self.horizon),
            max_step_tokens=self.step_tokens,
            peers=peers,
            request_ids=tuple(names),
            rows=table(
                Rows,
                [(row.prompt, row.computed, row.blocks, 0) for row in rows]
                + [(0, 0, 0, 0) for _ in preempted],
            ),
            chunks=table(Chunks, chunks),
            decodes=table(
                Decodes, [(r, first_decode[r], rows[r].until) for r in sorted(first_decode)]
            ),
            preemptions=table(
                Preemptions, [(len(rows) + k, how) for k, (_, how) in enumerate(preempted)]
            ),
            imports=table(
                Moves, [(r, 0, row.prompt) for r, row in enumerate(rows) if row.arriving]
            ),
            exports=table(Moves, [(r, rows[r].decode_on, rows[r].prompt) for r in moving]),
        )

    def _with_blocks(self, state: State, i: int, rows: list[Row]) -> list[Row]:
        """Rows that fit, each with blocks for what it has and as much of the horizon as goes."""
        block = int(state.instances.block_tokens[i])
        free = int(state.instances.kv_blocks[i])
        fitting = []
        for row in rows:
            held = max(row.prompt, row.computed)
            row.blocks = -(-(held + (row.decode_on == i)) // block)
            if row.blocks <= free:
                free -= row.blocks
                fitting.append(row)
        for row in fitting:
            held = max(row.prompt, row.computed)
            wanted = held + min(self.horizon, row.remaining)
            more = min(free, max(0, -(-wanted // block) - row.blocks))
            if row.decode_on == i:
                free -= more
                row.blocks += more
            row.until = min(wanted, row.blocks * block)
        return fitting

    def _schedule(self, rows: list[Row], i: int):
        """Chunks, first come first served beside the decodes, and from where on rows decode."""
        first_decode = {
            r: 0
            for r, row in enumerate(rows)
            if row.decode_on == i and (row.arriving or row.computed >= row.prompt)
        }
        chunks, step, left = [], 0, self.step_tokens - len(first_decode)
        for r, row in enumerate(rows):
            begin = row.computed
            while not row.arriving and begin < row.prompt:
                if left <= 0:
                    step += 1
                    left = max(1, self.step_tokens - len(first_decode))
                end = min(row.prompt, begin + min(self.chunk_tokens, left))
                chunks.append((step, r, begin, end, int(end == row.prompt)))
                left -= end - begin
                begin = end
                if begin < row.prompt:
                    left = 0
                elif row.decode_on == i:
                    first_decode[r] = step + 1
        return chunks, first_decode, step + 1 + self.horizon
