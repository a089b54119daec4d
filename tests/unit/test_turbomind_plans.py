"""A plan on TurboMind: what of it is left, what it costs nothing to refuse, and what a step did."""

from __future__ import annotations

import pytest

from sagec.runtime.engines import DecidedBy, KVHandle
from sagec.runtime.engines.turbomind import abi
from sagec.runtime.engines.turbomind.native_events import Exported, Step, StepRow
from sagec.runtime.engines.turbomind.plans import Running, columns, refuse_unsupported
from sagec.runtime.engines.turbomind.prefixes import Published
from sagec.runtime.engines.turbomind.reports import Settlement
from sagec.runtime.engines.turbomind.rows import Row, check_sampling
from sagec.runtime.kv import block_hashes
from sagec.runtime.plan import Acceleration, ExecutionPlan, PlanError
from sagec.runtime.request import FinishReason, Sampling
from sagec.runtime.row import Refused
from tests.torch_engines import plan, request

SAMPLED = abi.ROW_SAMPLED


def row(id: str = "a", prompt: int = 10, computed: int = 0, **fields: object) -> Row:
    given = {"stops": frozenset({7}), "max_tokens": 64, "room_tokens": 48, **fields}
    asked = request(id, tuple(range(100, 100 + prompt)))
    return Row(request=asked, session=1, tokens=list(asked.prompt), computed=computed, **given)


def running(given: ExecutionPlan) -> Running:
    """The plan at work, its rows posted under session 1 as `row` has it."""
    made = Running(given, 1)
    made.sessions = dict.fromkeys(given.request_ids, 1)
    return made


def part(begin: int, end: int, planned: int, token: int = 0, flags: int = 0) -> StepRow:
    return StepRow(1, begin, end, planned, token, flags)


# Plans


def test_the_columns_name_rows_by_session_and_say_what_is_reused() -> None:
    given = plan("i0", {"a": 10, "b": 20}, chunks=[(0, "b", 16, 20)], reuses={"b": 16})
    running = Running(given, 3)
    running.sessions = {"b": 12, "a": 11}
    posted = columns(running)
    assert posted.plan == 3
    assert posted.sessions.tolist() == [11, 12]
    assert posted.reused_tokens.tolist() == [0, 16]
    assert posted.chunk_row.tolist() == [1]


def test_a_chunk_is_left_until_its_step_has_gone_by_or_its_tokens_are_computed() -> None:
    at_work = running(plan("i0", {"a": 10}, chunks=[(0, "a", 0, 4), (2, "a", 4, 10)]))
    assert at_work.has_left(row())
    at_work.step = 1
    assert at_work.has_left(row(computed=4))
    assert not at_work.has_left(row(computed=10))
    assert not at_work.has_left(row(computed=2)), "its next chunk begins behind a gap"
    at_work.step = 2
    assert not at_work.has_left(row(computed=4))


def test_a_row_decodes_until_its_tokens_are_computed_and_only_when_its_prompt_is() -> None:
    at_work = running(plan("i0", {"a": 10}, decodes={"a": 12}))
    assert not at_work.has_left(row(computed=9)), "its prompt is not computed"
    assert at_work.has_left(row(computed=10))
    assert not at_work.has_left(row(computed=12))
    at_work.is_over = True
    assert not at_work.has_left(row(computed=10))


def test_a_chunk_behind_tokens_that_nobody_has_is_refused_with_its_place() -> None:
    at_work = running(plan("i0", {"a": 10}, chunks=[(3, "a", 6, 10)], plan_id="p9"))
    said = "plan 'p9' step 3: chunk [6, 10) leaves a gap: only 2 tokens are computed"
    assert at_work.gap_of(row(computed=2)) == said
    assert at_work.gap_of(row(computed=6)) == ""
    kept = Exported(1, 8, 64, 0, 0)
    assert at_work.gap_of(row(kept=kept)) == "", "it was swapped out"
    assert at_work.gap_of(row("b")) == "", "the plan computes nothing of it"


def test_a_chunk_beyond_the_request_is_refused() -> None:
    at_work = running(plan("i0", {"a": 10}, chunks=[(0, "a", 0, 4), (1, "a", 4, 12)]))
    assert at_work.gap_of(row()).endswith("chunk [0, 12) goes beyond the request's 10 tokens")


def test_what_the_prefix_cache_is_thought_to_have_is_no_gap() -> None:
    given = plan("i0", {"a": 10}, chunks=[(0, "a", 8, 10)], reuses={"a": 8})
    assert running(given).gap_of(row()) == ""
    assert running(given).has_left(row())


def test_kv_that_was_kept_counts_as_computed() -> None:
    at_work = running(plan("i0", {"a": 10}, decodes={"a": 12}))
    assert at_work.has_left(row(kept=Exported(1, 10, 64, 0, 0)))


def test_nothing_is_left_of_a_row_that_the_plan_has_under_another_session() -> None:
    at_work = running(plan("i0", {"a": 10}, chunks=[(0, "a", 0, 10)]))
    at_work.sessions = {"a": 2}
    assert not at_work.has_left(row())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (plan("i1", {}), "is for 'i1'; this is 'i0'"),
        (plan("i0", {}, max_step_tokens=0), "max_step_tokens is 0; 1 at least"),
        (plan("i0", {}, evictions=[3]), "TurboMind's own, which evicts by itself"),
        (plan("i0", {}, migrations=[(3, 0, 1)]), "migrations: the prefix cache"),
    ],
)
def test_a_plan_is_refused_for_what_turbomind_cannot_do(given: ExecutionPlan, said: str) -> None:
    with pytest.raises(PlanError, match=said.replace(".", r"\.")):
        refuse_unsupported(given, "i0")


@pytest.mark.parametrize("wish", [{"draft_tokens": 2}, {"quantization": "awq"}])
def test_no_plan_changes_how_the_model_was_loaded(wish: dict[str, object]) -> None:
    given = ExecutionPlan(
        plan_id="p",
        round=0,
        target_instance_id="i0",
        mode="hybrid",
        num_steps=1,
        max_step_tokens=1,
        acceleration=Acceleration(**wish),  # type: ignore[arg-type]
    )
    with pytest.raises(PlanError, match="runs as it was loaded"):
        refuse_unsupported(given, "i0")


# Steps


def test_a_chunk_that_ends_the_prompt_samples_and_a_decode_follows() -> None:
    settled, one = Settlement(), row()
    assert settled.settle(one, part(4, 10, 10, 55, SAMPLED), ()) is None
    assert settled.settle(one, part(10, 11, 11, 56, SAMPLED), ()) is None
    assert (settled.chunks, settled.decodes) == ([("a", 4, 10)], ["a"])
    assert settled.tokens == [("a", 0, 55), ("a", 1, 56)]
    assert (one.computed, one.output, settled.deviations) == (11, (55, 56), [])


def test_a_stop_token_ends_the_request_and_is_no_part_of_its_output() -> None:
    settled, one = Settlement(), row()
    assert settled.settle(one, part(0, 10, 10, 7, SAMPLED), ()) is FinishReason.STOP
    assert (settled.tokens, settled.finished) == ([], [("a", FinishReason.STOP)])


def test_the_room_here_is_no_bound_for_who_leaves() -> None:
    stays, leaves = row(room_tokens=11), row(room_tokens=11)
    said = part(0, 10, 10, 5, SAMPLED)
    assert Settlement().settle(stays, said, ()) is FinishReason.LENGTH
    assert Settlement().settle(leaves, said, {"a"}) is None


def test_what_was_computed_otherwise_than_planned_is_a_deviation() -> None:
    settled = Settlement()
    settled.settle(row("less"), part(0, 4, 10), ())
    settled.settle(row("none"), part(0, 0, 10), ())
    settled.settle(row("more"), part(0, 4, 0), ())
    settled.settle(row("done", computed=8), part(8, 8, 6), ())
    assert settled.deviations == [("less", 10, 4), ("none", 10, 0), ("more", 0, 4)]


def test_a_row_whose_kv_is_still_to_come_is_not_behind_its_plan() -> None:
    handle = KVHandle(
        request=request("late", (1,)),
        source="p0",
        target="d0",
        output=(5,),
        computed_tokens=10,
        layout="",
        place="",
        num_bytes=0,
        begin_us=0,
    )
    settled = Settlement()
    settled.settle(row("late", arrived=handle), part(0, 0, 11), ())
    settled.settle(row("anew", arrived=handle), part(0, 4, 11), ())
    assert settled.deviations == [("anew", 11, 4)]


def test_what_a_row_reuses_is_told_once_with_the_first_step_that_computes_it() -> None:
    settled, one = Settlement(), row(reused=8)
    settled.settle(one, part(8, 8, 0), ())
    assert settled.reused == []
    settled.settle(one, part(8, 9, 9), ())
    settled.settle(one, part(9, 10, 10), ())
    assert settled.reused == [("a", 8)]


def test_a_report_says_who_decided_the_step() -> None:
    step = Step(1, 0, 4, abi.BY_DEADLINE, 5, 6, 3, 2, 1, ())
    report = Settlement().report(step, "i0", "p")
    assert report.decided_by is DecidedBy.DEADLINE
    assert (report.step, report.begin_us, report.end_us, report.kv_blocks_used) == (4, 5, 6, 3)


# Requests


def test_what_turbomind_would_die_of_is_refused() -> None:
    with pytest.raises(Refused, match="top_k 2000; TurboMind has 1024 at most"):
        check_sampling(request("a", (3,), sampling=Sampling(top_k=2000)))
    check_sampling(request("a", (3,), sampling=Sampling(top_k=1024)))


def test_turbomind_looks_out_for_as_many_stop_tokens_as_it_can() -> None:
    assert row(stops=frozenset(range(60))).watched == list(range(32))


# The prefix cache


def test_blocks_are_told_by_hash_when_they_come_and_when_they_go() -> None:
    published, tokens = Published(4), list(range(12))
    first, second, third = block_hashes(tokens, 4)
    published.store(tokens, [10, 11])
    stored, evicted = published.take_changes()
    assert ({*stored}, evicted) == ({first, second}, ())
    published.store(tokens, [10, 11, 12])
    published.evict([11, 99])
    stored, evicted = published.take_changes()
    assert (stored, evicted) == ((third,), (second,))
    assert published.take_changes() == ((), ())


def test_a_block_that_came_and_went_between_two_questions_is_not_told() -> None:
    published = Published(4)
    published.store([1, 2, 3, 4], [10])
    published.evict([10])
    assert published.take_changes() == ((), ())


def test_a_block_that_was_computed_again_is_gone_only_when_its_newer_place_is() -> None:
    published, tokens = Published(4), [1, 2, 3, 4]
    published.store(tokens, [10])
    published.store(tokens, [20])
    published.evict([10])
    assert published.take_changes() == (block_hashes(tokens, 4), ())
    published.evict([20])
    assert published.take_changes() == ((), block_hashes(tokens, 4))
