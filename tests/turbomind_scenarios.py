"""What the patched TurboMind is put through, over the toy model: each function is one scenario.

A scenario's name is the sentence that it proves; it raises where that does not hold. They run in a
process of their own (tests/turbomind_child.py), one after the other, through the C ABI alone.
"""

from __future__ import annotations

import ctypes
import itertools
import random
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from sagec.runtime.engines.turbomind import abi
from sagec.runtime.engines.turbomind.native import Move, NativeError, PlanColumns, Question
from sagec.runtime.engines.turbomind.native_events import (
    Evicted,
    Gap,
    LostKV,
    Matched,
    NotImported,
    PlanEnded,
    Stored,
)
from sagec.runtime.engines.turbomind.patching import ensure_patched
from sagec.runtime.engines.turbomind.sessions import SessionStatus
from sagec.runtime.engines.turbomind.toy import generate, install
from tests.turbomind_driven import (
    BLOCK_TOKENS,
    VOCAB,
    Decide,
    Driven,
    Items,
    Session,
    as_traced,
    at_most,
    computed,
    driven,
    exact,
    hold,
    only,
    shortest_first,
    text,
    whole,
)

# ---- stock


def tokens_are_exact_where_nothing_is_patched() -> None:
    with driven(patched=False) as one:
        exact(*one.finish(one.submit(text(n, seed=n), 12) for n in (5, 90, 300, 17)))


def tokens_are_exact_where_nobody_decides() -> None:
    with driven(decider=abi.STOCK) as one:
        exact(*one.finish(one.submit(text(n, seed=n), 12) for n in (5, 90, 300, 17)))
        assert {step.decided_by for step in one.steps} == {abi.BY_STOCK}
        as_traced(one)


def sessions_that_are_nobodys_stay_stock() -> None:
    with driven() as one, driven(patched=False) as stock:
        held = one.submit(text(60, seed=1), 5)
        exact(*stock.finish(stock.submit(text(n, seed=n), 12) for n in (5, 90, 300)))
        assert held.is_running and not one.steps
        exact(*one.finish([held]))


# ---- order, chunks, exclusion


def the_shortest_prompt_goes_first_though_it_came_last() -> None:
    with driven() as one:
        sessions = [one.submit(text(n, seed=n), 6) for n in (200, 90, 30)]
        one.hold_until(lambda question: len(question.rows) == 3)
        one.serve(shortest_first)
        exact(*sessions)
        sampled = [row.session for step in one.steps for row in step.rows if row.samples]
        assert list(dict.fromkeys(sampled)) == [session.id for session in reversed(sessions)]
        as_traced(one)


def prompts_are_cut_into_chunks_of_any_size(chunk: int) -> None:
    with driven() as one:
        sessions = [one.submit(text(n, seed=n), 5) for n in (130, 64, 97)]
        one.serve(at_most(chunk))
        exact(*sessions)
        for step in one.steps:
            assert all(row.end - row.begin <= chunk for row in step.rows)
            assert all(row.end == row.planned_end for row in step.rows)
        as_traced(one)


def who_is_not_named_computes_nothing() -> None:
    with driven() as one:
        first, second = (one.submit(text(n, seed=n), 8) for n in (60, 20))
        one.hold_until(lambda question: len(question.rows) == 2)
        one.serve(only(first.id), until=[first])
        assert second.id not in {row.session for step in one.steps for row in step.rows}
        one.serve(whole)
        exact(first, second)
        as_traced(one)


def a_sequence_pauses_and_goes_on() -> None:
    with driven() as one:
        paused, other = (one.submit(text(n, seed=n), 20) for n in (60, 45))
        one.hold_until(lambda question: len(question.rows) == 2)
        one.serve(only(paused.id), steps=6)
        one.serve(only(other.id), until=[other])
        one.serve(whole)
        exact(paused, other)
        as_traced(one)


def what_is_left_of_a_step_is_stocks_where_the_decision_is_not_strict() -> None:
    computed = {}
    for strict in (True, False):
        with driven(strict=strict) as one:
            sessions = [one.submit(text(n, seed=n), 6) for n in (40, 50, 30)]
            one.hold_until(lambda question: len(question.rows) == 3)
            one.serve(lambda question: whole(question)[:1])
            exact(*sessions)
            as_traced(one)
            computed[strict] = one.counters["unplanned_rows"]
    assert computed[True] == 0 and computed[False] > 0, computed


def a_decision_may_say_more_than_the_engine_can_take() -> None:
    """Prompts unfinished, more tokens than the step has, ends that are too far or gone by."""
    draw = random.Random(5)

    def greedy(question: Question) -> Items:
        return [(row.session, draw.randint(-5, row.context + 99)) for row in question.rows]

    with driven(step_tokens=64) as one:
        sessions = [one.submit(text(n, seed=n), 6) for n in (140, 50, 300)]
        one.serve(greedy)
        exact(*sessions)
        assert one.counters["missed_rows"] > 0
        as_traced(one)


def an_answer_that_makes_no_sense_is_refused_and_the_step_still_waits() -> None:
    with driven() as one:
        session = one.submit(text(20, seed=1), 4)
        question = one.hold_until(lambda question: len(question.rows) == 1)
        twice = [(session.id, 5), (session.id, 6)]
        for step, items in ((question.step, twice), (question.step + 1, []), (0, [])):
            why = refusal(partial(one.native.answer, step, items))
            assert str(step) in why
        one.answer(question, whole(question))
        one.serve(whole)
        exact(session)


def refusal(call: Callable[[], object]) -> str:
    """The line with which the native side refuses a call; an AssertionError where it does not."""
    try:
        call()
    except NativeError as error:
        assert str(error) and "\n" not in str(error)
        return str(error)
    raise AssertionError("it was not refused")


# ---- hold


def everything_is_held_while_requests_come_and_go() -> None:
    with driven(max_batch=8) as one:
        kept, gone = [], []
        one.submit(text(50, seed=0), 4)
        for number in range(6):
            one.serve(hold, steps=20)
            kept.append(one.submit(text(40 + number, seed=number), 5))
            gone.append(one.submit(text(30 + number, seed=9 * number), 5))
            one.serve(hold, steps=5)
            one.cancel(gone[-1])
        before = one.counters
        assert before["steps"] == 0, before
        assert before["held_steps"] >= 149, before  # the last answer may be on its way
        one.serve(whole)
        exact(*kept)
        assert {session.ended_by for session in gone} == {SessionStatus.CANCELLED}
        as_traced(one)


def a_batch_under_way_is_held_and_goes_on() -> None:
    with driven() as one:
        sessions = [one.submit(text(n, seed=n), 12) for n in (70, 33, 5)]
        draw = random.Random(4)
        one.serve(lambda question: [] if draw.random() < 0.8 else at_most(24)(question))
        exact(*sessions)
        assert one.counters["held_steps"] > 30
        as_traced(one)


# ---- memory


def sequences_are_preempted_where_memory_is_short_and_nothing_is_lost() -> None:
    with driven(kv_blocks=8) as one:
        sessions = [one.submit(text(n, seed=n), 25) for n in (50, 40, 61, 20)]
        turn = itertools.count()

        def rotating(question: Question) -> Items:
            items = whole(question)
            by = next(turn) // 4 % len(items)
            return items[by:] + items[:by]

        one.serve(rotating)
        exact(*sessions)
        assert one.counters["preemptions"] > 0
        assert one.counters["preemptions"] == len(one.of(LostKV))
        as_traced(one)


def evictions_are_told_to_the_log_and_to_the_callback() -> None:
    with driven(kv_blocks=8, prefix_cache=True) as one:
        called = one.watch_evictions()
        for seed in range(6):
            exact(*one.finish([one.submit(text(60, seed=seed), 6)]))
        logged = [uid for event in one.of(Evicted) for uid in event.uids]
        assert logged and sorted(logged) == sorted(called)
        assert one.counters["evicted_blocks"] == len(logged)


def a_request_may_fill_the_cache_to_its_last_block() -> None:
    with driven(kv_blocks=8) as one:
        exact(*one.finish([one.submit(text(115, seed=1), 11), one.submit(text(60, seed=2), 9)]))
        as_traced(one)


def blocks_are_counted_as_the_steps_use_them() -> None:
    with driven(kv_blocks=32) as one:
        one.submit(text(100, seed=1), 8)
        one.submit(text(40, seed=2), 8)
        for _ in range(6):
            one.serve(at_most(30), steps=1)
            question = one.hold_until(lambda question: True)
            totals, blocks = one.native.block_totals(), one.native.blocks()
            assert totals.active + totals.cached + totals.free == totals.num_blocks == 32
            assert (blocks["use_count"] > 0).sum() == totals.active
            needed = sum(-(-row.computed // BLOCK_TOKENS) for row in question.rows)
            assert totals.active == needed
        one.serve(whole)


# ---- prefix caching


FALLBACK_US, TRIES = 300_000, 3
"""Long enough for an answer. Where a machine stalls that long, TurboMind goes on by itself and
nothing goes wrong: what must go wrong gets another try."""


@contextmanager
def half_prefilled(guard: bool) -> Iterator[tuple[Driven, Session]]:
    """A prompt of which TurboMind itself computed the first 64 tokens, having blocks for all."""
    with driven(prefix_cache=True, guard=guard, step_tokens=64, deadline_us=FALLBACK_US) as one:
        slow = one.submit(text(100, seed=1), 6)
        one.wait_for(lambda: len(one.steps) == 1)
        assert computed(one.steps[0]) == [(slow.id, 0, 64)]
        yield one, slow


def a_prompt_overtakes_one_that_begins_alike(guard: bool) -> bool:
    """Whether all tokens were exact."""
    with half_prefilled(guard) as (one, slow):
        fast = one.submit(text(100, seed=1), 6)
        one.hold_until(lambda question: len(question.rows) == 2)
        one.serve(only(fast.id), until=[fast])
        one.serve(whole)
        return all(session.output == session.expected for session in (slow, fast))


def a_prompt_is_cancelled_and_comes_again(guard: bool) -> bool:
    """Whether the tokens of the second one were exact."""
    with half_prefilled(guard) as (one, slow):
        one.cancel(slow)
        one.serve(hold, until=[slow])
        (again,) = one.finish([one.submit(text(100, seed=1), 6)])
        return again.output == again.expected


def with_the_guard_a_prompt_may_overtake_one_that_begins_alike() -> None:
    assert a_prompt_overtakes_one_that_begins_alike(guard=True)


def without_the_guard_the_tokens_of_the_faster_one_are_wrong() -> None:
    assert not all(a_prompt_overtakes_one_that_begins_alike(guard=False) for _ in range(TRIES))


def with_the_guard_a_cancelled_prompt_may_come_again() -> None:
    assert a_prompt_is_cancelled_and_comes_again(guard=True)


def without_the_guard_the_tokens_of_the_second_one_are_wrong() -> None:
    assert not all(a_prompt_is_cancelled_and_comes_again(guard=False) for _ in range(TRIES))


def prefixes_are_cached_under_any_order(chunk: int) -> None:
    with driven(prefix_cache=True, kv_blocks=40) as one:
        draw = random.Random(chunk)
        for _ in range(4):
            sessions = [one.submit(text(n, seed=7), 6) for n in (100, 64, 130, 33, 100)]
            one.serve(shuffled(draw, chunk))
            exact(*sessions)
        assert one.counters["matched_tokens"] > 0
        assert one.of(Stored)
        assert one.of(Matched)
        as_traced(one)


def shuffled(draw: random.Random, chunk: int) -> Decide:
    """Any order, some left out, the last one perhaps in a chunk; now and then nobody at all."""

    def decide(question: Question) -> Items:
        rows = [row for row in question.rows if draw.random() < 0.7]
        draw.shuffle(rows)
        items = [(row.session, row.context) for row in rows]
        if rows and draw.random() < 0.5:
            items[-1] = (rows[-1].session, rows[-1].computed + draw.randint(1, chunk))
        return items

    return decide


def a_sequence_may_lose_blocks_from_its_middle() -> None:
    """Two compute one prefix each for itself; a third gets the blocks of both, and keeps one of the
    first one's when that is preempted. TurboMind itself would end the process here."""
    with driven(prefix_cache=True, kv_blocks=12) as one:
        first = one.submit(text(49, seed=1), 9)
        second = one.submit(text(32, seed=1) + text(30, seed=2), 9)
        one.hold_until(lambda question: len(question.rows) == 2)
        one.serve(whole, steps=1)
        third = one.submit(text(60, seed=1), 9)
        one.hold_until(lambda question: len(question.rows) == 3)
        one.serve(only(third.id), steps=1)
        large = one.submit(text(100, seed=3), 9)
        one.hold_until(lambda question: len(question.rows) == 4)
        one.serve(lambda question: whole(question)[2:], steps=1)
        one.serve(whole)
        assert first.id in {event.session for event in one.of(LostKV)}
        exact(first, second, third, large)
        as_traced(one)


def a_prompt_that_was_cancelled_half_way_leaves_nothing_wrong_behind() -> None:
    with driven(prefix_cache=True) as one:
        for computed in (16, 32, 48, 50, 99):
            half = one.submit(text(100, seed=computed), 6)
            one.hold_until(lambda question: len(question.rows) == 1)
            one.serve(until_computed(half, computed), steps=1)
            one.cancel(half)
            one.serve(hold, until=[half])
            exact(*one.finish([one.submit(text(100, seed=computed), 6)]))
        as_traced(one)


# ---- hand-over


def handed_over(
    source: Driven,
    target: Driven,
    prompt: Sequence[int],
    num_tokens: int,
    spoil: Callable[..., bytes] = bytes,
) -> Session:
    """Prefill on one engine, the rest on the other; `spoil` may change the blob on its way."""
    blob, first = source.prefill(prompt)
    session = target.expect(prompt, num_tokens, given=first)
    target.stage(session, spoil(blob))
    target.start(session)
    target.serve(whole)
    return session


def kv_is_handed_over(prefix_cache: bool, tp: int = 1) -> None:
    with (
        driven(prefix_cache=prefix_cache, tp=tp) as a,
        driven(prefix_cache=prefix_cache, tp=tp) as b,
    ):
        for n in (100, 16, 17, 7, 250):
            exact(handed_over(a, b, text(n, seed=n), 10))
        assert all(row.end - row.begin == 1 for step in b.steps for row in step.rows)
        assert b.counters["imports"] == 5 == a.counters["exports"]
        as_traced(b)


def kv_of_a_cancelled_session_goes_on_under_another_one(prefix_cache: bool) -> None:
    """What a preemption with its KV kept is: half a prompt, a whole one, or some of its output."""
    with driven(prefix_cache=prefix_cache) as one:
        for tokens in (1, 16, 50, 99, 100, 104):
            session = one.expect(text(100, seed=tokens), 8)
            one.native.migrate([Move(session.id)])
            one.start(session)
            while (
                one.hold_until(lambda question: len(question.rows) == 1).rows[0].computed < tokens
            ):
                one.serve(until_computed(session, tokens), steps=1)
            one.cancel(session)
            one.serve(hold, until=[session])
            blob = one.take_export(session)
            again = one.expect(session.prompt, 8, given=session.expected[: max(0, tokens - 99)])
            one.stage(again, blob)
            one.start(again)
            one.serve(whole)
            exact(again)
            first = next(row for step in one.steps for row in step.rows if row.session == again.id)
            assert first.begin == tokens
        as_traced(one)


def a_blob_that_was_altered_is_refused_and_the_prompt_computed_again() -> None:
    refused(lambda blob: flipped(blob, 64 + 5))
    refused(lambda blob: flipped(blob, len(blob) - 1))
    refused(lambda blob: flipped(blob, 33))
    refused(lambda blob: blob[:-1])
    refused(lambda blob: blob[:64])
    refused(lambda blob: blob[:10])
    refused(lambda blob: b"")
    refused(lambda blob: blob + b"\0")


def a_blob_of_another_layout_is_refused_and_the_prompt_computed_again() -> None:
    assert "layout" in refused(bytes, layout_seed=99)


def refused(spoil: Callable[[bytes], bytes], layout_seed: int = 1) -> str:
    """The line that refuses what comes so changed; what follows is an ordinary prefill."""
    with driven() as a, driven(layout_seed=layout_seed) as b:
        prompt = text(70, seed=3)
        blob, first = a.prefill(prompt)
        session = b.expect(prompt, 10, given=first)
        why = refusal(lambda: b.stage(session, spoil(blob)))
        b.start(session)
        b.serve(whole)
        exact(session)
        assert b.counters["imports"] == 0
        return why


def kv_that_is_wrong_but_signed_changes_the_tokens() -> None:
    """The control: if the checksum did not stand before it, one bit would be seen."""
    with driven() as a, driven() as b:
        session = handed_over(a, b, text(70, seed=3), 10, lambda blob: signed(flipped(blob, 64)))
        assert session.ended_by == SessionStatus.FINISHED and session.output != session.expected
        assert b.counters["imports"] == 1


def staged_without_room(a: Driven, b: Driven) -> tuple[Session, Session, bytes]:
    """A request that begins on b, which has 8 blocks, with KV of a; who fills b; and that KV."""
    prompt = text(100, seed=5)
    blob, first = a.prefill(prompt)
    filler = b.submit(text(60, seed=6), 8)
    b.serve(whole, steps=3)
    session = b.expect(prompt, 6, given=first)
    b.stage(session, blob)
    b.start(session)
    return session, filler, blob


def a_blob_with_no_room_or_too_long_means_an_ordinary_prefill() -> None:
    with driven() as a, driven(kv_blocks=8) as b:
        session, filler, blob = staged_without_room(a, b)
        b.serve(lambda question: sorted(whole(question), key=lambda item: item[0] != filler.id))
        exact(filler, session)
        assert [event.why for event in b.of(NotImported)] == [abi.NO_ROOM]
        shorter = b.expect(session.prompt[:50], 6)
        b.stage(shorter, blob)
        b.start(shorter)
        b.serve(whole)
        exact(shorter)
        assert [event.why for event in b.of(NotImported)] == [abi.NO_ROOM, abi.TOO_LONG]


def kv_without_room_is_not_asked_for_again_when_its_prompt_is_computed_and_lost() -> None:
    with driven() as a, driven(kv_blocks=8, prefix_cache=True) as b:
        session, filler, _ = staged_without_room(a, b)
        b.hold_until(lambda question: session.id in [row.session for row in question.rows])
        b.serve(lambda question: [(session.id, 16)], steps=1)
        b.serve(only(filler.id), [filler])
        b.serve(whole, steps=3)
        rival = b.submit(text(120, seed=8), 3)
        b.serve(only(rival.id), [rival])
        b.serve(whole)
        exact(filler, session, rival)
        assert b.counters["preemptions"] > 0 and b.counters["imports"] == 0
        assert [event.why for event in b.of(NotImported)] == [abi.NO_ROOM]


def kv_of_other_tokens_is_not_used() -> None:
    with driven() as a, driven() as b:
        blob, first = a.prefill(text(70, seed=3))
        session = b.expect(text(70, seed=4), 6, given=first)
        session.expected = first + generate(session.prompt + first, 5, VOCAB)
        b.stage(session, blob)
        b.start(session)
        b.serve(whole)
        exact(session)
        assert [event.why for event in b.of(NotImported)] == [abi.OTHER_TOKENS]


def kv_in_blocks_of_another_size_is_not_used() -> None:
    def of_15_tokens(blob: bytes) -> bytes:
        return signed(blob[:40] + struct.pack("<i", 15) + blob[44:])

    with driven() as a, driven() as b:
        exact(handed_over(a, b, text(70, seed=3), 6, of_15_tokens))
        assert [event.why for event in b.of(NotImported)] == [abi.OTHER_BLOCKS]


def kv_that_comes_late_is_not_used() -> None:
    with driven() as a, driven() as b:
        blob, first = a.prefill(text(70, seed=3))
        exact(handed_over(a, b, text(20, seed=5), 4))
        session = b.expect(text(70, seed=3), 6, given=first)
        b.start(session)
        b.serve(whole, steps=2)
        assert refusal(lambda: b.stage(session, blob))
        b.serve(whole)
        exact(session)
        assert b.counters["imports"] == 1


def kv_that_arrives_in_a_full_cache_takes_the_place_of_what_is_cached() -> None:
    """And the prefix cache no longer finds what it took the place of."""
    with driven(prefix_cache=True) as a, driven(prefix_cache=True, kv_blocks=12) as b:
        for turn in range(3):
            for seed in (1, 2, 3):
                exact(*b.finish([b.submit(text(60, seed=seed), 6)]))
            exact(handed_over(a, b, text(100, seed=10 + turn), 8))
        assert b.counters["imports"] == 3 and b.counters["evicted_blocks"] > 0
        as_traced(b)


def flipped(blob: bytes, at: int) -> bytes:
    """The blob with one bit changed."""
    return blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :]


def signed(blob: bytes) -> bytes:
    """The blob with a checksum that is right again."""
    native = ensure_patched()
    checksum = native.library.sagec_tm_crc32c(blob[:56] + blob[64:], len(blob) - 8, 0)
    return blob[:56] + struct.pack("<I", checksum) + blob[60:]


# ---- tensor parallelism


def ranks_take_the_same_steps(chunk: int) -> None:
    with driven(tp=2, kv_blocks=24, max_batch=8) as one:
        sessions = [one.submit(text(n, seed=n), 9) for n in (100, 20, 64, 47, 130, 9)]
        before = one.collectives["all_reduce"]["calls"]
        one.serve(shuffled(random.Random(chunk), chunk))
        exact(*sessions)
        assert one.trace(rank=0) == one.trace(rank=1)
        assert one.collectives["all_reduce"]["calls"] > before


def a_collective_is_timed_until_its_group_ends() -> None:
    with driven(tp=2, kv_blocks=24, max_batch=8) as one:
        one.time_collectives(1)
        before = one.collectives["all_reduce"]
        session = one.submit(text(20, seed=1), 9)
        one.serve(whole)
        exact(session)
        one.time_collectives(0)
        after = one.collectives["all_reduce"]
        spent = {name: after[name] - before[name] for name in after}
        assert 0 < spent["timed_calls"] == spent["calls"]
        # the host's stand-in meets the other rank when the group ends, and the events enclose that
        assert spent["device_us"] + 1 >= spent["enqueue_ns"] // 1000 > 0


# ---- plans


def plan(number: int, sessions: Sequence[Session], chunk: int, **more: Any) -> PlanColumns:
    """Each prompt in chunks, one after the other, and all decode; `more`: other columns."""
    chunks, step = [], 0
    for row, session in enumerate(sessions):
        for begin in range(0, len(session.prompt), chunk):
            chunks.append((step, row, begin, min(begin + chunk, len(session.prompt))))
            step += 1
    column = [np.array([row[i] for row in chunks], np.int64) for i in range(4)]
    rows = np.arange(len(sessions))
    prompts = np.array([len(session.prompt) for session in sessions], np.int64)
    columns = {
        "num_steps": step + 40,
        "max_step_tokens": 256,
        "mixes_phases": True,
        "sessions": np.array([session.id for session in sessions], np.uint64),
        "prompt_tokens": prompts,
        "reused_tokens": 0 * prompts,
        "decode_row": rows,
        "decode_begin_step": 0 * rows,
        "decode_until_tokens": 0 * rows + 2000,
    }
    names = ("chunk_step", "chunk_row", "chunk_begin", "chunk_end")
    return PlanColumns(plan=number, **{**columns, **dict(zip(names, column, strict=True)), **more})


def a_plan_is_computed_chunk_by_chunk(chunk: int) -> None:
    with driven(decider=abi.PLANS) as one:
        sessions = [one.expect(text(n, seed=n), 9) for n in (130, 20, 64)]
        for session in sessions:
            one.start(session)
        one.native.post_plan(plan(1, sessions, chunk))
        exact(*one.finish(sessions))
        assert {step.plan for step in one.steps} == {1}
        assert all(row.end == row.planned_end for step in one.steps for row in step.rows)
        starts = [(r.session, r.begin, r.end) for s in one.steps for r in s.rows if r.end > r.begin]
        for session in sessions:
            ends = [end for id, _, end in starts if id == session.id and end <= len(session.prompt)]
            wanted = [*range(chunk, len(session.prompt), chunk), len(session.prompt)]
            assert ends == wanted
        assert one.counters["unplanned_rows"] == one.counters["missed_rows"] == 0
        as_traced(one)


def a_newer_plan_takes_over_in_the_middle() -> None:
    with driven(decider=abi.PLANS, step_us=10_000) as one:
        first, second = (one.expect(text(n, seed=n), 9) for n in (200, 90))
        for session in (first, second):
            one.start(session)
        one.native.post_plan(plan(1, [first], 20))
        one.wait_for(lambda: len(one.steps) >= 2)
        one.native.post_plan(plan(2, [second], 30))
        one.finish([second])
        assert first.is_running
        done = max(end for step in one.steps for id, _, end in computed(step) if id == first.id)
        one.native.post_plan(
            plan(3, [first], 200, chunk_begin=np.array([done]), chunk_end=np.array([200]))
        )
        exact(*one.finish([first, second]))
        assert [event.plan for event in one.of(PlanEnded)][:2] == [1, 2]
        assert [step.plan for step in one.steps] == sorted(step.plan for step in one.steps)
        as_traced(one)


def who_decodes_and_finds_no_room_waits_for_the_others() -> None:
    """And is not planned meanwhile; nobody's KV is taken for it."""
    with driven(decider=abi.PLANS, kv_blocks=8) as one:
        first, second = one.expect(text(47, seed=1), 12), one.expect(text(63, seed=2), 9)
        for session in (first, second):
            one.start(session)
        one.native.post_plan(plan(1, [first, second], 64))
        exact(*one.finish([first, second]))
        turns = [sorted(row.session for row in step.rows) for step in one.steps]
        waited = turns.index([first.id, second.id], 2) + 1
        assert turns[waited] == [first.id] and turns[-1] == [second.id]
        assert one.counters["missed_rows"] == one.counters["preemptions"] == 0
        as_traced(one)


def where_nobody_finds_room_one_takes_it_from_another() -> None:
    with driven(decider=abi.PLANS, kv_blocks=8) as one:
        first, second = (one.expect(text(62, seed=seed), 9) for seed in (1, 2))
        for session in (first, second):
            one.start(session)
        one.native.post_plan(plan(1, [first, second], 64))
        one.finish([first])
        (lost,) = one.of(LostKV)
        assert lost.session == second.id
        one.native.post_plan(plan(2, [second], 64, chunk_begin=np.array([lost.after])))
        exact(*one.finish([first, second]))
        assert one.counters["missed_rows"] == 0
        as_traced(one)


def tokens_that_were_thought_cached_are_no_deviation() -> None:
    """Beyond the engine's budget they, or as many others, are left to a newer plan."""
    with driven(decider=abi.PLANS, step_tokens=64) as one:
        session = one.expect(text(100, seed=1), 5)
        one.start(session)
        hopeful = {"chunk_begin": np.array([48]), "reused_tokens": np.array([48])}
        one.native.post_plan(plan(1, [session], 100, **hopeful))
        one.wait_for(lambda: len(one.steps) == 1)
        (row,) = one.steps[0].rows
        assert (row.begin, row.end, row.planned_end) == (0, 64, 64)
        one.native.post_plan(plan(2, [session], 100, chunk_begin=np.array([64])))
        exact(*one.finish([session]))
        assert one.counters["missed_rows"] == 0
        as_traced(one)


def a_plan_may_name_sessions_that_are_not_there() -> None:
    with driven(decider=abi.PLANS) as one:
        missing, there = (one.expect(text(n, seed=n), 5) for n in (60, 50))
        one.start(there)
        one.native.post_plan(plan(1, [missing, there], 16))
        exact(*one.finish([there]))
        assert not one.of(Gap)
        as_traced(one)


def a_chunk_behind_a_gap_is_left_out_and_told() -> None:
    with driven(decider=abi.PLANS) as one:
        gap, fine = (one.expect(text(n, seed=n), 5) for n in (60, 50))
        for session in (gap, fine):
            one.start(session)
        behind = plan(1, [gap, fine], 64, chunk_begin=np.array([30, 0]))
        one.native.post_plan(behind)
        one.finish([fine])
        (told,) = one.of(Gap)
        assert (told.session, told.begin, told.computed) == (gap.id, 30, 0)
        one.native.post_plan(plan(2, [gap], 64))
        exact(*one.finish([gap, fine]))
        as_traced(one)


def stock_goes_on_where_no_plan_comes() -> None:
    with driven(decider=abi.PLANS, deadline_us=20_000) as one:
        exact(*one.finish(one.submit(text(n, seed=n), 4) for n in (60, 20)))
        assert {step.decided_by for step in one.steps} == {abi.BY_DEADLINE}
        assert one.counters["fallbacks"] == len(one.steps)
        as_traced(one)


def a_plan_that_makes_no_sense_is_refused() -> None:
    with driven(decider=abi.PLANS) as one, driven() as answered:
        session = one.expect(text(60, seed=1), 5)
        one.native.post_plan(plan(3, [session], 16))
        for wrong in (
            plan(3, [session], 16),
            plan(0, [session], 16),
            plan(4, [session, session], 16),
            plan(4, [session], 16, chunk_row=np.array([0, 1, 0, 0])),
            plan(4, [session], 16, chunk_step=np.array([0, 3, 1, 4])),
            plan(4, [session], 16, num_steps=2),
            plan(4, [session], 16, decode_row=np.array([-1])),
        ):
            assert refusal(partial(one.native.post_plan, wrong))
        assert refusal(lambda: answered.native.post_plan(plan(1, [session], 16)))


# ---- cancel, stall, close


def requests_are_cancelled_at_every_phase() -> None:
    with driven() as one:
        for computed in (0, 1, 30, 59, 60, 61, 66, 67):
            session, other = one.submit(text(60, seed=computed), 8), one.submit(text(25, seed=1), 8)
            one.serve(until_computed(session, computed), until=[other])
            one.cancel(session)
            one.serve(whole)
            exact(other)
            assert session.ended_by in (SessionStatus.CANCELLED, SessionStatus.FINISHED)
        as_traced(one)


def until_computed(session: Session, tokens: int) -> Decide:
    """Everybody, but this session no further than to so many tokens."""

    def decide(question: Question) -> Items:
        rows = [row for row in question.rows if row.session != session.id or row.computed < tokens]
        items = [(row.session, row.context) for row in rows]
        capped = [(id, min(end, tokens) if id == session.id else end) for id, end in items]
        return sorted(capped, key=lambda item: item[0] == session.id)

    return decide


def an_answer_that_is_late_is_refused_and_stock_goes_on() -> None:
    with driven(deadline_us=30_000) as one:
        sessions = [one.submit(text(n, seed=n), 6) for n in (60, 20)]
        late = one.hold_until(lambda question: len(question.rows) == 2)
        one.wait_for(lambda: any(step.decided_by == abi.BY_DEADLINE for step in one.steps))
        assert str(late.step) in refusal(lambda: one.answer(late, whole(late)))
        one.serve(at_most(16))
        exact(*sessions)
        assert one.counters["fallbacks"] > 0
        as_traced(one)


def an_engine_that_is_closed_in_flight_goes_on_as_stock() -> None:
    with driven() as one:
        sessions = [one.submit(text(n, seed=n), 12) for n in (60, 20, 200)]
        one.serve(at_most(16), steps=5)
        ask = partial(one.native.wait_question, 60_000_000)
        waiting = threading.Thread(target=lambda: [*iter(ask, None)])
        waiting.start()
        one.native.close()
        waiting.join(20)
        assert not waiting.is_alive(), "whoever waits for a question must be woken"
        one.wait_for(lambda: not one.is_busy)
        exact(*sessions)


def an_instance_that_was_closed_may_be_opened_again() -> None:
    with driven(step_us=5000) as one:
        sessions = [one.submit(text(n, seed=n), 30) for n in (60, 20, 200)]
        one.serve(at_most(16), steps=5)
        one.reopen()
        one.serve(at_most(16))
        exact(*sessions)
        assert abi.BY_ANSWER in {step.decided_by for step in one.steps}


def an_engine_may_end_while_everything_is_held() -> None:
    for steps in (0, 3):
        with driven() as one:
            sessions = [one.submit(text(n, seed=n), 12) for n in (60, 20, 200)]
            one.serve(at_most(16), steps=steps)
            one.serve(hold, steps=2)
        assert SessionStatus.RUNNING not in {session.ended_by for session in sessions}


def two_instances_serve_side_by_side() -> None:
    with driven() as one, driven(kv_blocks=16) as two:
        there = [one.submit(text(n, seed=n), 9) for n in (100, 20, 64)]
        here = [two.submit(text(n, seed=n), 9) for n in (50, 70, 6)]
        while one.is_busy or two.is_busy:
            one.serve(at_most(40), steps=2)
            two.serve(shortest_first, steps=2)
        exact(*there, *here)
        as_traced(one)
        as_traced(two)


# ---- the control of the sanitizers


def read_behind_the_end() -> int:
    """The checksum of more bytes than there are."""
    install()
    library = ensure_patched().library
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    return int(library.sagec_tm_crc32c(libc.malloc(ctypes.c_size_t(64)), 80, 1))
