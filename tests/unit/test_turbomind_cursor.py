"""The plan cursor in C++ picks what runtime/cursor.py picks."""

from __future__ import annotations

import ctypes
import functools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagec.runtime.cursor import PlanCursor
from sagec.runtime.engines.turbomind import abi, build
from sagec.runtime.plan import Chunks, Decodes, ExecutionPlan, Reuses, Rows
from tests.direct_planner import table

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")

MANY = 64


@dataclass
class Resident:
    """A request on the instance, as both cursors see it."""

    id: str
    num_tokens: int
    computed: int

    @property
    def decodes(self) -> bool:
        return self.num_tokens - self.computed == 1


@dataclass
class Roomy:
    """Residents of an instance whose memory has no end."""

    rows: dict[str, Resident] = field(default_factory=dict)
    has_lost_any: bool = False

    def begin(self, row: Resident) -> None:
        """There is no prefix cache here."""

    def make_room(self, row: Resident, tokens: int) -> bool:
        """Always."""
        return True

    def never_fits(self, row: Resident, tokens: int) -> str:
        """Everything fits."""
        return ""


@functools.cache
def library() -> Any:
    """The native library; TurboMind itself is not needed to ask its cursor."""
    return abi.load(str(build.build("")))


class NativeCursor:
    """The cursor in C++ over a plan; a session's number is its row in the plan, from 1."""

    def __init__(self, plan: ExecutionPlan) -> None:
        self._ids = plan.request_ids
        self._columns = columns_of(plan)  # while the plan is read, which is copied
        self._cursor = library().sagec_tm_cursor_new(native_plan(plan, self._columns))

    def next(self, rows: dict[str, Resident]) -> tuple[int, list[tuple[str, int]]]:
        """The plan's step, and (request, end) of each pick."""
        asked = (abi.Row * MANY)()
        for at, row in zip(asked, rows.values(), strict=False):
            at.session = self._ids.index(row.id) + 1
            at.context, at.computed = row.num_tokens, row.computed
        items, step = (abi.Item * MANY)(), ctypes.c_int64()
        count = library().sagec_tm_cursor_next(self._cursor, asked, len(rows), items, MANY, step)
        return step.value, [(self._ids[item.session - 1], item.end) for item in items[:count]]

    @property
    def num_gaps(self) -> int:
        """Chunks that were left out so far."""
        return int(library().sagec_tm_cursor_gaps(self._cursor))

    def close(self) -> None:
        """Free what C++ allocated."""
        library().sagec_tm_cursor_free(self._cursor)


def columns_of(plan: ExecutionPlan) -> dict[str, npt.NDArray[np.int64]]:
    """Columns of sagec_tm_plan, by name."""
    rows, chunks, decodes = plan.rows, plan.chunks, plan.decodes
    reused = np.zeros(len(plan.request_ids), np.int64)
    reused[plan.reuses.row] = plan.reuses.tokens
    return {
        "sessions": np.arange(1, len(plan.request_ids) + 1),
        "prompt_tokens": rows.prompt_tokens,
        "reused_tokens": reused,
        "chunk_step": chunks.step,
        "chunk_row": chunks.row,
        "chunk_begin": chunks.begin,
        "chunk_end": chunks.end,
        "decode_row": decodes.row,
        "decode_begin_step": decodes.begin_step,
        "decode_until_tokens": decodes.until_tokens,
    }


def native_plan(plan: ExecutionPlan, columns: dict[str, npt.NDArray[np.int64]]) -> abi.Plan:
    """The plan as the native side reads it."""
    native = abi.Plan(1, plan.num_steps, plan.max_step_tokens, plan.mixes_phases)
    native.num_rows, native.num_chunks = len(plan.request_ids), len(plan.chunks)
    native.num_decodes = len(plan.decodes)
    for name, column in columns.items():
        setattr(native, name, column.ctypes.data)
    return native


NUM_STEPS, NUM_ROWS = 6, 5
STEP, ROW, TOKENS = st.integers(0, NUM_STEPS - 1), st.integers(0, NUM_ROWS - 1), st.integers(0, 40)


@st.composite
def plans(draw: st.DrawFn) -> ExecutionPlan:
    """Any plan of five requests over six steps; good ones are among them."""
    prompts = draw(st.lists(st.integers(1, 40), min_size=NUM_ROWS, max_size=NUM_ROWS))
    chunks = draw(st.lists(st.tuples(STEP, ROW, TOKENS, st.integers(1, 30)), max_size=12))
    if draw(st.booleans()):
        chunks = list(in_order(chunks))
    chunks = sorted((step, row, begin, begin + size) for step, row, begin, size in chunks)
    member = st.tuples(ROW, STEP, st.integers(1, 60))
    decodes = draw(st.lists(member, max_size=6, unique_by=lambda decode: decode[0]))
    reuses = draw(st.lists(st.tuples(ROW, TOKENS), max_size=3, unique_by=lambda reuse: reuse[0]))
    return ExecutionPlan(
        plan_id="p",
        round=1,
        target_instance_id="i0",
        mode=draw(st.sampled_from(["hybrid", "time-share"])),
        num_steps=NUM_STEPS,
        max_step_tokens=draw(st.sampled_from([1, 2, 8, 64, 512])),
        request_ids=tuple(f"r{row}" for row in range(NUM_ROWS)),
        rows=table(Rows, [(prompt, 0, 9, 0) for prompt in prompts]),
        chunks=table(Chunks, [(*chunk, 0) for chunk in chunks]),
        decodes=table(Decodes, decodes),
        reuses=table(Reuses, reuses),
    )


def in_order(chunks: list[tuple[int, int, int, int]]) -> Iterator[tuple[int, int, int, int]]:
    """The chunks with each beginning where the request's last one ended."""
    computed = dict.fromkeys(range(NUM_ROWS), 0)
    for step, row, _, size in sorted(chunks):
        yield step, row, computed[row], size
        computed[row] += size


@given(plan=plans(), data=st.data())
def test_both_cursors_pick_the_same(plan: ExecutionPlan, data: st.DataObject) -> None:
    python: PlanCursor[Resident] = PlanCursor(plan)
    native, residents = NativeCursor(plan), Roomy()
    try:
        for _ in range(2 * NUM_STEPS):
            come_and_go(residents, plan, data)
            picks = python.next_picks(residents)
            step, items = native.next(residents.rows)
            assert items == [(pick.row.id, pick.end) for pick in picks]
            if not residents.has_lost_any:
                assert native.num_gaps == len(python.failures)
            if not picks:
                continue
            assert step == python.step
            python.step += 1
            for pick in picks:
                pick.row.computed = pick.end
                pick.row.num_tokens += pick.samples
    finally:
        native.close()


def come_and_go(residents: Roomy, plan: ExecutionPlan, data: st.DataObject) -> None:
    """Some requests arrive, with some KV or none; some that are there leave."""
    moving = st.lists(st.tuples(ROW, st.sampled_from([0, 5, 20, 40])), max_size=NUM_ROWS)
    for row, computed in data.draw(moving, label="come or go, with so many tokens computed"):
        id = plan.request_ids[row]
        if residents.rows.pop(id, None) is not None:
            residents.has_lost_any = True
        else:
            prompt = int(plan.rows.prompt_tokens[row])
            computed = min(computed, prompt)
            residents.rows[id] = Resident(id, prompt + (computed == prompt), computed)
