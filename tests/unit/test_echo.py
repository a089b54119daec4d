"""The echo engine obeys plans to the letter, and says what is wrong with those that it cannot."""

import msgspec
import numpy as np
import pytest

from sagec.runtime.clock import VirtualClock, WallClock
from sagec.runtime.engines import (
    Cancelled,
    EngineError,
    Failed,
    KVCached,
    KVExported,
    KVImported,
    PlanDone,
    Preempted,
    StepReport,
    create,
)
from sagec.runtime.engines.echo import Echo
from sagec.runtime.kv import block_hashes
from sagec.runtime.plan import (
    RECOMPUTE,
    SWAP,
    Chunks,
    Decodes,
    ExecutionPlan,
    Moves,
    Preemptions,
    Reuses,
    Rows,
)
from sagec.runtime.request import FinishReason, Request
from tests.direct_planner import table
from tests.echo_cluster import spec

A = Request(id="a", prompt=tuple(range(20)), max_output_tokens=50)
B = Request(id="b", prompt=tuple(range(8)), max_output_tokens=3)


def plan(
    *rows,
    chunks=(),
    decodes=(),
    preempted=(),
    imports=(),
    exports=(),
    reuses=(),
    steps=8,
    budget=64,
    name="p",
    on="x0",
) -> ExecutionPlan:
    """rows: (id, prompt, computed, blocks); the rest are tuples in the order of their fields."""
    return ExecutionPlan(
        plan_id=name,
        round=0,
        target_instance_id=on,
        mode="hybrid",
        num_steps=steps,
        max_step_tokens=budget,
        peers=("x0", "y0"),
        request_ids=tuple(row[0] for row in rows),
        rows=table(Rows, [(*row[1:], 0) for row in rows]),
        chunks=table(Chunks, chunks),
        decodes=table(Decodes, decodes),
        preemptions=table(Preemptions, preempted),
        imports=table(Moves, imports),
        exports=table(Moves, exports),
        reuses=table(Reuses, reuses),
    )


PREFILL_A = plan(("a", 20, 0, 4), chunks=[(0, 0, 0, 16, 0), (1, 0, 16, 20, 1)])


def echo(name: str = "x0", kv_blocks: int = 8, **options: str) -> Echo:
    return Echo(spec(name, kv_blocks, 16, **options), VirtualClock())


def run(engine: Echo, *plans: ExecutionPlan, requests=()) -> list:
    """Events until there are no more."""
    for plan in plans:
        engine.submit(plan, requests)
    events = []
    while new := engine.poll():
        events += new
    return events


def of(kind, events) -> list:
    return [event for event in events if isinstance(event, kind)]


def errors(events) -> list[str]:
    return [event.error for event in of(Failed, events)]


def test_chunks_then_decodes_then_done():
    both = plan(
        ("a", 20, 0, 4),
        chunks=[(0, 0, 0, 16, 0), (1, 0, 16, 20, 1)],
        decodes=[(0, 2, 23)],
    )
    events = run(echo(), both, requests=[A])
    steps = of(StepReport, events)
    assert [step.chunks for step in steps] == [(("a", 0, 16),), (("a", 16, 20),), (), (), ()]
    assert [len(step.tokens) for step in steps] == [0, 1, 1, 1, 1]
    assert [index for step in steps for _, index, _ in step.tokens] == [0, 1, 2, 3]
    assert [step.kv_blocks_used for step in steps] == [4] * 5
    assert events[-1] == PlanDone(instance="x0", plan_id="p")


def test_a_request_ends_at_its_limit_and_frees_its_blocks():
    engine = echo()
    whole = plan(("b", 8, 0, 1), chunks=[(0, 0, 0, 8, 1)], decodes=[(0, 1, 99)])
    steps = of(StepReport, run(engine, whole, requests=[B]))
    assert [len(step.tokens) for step in steps] == [1, 1, 1]
    assert steps[-1].finished == (("b", FinishReason.LENGTH),)
    assert engine.kv_blocks_used() == 0


def test_a_stop_token_ends_a_request_and_is_not_sent():
    prefill = plan(("b", 8, 0, 1), chunks=[(0, 0, 0, 8, 1)])
    (free,) = of(StepReport, run(echo(), prefill, requests=[B]))
    stop = msgspec.structs.replace(B, stop_tokens=(free.tokens[0][2],))
    (step,) = of(StepReport, run(echo(), prefill, requests=[stop]))
    assert step.tokens == ()
    assert step.finished == (("b", FinishReason.STOP),)


def test_a_newer_plan_takes_over_where_the_older_was_and_nothing_is_computed_twice():
    engine = echo()
    engine.submit(PREFILL_A, [A])
    (first,) = engine.poll()
    assert first.chunks == (("a", 0, 16),)
    whole = plan(("a", 20, 0, 4), chunks=[(0, 0, 0, 20, 1)], name="q")
    events = run(engine, whole)
    assert events[0] == PlanDone(instance="x0", plan_id="p")
    assert [step.chunks for step in of(StepReport, events)] == [(("a", 16, 20),)]


def test_rows_that_a_plan_does_not_name_keep_their_kv():
    engine = echo()
    run(engine, PREFILL_A, requests=[A])
    run(engine, plan(("b", 8, 0, 1), chunks=[(0, 0, 0, 8, 1)], name="q"), requests=[B])
    assert engine.kv_blocks_used() == 3
    go_on = plan(("a", 20, 20, 4), decodes=[(0, 0, 21)], name="r")
    (step,) = of(StepReport, run(engine, go_on))
    assert step.decodes == ("a",)


def test_the_budget_holds_back_rows_that_join_late():
    engine = echo()
    both = plan(
        ("a", 20, 0, 3),
        ("b", 8, 0, 1),
        chunks=[(0, 0, 0, 20, 1), (1, 1, 0, 8, 1)],
        decodes=[(0, 0, 99), (1, 0, 99)],
        budget=20,
    )
    steps = of(StepReport, run(engine, both, requests=[A, B]))
    for step in steps:
        assert sum(end - begin for _, begin, end in step.chunks) + len(step.decodes) <= 20
    assert steps[1].decodes == ("a",)
    assert steps[2].decodes == ("a", "b")


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (
            plan(("a", 20, 0, 4), chunks=[(0, 0, 4, 20, 1)]),
            "plan p: tokens [0, 4) were left out",
        ),
        (
            plan(("a", 20, 0, 4), chunks=[(0, 0, 0, 12, 0), (1, 0, 11, 20, 1)]),
            "plan p: step 1: 'a' goes on at 11 after a chunk that ends at 12",
        ),
        (
            plan(("a", 20, 0, 4), chunks=[(0, 0, 0, 20, 1)], budget=19),
            "plan p: step 0: chunks of 20 tokens; max_step_tokens is 19",
        ),
        (
            plan(("a", 20, 0, 1), chunks=[(0, 0, 0, 20, 1)]),
            "plan p: 20 tokens do not fit the 1 blocks it reserves",
        ),
        (
            plan(("a", 20, 0, 9), chunks=[(0, 0, 0, 20, 1)]),
            "plan p: 9 blocks are reserved of the 8 there are",
        ),
        (
            plan(("a", 20, 0, 4), chunks=[(0, 0, 0, 20, 0)]),
            "plan p: a chunk [0, 20) that does not sample, of a prompt of 20 tokens",
        ),
        (
            plan(("a", 20, 0, 4), chunks=[(0, 0, 0, 21, 1)]),
            "plan p: a chunk [0, 21) that samples, of a prompt of 20 tokens",
        ),
        (
            plan(("a", 20, 0, 2), chunks=[(0, 0, 0, 20, 1)], decodes=[(0, 0, 99)], steps=30),
            "plan p: token 32 is beyond the 2 blocks it reserves",
        ),
        (plan(("a", 20, 0, 4), on="y0"), "plan p: for 'y0', not 'x0'"),
    ],
)
def test_what_a_plan_does_wrong_fails_its_request_and_is_named(wrong, error):
    engine = echo()
    events = run(engine, wrong, requests=[A])
    assert errors(events) == [error]
    assert engine.kv_blocks_used() == 0
    assert of(PlanDone, events)


def test_a_plan_that_breaks_its_own_rules_fails_all_it_names():
    wrong = plan(
        ("a", 20, 0, 4), ("b", 8, 0, 1), chunks=[(0, 0, 0, 20, 1), (0, 1, 0, 8, 1)], budget=9
    )
    failed = of(Failed, run(echo(), wrong, requests=[A, B]))
    assert [event.request_id for event in failed] == ["a", "b"]


def test_a_request_that_never_came_is_named():
    assert errors(run(echo(), PREFILL_A)) == ["plan p names 'a', which never came"]


def test_a_request_that_has_left_is_skipped():
    engine = echo()
    run(engine, plan(("b", 8, 0, 1), chunks=[(0, 0, 0, 8, 1)], decodes=[(0, 0, 99)]), requests=[B])
    assert errors(run(engine, plan(("b", 8, 0, 1), decodes=[(0, 0, 99)], name="q"))) == []


def test_preemption_frees_blocks_and_keeps_the_output():
    engine = echo()
    (*_, sampled, _) = run(engine, PREFILL_A, requests=[A])
    events = run(engine, plan(("a", 20, 0, 0), preempted=[(0, RECOMPUTE)], name="q"))
    assert of(Preempted, events) == [Preempted(instance="x0", request_id="a")]
    assert engine.kv_blocks_used() == 0
    again = plan(("a", 21, 0, 4), chunks=[(0, 0, 0, 21, 1)], name="r")
    (step,) = of(StepReport, run(engine, again))
    assert step.tokens[0][1] == sampled.tokens[0][1] + 1 == 1


def test_who_is_swapped_out_goes_on_where_it_was():
    engine = echo()
    run(engine, PREFILL_A, requests=[A])
    events = run(engine, plan(("a", 20, 0, 0), preempted=[(0, SWAP)], name="q"))
    assert of(Preempted, events) == [Preempted(instance="x0", request_id="a", kept_tokens=20)]
    assert engine.kv_blocks_used() == 0 and engine.kept_tokens() == {"a": 20}
    again = plan(("a", 21, 0, 4), chunks=[(0, 0, 20, 21, 1)], reuses=[(0, 20)], name="r")
    (step,) = of(StepReport, run(engine, again))
    assert step.chunks == (("a", 20, 21),) and step.reused == ()
    assert step.tokens == tokens_of(PREFILL_A, again_from=1)
    assert engine.kept_tokens() == {}


def test_who_is_swapped_out_and_then_preempted_starts_over():
    engine = echo()
    run(engine, PREFILL_A, requests=[A])
    run(engine, plan(("a", 20, 0, 0), preempted=[(0, SWAP)], name="q"))
    twice = plan(("a", 20, 0, 0), preempted=[(0, SWAP)], name="r")
    assert of(Preempted, run(engine, twice))[0].kept_tokens == 20
    events = run(engine, plan(("a", 20, 0, 0), preempted=[(0, RECOMPUTE)], name="s"))
    assert of(Preempted, events)[0].kept_tokens == 0 and engine.kept_tokens() == {}
    left_out = plan(("a", 21, 0, 4), chunks=[(0, 0, 20, 21, 1)], name="t")
    assert errors(run(engine, left_out)) == ["plan t: tokens [0, 20) were left out"]


def test_a_swapped_row_skips_what_it_has_of_an_older_plan():
    engine = echo()
    run(engine, PREFILL_A, requests=[A])
    run(engine, plan(("a", 20, 0, 0), preempted=[(0, SWAP)], name="q"))
    whole = plan(("a", 21, 0, 4), chunks=[(0, 0, 0, 16, 0), (1, 0, 16, 21, 1)], name="r")
    (step,) = of(StepReport, run(engine, whole))
    assert step.chunks == (("a", 20, 21),)


def tokens_of(*plans, again_from: int):
    """What a request's token of this index is without any preemption."""
    go_on = plan(("a", 20, 20, 4), decodes=[(0, 0, 23)], name="on")
    steps = of(StepReport, run(echo(), *plans, requests=[A]))
    engine = echo()
    steps = of(StepReport, [*run(engine, *plans, requests=[A]), *run(engine, go_on)])
    return next(s.tokens for s in steps if s.tokens and s.tokens[0][1] == again_from)


# The prefix cache

ENDS_AT_ONCE = Request(id="e", prompt=tuple(range(20)), max_output_tokens=1)
PREFILL_E = plan(("e", 20, 0, 4), chunks=[(0, 0, 0, 20, 1)])
REUSE_A = plan(("a", 20, 0, 4), chunks=[(0, 0, 16, 20, 1)], reuses=[(0, 16)], name="q")


def cached(engine: Echo) -> Echo:
    """The engine, which has served a request with the prompt of A to its end."""
    events = run(engine, PREFILL_E, requests=[ENDS_AT_ONCE])
    (said,) = of(KVCached, events)
    assert said == KVCached(instance="x0", stored=block_hashes(range(20), 16))
    return engine


def test_kv_of_what_is_done_is_kept_and_reused():
    engine = cached(echo(prefix_cache="on"))
    assert engine.capability().caches_prefixes
    assert engine.cached_blocks() == set(block_hashes(range(20), 16))
    (step,) = of(StepReport, run(engine, REUSE_A, requests=[A]))
    assert step.reused == (("a", 16),) and step.chunks == (("a", 16, 20),)
    (alone,) = of(StepReport, run(echo(), plan(("a", 20, 0, 4), chunks=[(0, 0, 0, 20, 1)]),
                                  requests=[A]))  # fmt: skip
    assert step.tokens == alone.tokens


@pytest.mark.parametrize("prefix_cache", ["off", "on"])
def test_what_a_plan_expects_in_the_cache_and_is_gone_is_computed(prefix_cache):
    engine = echo(prefix_cache=prefix_cache)
    (step,) = of(StepReport, run(engine, REUSE_A, requests=[A]))
    assert step.reused == () and step.chunks == (("a", 0, 20),)


def test_nothing_is_reused_that_the_plan_does_not_say():
    engine = cached(echo(prefix_cache="on"))
    (step,) = of(StepReport, run(engine, plan(("a", 20, 0, 4), chunks=[(0, 0, 0, 20, 1)], name="q"),
                                 requests=[A]))  # fmt: skip
    assert step.reused == () and step.chunks == (("a", 0, 20),)


def test_rows_take_the_room_of_the_cache_and_the_oldest_ends_go_first():
    engine = echo(prefix_cache="on", kv_blocks=4)
    long = Request(id="l", prompt=tuple(range(100, 148)), max_output_tokens=1)
    run(engine, plan(("l", 48, 0, 3), chunks=[(0, 0, 0, 48, 1)]), requests=[long])
    kept = block_hashes(long.prompt, 16)
    assert engine.cached_blocks() == set(kept)
    events = run(engine, plan(("a", 20, 0, 2), chunks=[(0, 0, 0, 20, 1)], name="q"), requests=[A])
    assert of(KVCached, events) == [KVCached(instance="x0", evicted=(kept[2],))]
    assert engine.cached_blocks() == set(kept[:2])


def test_a_hand_over_leaves_a_copy_in_the_cache():
    engine = echo(prefix_cache="on")
    send = plan(("a", 20, 0, 2), chunks=[(0, 0, 0, 20, 1)], exports=[(0, 1, 20)])
    assert of(KVCached, run(engine, send, requests=[A]))[0].stored == block_hashes(A.prompt, 16)


def test_a_hand_over_gives_the_tokens_that_one_instance_gives():
    alone = plan(("a", 20, 0, 4), chunks=[(0, 0, 0, 20, 1)], decodes=[(0, 0, 26)])
    expected = [t for step in of(StepReport, run(echo(), alone, requests=[A])) for t in step.tokens]

    source, target = echo("x0"), echo("y0")
    send = plan(("a", 20, 0, 2), chunks=[(0, 0, 0, 20, 1)], exports=[(0, 1, 20)])
    events = run(source, send, requests=[A])
    (exported,) = of(KVExported, events)
    assert source.kv_blocks_used() == 0
    take = plan(("a", 20, 20, 4), imports=[(0, 0, 20)], decodes=[(0, 0, 26)], on="y0")
    assert run(target, take) == []
    target.receive(exported.handle)
    arrived = run(target)
    assert of(KVImported, arrived)[0].num_bytes == 20 * 64
    assert of(PlanDone, arrived)
    steps = of(StepReport, [*events, *arrived])
    assert [token for step in steps for token in step.tokens] == expected


def test_kv_waits_until_a_plan_takes_it_and_there_is_room():
    source, target = echo("x0"), echo("y0", kv_blocks=3)
    send = plan(("a", 20, 0, 2), chunks=[(0, 0, 0, 20, 1)], exports=[(0, 1, 20)])
    (exported,) = of(KVExported, run(source, send, requests=[A]))
    target.receive(exported.handle)
    assert run(target) == []
    crowd = plan(("b", 8, 0, 2), chunks=[(0, 0, 0, 8, 1)], on="y0")
    run(target, crowd, requests=[B])
    take = plan(
        ("b", 8, 8, 2), ("a", 20, 20, 2), imports=[(1, 0, 20)], decodes=[(0, 0, 99), (1, 0, 99)],
        on="y0", name="q",
    )  # fmt: skip
    events = run(target, take)
    kinds = [type(event) for event in events]
    assert kinds.index(KVImported) > kinds.index(StepReport)


def test_damaged_kv_is_refused():
    source, target = echo("x0"), echo("y0")
    send = plan(("a", 20, 0, 2), chunks=[(0, 0, 0, 20, 1)], exports=[(0, 1, 20)])
    (exported,) = of(KVExported, run(source, send, requests=[A]))
    target.receive(msgspec.structs.replace(exported.handle, place="echo:20:0badcafe"))
    take = plan(("a", 20, 20, 4), imports=[(0, 0, 20)], decodes=[(0, 0, 26)], on="y0")
    assert errors(run(target, take)) == ["its KV at 'echo:20:0badcafe' is not that of its tokens"]


def test_a_cancelled_request_holds_nothing():
    engine = echo()
    run(engine, PREFILL_A, requests=[A])
    engine.cancel("a")
    engine.cancel("nobody")
    assert engine.poll() == [
        Cancelled(instance="x0", request_id="a"),
        Cancelled(instance="x0", request_id="nobody"),
    ]
    assert engine.kv_blocks_used() == 0


def test_steps_take_what_the_options_say_on_a_virtual_clock():
    clock = VirtualClock()
    engine = Echo(spec("x0", 8, 16, step_us="100", token_us="10", bytes_per_s="1000000"), clock)
    engine.submit(PREFILL_A, [A])
    assert engine.poll() == []
    assert engine.next_us() == 100 + 16 * 10
    clock.advance_to(engine.next_us())
    (step,) = engine.poll()
    assert (step.begin_us, step.end_us) == (0, 260)


def test_on_the_wall_clock_a_step_lasts_as_long_as_it_should():
    engine = create(spec("x0", 8, 16, step_us="2000"))
    assert isinstance(engine._clock, WallClock)
    engine.submit(PREFILL_A, [A])
    events = []
    while not of(PlanDone, events):
        events += engine.poll(0.01)
    for step in of(StepReport, events):
        assert step.end_us - step.begin_us == 2000
    engine.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_cache": "1"}, "instance 'x0': prefix_cache='1': on or off"),
        ({"vocabulary": "9"}, "instance 'x0': echo has no option 'vocabulary'; it has vocab, eos"),
        ({"step_us": "fast"}, "instance 'x0': step_us='fast': a whole number, 0 or more"),
        ({"vocab": "0"}, "instance 'x0': vocab='0': 1 or more"),
    ],
)
def test_options_that_make_no_sense_are_named(options, message):
    with pytest.raises(EngineError, match=message.split(";")[0]):
        create(spec("x0", **options))


def test_a_plan_made_before_the_last_steps_of_the_older_one_harms_nobody():
    engine = echo(kv_blocks=3)
    older = plan(("a", 20, 0, 3), chunks=[(0, 0, 0, 20, 1)], decodes=[(0, 0, 40)], steps=30)
    run(engine, older, requests=[A])
    assert engine.kv_blocks_used() == 3
    stale = plan(
        ("a", 20, 20, 2), ("b", 8, 0, 1), chunks=[(0, 1, 0, 8, 1)], decodes=[(0, 0, 32)], name="q"
    )
    events = run(engine, stale, requests=[B])
    assert errors(events) == []
    assert of(StepReport, events) == []
    assert np.array_equal(stale.rows.kv_blocks, [2, 1])
