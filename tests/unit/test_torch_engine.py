"""How the torch engine runs plans: what it computes when, what it tells, what it frees."""

import copy
import struct
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import msgspec  # noqa: E402

from sagec.runtime.comm import ChannelError  # noqa: E402
from sagec.runtime.engines import (  # noqa: E402
    Cancelled,
    Failed,
    KVExported,
    KVHandle,
    KVImported,
    PlanDone,
    Preempted,
    StepReport,
)
from sagec.runtime.engines.torch.transfer import HEADER_BYTES, checksum  # noqa: E402
from sagec.runtime.plan import (  # noqa: E402
    RECOMPUTE,
    SWAP,
    Acceleration,
    Evictions,
)
from sagec.runtime.request import FinishReason, Sampling  # noqa: E402
from tests.checkpoints import byte_tokenizer, checkpoint, generate, reference  # noqa: E402
from tests.torch_engines import (  # noqa: E402
    column,
    engine,
    of,
    outputs,
    plan,
    request,
    run,
    steps,
)

A, B = (5, 6, 7, 8, 9, 10), (20, 21, 22)
EXPECTED = {"a": generate("llama", A, 24), "b": generate("llama", B, 24)}
BOTH = {"a": len(A), "b": len(B)}


@pytest.fixture
def one():
    """An engine that must be whole at the end, whatever the test did with it."""
    made = engine("i0", checkpoint("llama"), channel="local")
    yield made
    made.check_integrity()
    made.close()


def both(**changes):
    """A plan for both requests, whole, from step 0."""
    chunks = [(0, "a", 0, len(A)), (0, "b", 0, len(B))]
    return plan("i0", BOTH, **{"chunks": chunks, "decodes": dict.fromkeys(BOTH, 200), **changes})


def requests(**changes):
    return [request("a", A, **changes), request("b", B, **changes)]


def finished(events) -> dict[str, FinishReason]:
    return {id: reason for step in steps(events) for id, reason in step.finished}


def errors(events) -> dict[str | None, str]:
    return {event.request_id: event.error for event in of(Failed, events)}


# What a step holds


def test_poll_with_nothing_to_do_tells_nothing(one):
    assert one.poll() == []
    assert one.poll(timeout_s=1.0) == []


def test_one_poll_is_one_step(one):
    one.submit(both(num_steps=3), requests())
    assert [len(steps(one.poll())) for _ in range(4)] == [1, 1, 1, 0]


def test_a_step_tells_its_chunks_decodes_tokens_and_blocks(one):
    chunks = [(0, "b", 0, len(B)), (1, "a", 0, 4), (2, "a", 4, 6)]
    one.submit(both(chunks=chunks, num_steps=4, kv_blocks={"a": 5, "b": 4}), requests())
    found = steps(run(one))
    assert [step.step for step in found] == [0, 1, 2, 3]
    assert [step.chunks for step in found] == [
        (("b", 0, 3),),
        (("a", 0, 4),),
        (("a", 4, 6),),
        (),
    ]
    assert [step.decodes for step in found] == [(), ("b",), ("b",), ("b", "a")]
    assert set(found[2].tokens) == {("b", 2, EXPECTED["b"][2]), ("a", 0, EXPECTED["a"][0])}
    assert [step.kv_blocks_used for step in found] == [9] * 4
    assert all(step.begin_us <= step.end_us for step in found)
    assert {step.plan_id for step in found} == {"plan"}


def test_steps_with_nothing_to_do_are_skipped_and_not_run_empty(one):
    chunks = [(3, "a", 0, 6), (9, "b", 0, 3)]
    one.submit(both(chunks=chunks, decodes={}, num_steps=20), requests())
    events = run(one)
    assert [step.step for step in steps(events)] == [3, 9]
    assert of(PlanDone, events) == [PlanDone(instance="i0", plan_id="plan")]


def test_a_plan_without_steps_computes_nothing(one):
    one.submit(both(chunks=(), num_steps=0), requests())
    assert run(one) == [PlanDone(instance="i0", plan_id="plan")]


def test_a_row_that_would_join_after_the_horizon_does_not(one):
    one.submit(both(joins={"a": 9}, num_steps=4), requests())
    assert {step.step for step in steps(run(one))} == {0, 1, 2, 3}


def test_a_chunk_that_is_computed_already_is_not_computed_again(one):
    one.submit(both(chunks=[(0, "a", 0, 4)], decodes={}), requests())
    events = run(one)
    one.submit(both(chunks=[(0, "a", 0, 4), (1, "a", 2, 6)], decodes={}))
    events += run(one)
    assert [step.chunks for step in steps(events)] == [(("a", 0, 4),), (("a", 4, 6),)]


def test_two_chunks_of_a_row_in_one_step_are_one(one):
    one.submit(both(chunks=[(0, "a", 0, 4), (0, "a", 4, 6)], decodes={}), requests())
    assert steps(run(one))[0].chunks == (("a", 0, 6),)


def test_a_row_decodes_until_its_kv_holds_until_tokens(one):
    one.submit(both(decodes={"a": 8, "b": 5}), requests())
    events = run(one)
    assert {id: len(tokens) for id, tokens in outputs(events).items()} == {"a": 3, "b": 3}
    assert {id: row.computed for id, row in one.residents.rows.items()} == {"a": 8, "b": 5}
    assert of(PlanDone, events)


def test_a_row_joins_no_earlier_than_its_begin_step(one):
    one.submit(both(joins={"a": 4}, num_steps=6), requests())
    decodes = [step.decodes for step in steps(run(one))]
    assert decodes == [(), ("b",), ("b",), ("b",), ("b", "a"), ("b", "a")]


def test_no_step_computes_more_tokens_than_the_plan_allows(one):
    """The chunk is planned; of the decodes, those in the batch come before the late one."""
    chunks = [(0, "b", 0, 3), (2, "a", 0, 6)]
    one.submit(both(chunks=chunks, max_step_tokens=6, num_steps=4), requests())
    found = steps(run(one))
    assert [step.decodes for step in found] == [(), ("b",), (), ("b", "a")]
    one.submit(both(chunks=(), max_step_tokens=1, num_steps=30))
    found = steps(run(one))
    assert {len(step.decodes) for step in found} == {1}
    assert [step.decodes for step in found][:3] == [("a",)] * 3


# How a request ends


def test_a_stop_token_ends_the_output_and_is_no_part_of_it(one):
    stop = EXPECTED["a"][5]
    first = EXPECTED["a"].index(stop)
    one.submit(both(), [request("a", A, stop_tokens=(stop,)), request("b", B, 2)])
    events = run(one)
    assert outputs(events)["a"] == EXPECTED["a"][:first]
    assert finished(events) == {"a": FinishReason.STOP, "b": FinishReason.LENGTH}
    assert one.residents.pool.num_held == 0


def test_the_eos_of_the_model_ends_the_output(tmp_path: Path):
    import json
    import shutil

    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    eos = EXPECTED["a"][3]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos]}))
    made = engine("i0", folder)
    assert made.capability().eos_tokens == (eos,)
    made.submit(both(), requests())
    assert outputs(run(made))["a"] == EXPECTED["a"][: EXPECTED["a"].index(eos)]


def test_a_stop_string_ends_the_output_with_the_token_that_completes_it(tmp_path: Path):
    import shutil

    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    made = engine("i0", folder)
    text = bytes(EXPECTED["a"]).decode()
    stop = text[4:6]
    made.submit(both(), [request("a", A, stop_strings=("absent", stop)), request("b", B, 1)])
    events = run(made)
    count = text.index(stop) + len(stop)
    assert outputs(events)["a"] == EXPECTED["a"][:count]
    assert finished(events)["a"] is FinishReason.STOP


def test_a_stop_string_may_span_a_hand_over(tmp_path: Path):
    import shutil

    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    stop = bytes(EXPECTED["a"][:2]).decode()
    sides = [engine(id, folder, channel="local") for id in ("p0", "d0")]
    events = hand_over(*sides, request("a", A, stop_strings=(stop,)))
    assert outputs(events)["a"] == EXPECTED["a"][:2]
    assert finished(events) == {"a": FinishReason.STOP}


@pytest.mark.parametrize(("resumed", "count"), [(1, 1), (0, 9)])
def test_a_stop_string_may_begin_in_the_output_before_a_restart(
    resumed: int, count: int, tmp_path: Path
):
    import shutil

    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    made, prompt = engine("i0", folder), A + EXPECTED["a"][:1]
    stop = bytes(EXPECTED["a"][:2]).decode()
    assert stop not in bytes(EXPECTED["a"][1:10]).decode()
    made.submit(
        plan("i0", {"a": len(prompt)}, chunks=[(0, "a", 0, len(prompt))], decodes={"a": 200}),
        [request("a", prompt, 9, stop_strings=(stop,), resumed_tokens=resumed)],
    )
    assert outputs(run(made))["a"] == EXPECTED["a"][1 : 1 + count]


def test_stop_strings_without_a_tokenizer_are_refused(one):
    one.submit(both(), [request("a", A, stop_strings=("x",)), request("b", B, 1)])
    events = run(one)
    assert "stop strings need" in errors(events)["a"]
    assert finished(events) == {"b": FinishReason.LENGTH}


def test_the_context_of_the_model_ends_the_output():
    made = engine("i0", checkpoint("llama"), kv_blocks=2, block_tokens=8)
    assert made.capability().max_context_tokens == 16
    made.submit(
        plan("i0", {"a": 6}, chunks=[(0, "a", 0, 6)], decodes={"a": 200}),
        [request("a", A, max_output_tokens=None)],
    )
    events = run(made)
    assert outputs(events)["a"] == EXPECTED["a"][:10]
    assert finished(events) == {"a": FinishReason.LENGTH}


def test_a_request_for_no_tokens_ends_without_one(one):
    one.submit(both(), requests(max_output_tokens=0))
    events = run(one)
    assert outputs(events) == {}
    assert finished(events) == dict.fromkeys(BOTH, FinishReason.LENGTH)


REFUSED = [
    ({"prompt": ()}, "the prompt is empty; it needs a token at least"),
    ({"prompt": (1, 97)}, "prompt token 97 is not in [0, 97)"),
    ({"prompt": (-1, 2)}, "prompt token -1 is not in [0, 97)"),
    ({"prompt": (1,) * 256}, "a prompt of 256 tokens leaves no room for an answer in 256 tokens"),
    ({"prompt": (1,), "adapter": "x"}, "adapter 'x': this engine serves the model alone"),
    ({"prompt": (1,), "stop_strings": ("",)}, "an empty stop string would stop before"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_a_request_that_cannot_be_served_fails_and_the_rest_goes_on(one, fields, message):
    one.submit(both(), [request(id="a", **fields), request("b", B)])
    events = run(one)
    assert message in errors(events)["a"]
    assert outputs(events) == {"b": EXPECTED["b"]}


# Sampling through the engine


def sampled(made, ids: dict[str, tuple[int, ...]], **fields) -> dict[str, tuple[int, ...]]:
    made.submit(
        plan(
            "i0",
            {id: len(prompt) for id, prompt in ids.items()},
            chunks=[(0, id, 0, len(prompt)) for id, prompt in ids.items()],
            decodes=dict.fromkeys(ids, 200),
        ),
        [request(id, prompt, **fields) for id, prompt in ids.items()],
    )
    return outputs(run(made))


def test_a_seeded_request_draws_the_same_tokens_in_any_batch(one):
    fields = {"sampling": Sampling(temperature=5.0, top_k=50, top_p=0.95, seed=11)}
    alone = sampled(one, {"a": A}, **fields)["a"]
    crowd = {"x": B, "a": A, "y": A[::-1], "z": (1,) * 40}
    assert sampled(one, crowd, **fields)["a"] == alone
    assert sampled(one, {"renamed": A}, **fields)["renamed"] == alone
    assert alone != EXPECTED["a"]


def test_a_restart_with_output_in_the_prompt_draws_what_was_to_come(one):
    fields = {"sampling": Sampling(temperature=5.0, seed=3)}
    whole = sampled(one, {"a": A}, **fields)["a"]
    assert sampled(one, {"a": A + whole[:9]}, **fields)["a"][:15] == whole[9:]


def test_without_a_seed_the_id_is_the_seed_so_that_a_retry_gives_the_same_tokens(one):
    fields = {"sampling": Sampling(temperature=5.0)}
    first = sampled(one, {"a": A, "other": A}, **fields)
    assert sampled(one, {"a": A}, **fields)["a"] == first["a"]
    assert first["a"] != first["other"]


# Plans that follow each other


def test_a_newer_plan_takes_over_at_the_next_step(one):
    one.submit(both(plan_id="first"), requests())
    events = one.poll() + one.poll()
    one.submit(plan("i0", {"b": 3}, decodes={"b": 200}, plan_id="second"))
    events += run(one)
    assert [step.plan_id for step in steps(events)][:4] == ["first", "first", "second", "second"]
    assert [event.plan_id for event in of(PlanDone, events)] == ["first", "second"]
    assert one.residents.rows["a"].computed == 7  # kept, though no plan names it
    assert one.residents.pool.num_held == 1


def test_what_plans_preempt_happens_though_a_newer_one_comes_at_once(one):
    one.submit(both(num_steps=2), requests())
    run(one)
    one.submit(plan("i0", BOTH, preemptions={"a": RECOMPUTE}, plan_id="p1"))
    one.submit(plan("i0", {"b": 3}, decodes={"b": 200}, plan_id="p2"))
    events = run(one)
    assert of(Preempted, events) == [Preempted(instance="i0", request_id="a")]
    assert [event.plan_id for event in of(PlanDone, events)] == ["p1", "p2"]


def test_a_plan_may_name_what_has_ended_meanwhile(one):
    one.submit(both(), requests(max_output_tokens=2))
    run(one)
    one.submit(both(plan_id="late"))
    assert run(one) == [PlanDone(instance="i0", plan_id="late")]


def test_an_ended_request_may_be_sent_again(one):
    one.submit(both(), requests())
    first = outputs(run(one))
    one.submit(both(), requests())
    assert outputs(run(one)) == first == EXPECTED


def test_a_plan_that_reaches_beyond_what_is_computed_fails_that_request(one):
    one.submit(both(chunks=[(0, "a", 2, 6), (0, "b", 0, 3)]), requests())
    events = run(one)
    assert errors(events) == {
        "a": "plan 'plan' step 0: chunk [2, 6) leaves a gap: only 0 tokens are computed"
    }
    assert outputs(events) == {"b": EXPECTED["b"]}


def test_a_chunk_beyond_the_prompt_fails_that_request(one):
    one.submit(both(chunks=[(0, "a", 0, 7), (0, "b", 0, 3)]), requests())
    message = errors(run(one))["a"]
    assert message == "plan 'plan' step 0: chunk [0, 7) goes beyond the request's 6 tokens"


def test_a_request_that_nobody_sent_fails(one):
    one.submit(both(), [request("b", B)])
    message = errors(run(one))["a"]
    assert message == "plan 'plan' names it, but it never came here"


UNSUPPORTED = [
    ({"target_instance_id": "other"}, "is for 'other'; this is 'i0'"),
    ({"max_step_tokens": 0}, "max_step_tokens is 0; 1 at least"),
    ({"acceleration": Acceleration(draft_tokens=2)}, "acceleration: the torch engine computes"),
    ({"acceleration": Acceleration(kv_dtype="fp8")}, "kv_dtype 'fp8': KV has the model's dtype"),
    ({"request_ids": ("a",)}, "rows has 2 rows for 1 request_ids; one each"),
]


UNCACHED = [
    ({"evictions": Evictions(block_hash=column([4]))}, "evictions: 'i0' has no prefix cache"),
]


@pytest.mark.parametrize(("changes", "message"), UNCACHED)
def test_a_plan_for_a_cache_is_refused_where_it_is_off(changes, message: str):
    made = engine("i0", checkpoint("llama"), prefix_cache="off")
    made.submit(msgspec.structs.replace(both(), **changes), requests())
    *failed, _ = run(made)
    assert all(message in error for error in errors(failed).values())
    assert {*errors(failed)} == {"a", "b"}


@pytest.mark.parametrize(("changes", "message"), UNSUPPORTED)
def test_a_plan_that_this_engine_cannot_run_is_refused(one, changes, message: str):
    one.submit(msgspec.structs.replace(both(), **changes), requests())
    *failed, done = run(one)
    assert all(message in event.error for event in failed)
    assert "a" in errors(failed)
    assert done == PlanDone(instance="i0", plan_id="plan")


# Room


def test_a_plan_reserves_its_blocks_and_gives_back_the_rest(one):
    one.submit(both(num_steps=1, kv_blocks={"a": 10, "b": 20}), requests())
    run(one)
    assert one.residents.pool.num_held == 30
    one.submit(both(chunks=(), num_steps=1, kv_blocks={"a": 2, "b": 0}))
    run(one)
    assert one.residents.pool.num_held == 3


def test_a_row_that_a_plan_does_not_name_keeps_its_kv_and_no_more(one):
    one.submit(both(num_steps=1, kv_blocks={"a": 10, "b": 20}), requests())
    run(one)
    one.submit(plan("i0", {"b": 3}, decodes={"b": 4}, kv_blocks={"b": 5}))
    run(one)
    assert one.residents.pool.held(one.residents.rows["a"].slot) == 1
    assert one.residents.pool.num_held == 6


def test_a_row_without_room_waits_and_goes_on_when_there_is():
    made = engine("i0", checkpoint("llama"), kv_blocks=3, block_tokens=4)
    chunks = [(0, "b", 0, 3), (1, "a", 0, 6)]
    made.submit(both(chunks=chunks, kv_blocks={"b": 3}), [request("a", A, 4), request("b", B, 6)])
    events = run(made)
    assert outputs(events) == {"b": EXPECTED["b"][:6]}
    assert not of(Failed, events)
    made.submit(both(chunks=[(0, "a", 0, 6)]))
    assert outputs(run(made)) == {"a": EXPECTED["a"][:4]}
    made.check_integrity()


@pytest.mark.parametrize("how", [RECOMPUTE, SWAP])
def test_a_preempted_row_frees_its_blocks_and_keeps_its_output(one, how: int):
    one.submit(both(num_steps=3), requests())
    run(one)
    one.submit(plan("i0", {"a": 6}, preemptions={"a": how}))
    events = run(one)
    row = one.residents.rows["a"]
    assert one.residents.pool.held(row.slot) == 0
    assert row.output == EXPECTED["a"][:3]
    assert row.computed == (0 if how == RECOMPUTE else 8)
    assert len(of(Preempted, events)) == 1


def test_swapped_kv_is_really_gone_from_its_blocks(one):
    """Another request takes the blocks meanwhile; what comes back is the copy."""
    one.submit(both(num_steps=3), requests())
    events = run(one)
    one.submit(plan("i0", {"a": 6}, preemptions={"a": SWAP}))
    events += run(one)
    for kv in one.residents.model.kv:
        held = one.residents.filled(one.residents.rows["b"])
        free = [block for block in range(len(kv)) if block not in held]
        kv[free] = torch.nan
    one.submit(plan("i0", BOTH, decodes=dict.fromkeys(BOTH, 200)))
    events += run(one)
    assert outputs(events) == EXPECTED


# Cancelling


def test_a_cancelled_request_holds_nothing_after_the_next_boundary(one):
    one.submit(both(), requests())
    events = one.poll()
    one.cancel("a")
    events += run(one)
    assert of(Cancelled, events) == [Cancelled(instance="i0", request_id="a")]
    assert outputs(events)["a"] == EXPECTED["a"][:1]
    assert outputs(events)["b"] == EXPECTED["b"]


def test_cancelling_what_is_not_here_is_confirmed(one):
    one.cancel("never seen")
    assert one.poll() == [Cancelled(instance="i0", request_id="never seen")]


def test_cancelling_throws_away_kv_that_waits_for_a_plan(pair):
    prefill, decode = pair
    handle = exported(prefill)
    decode.receive(handle)
    decode.cancel("a")
    assert run(decode) == [Cancelled(instance="d0", request_id="a")]
    with pytest.raises(ChannelError, match="no segment"):
        prefill._channel.receive(handle.place, handle.num_bytes)


def test_what_is_told_between_two_steps_happens_in_that_order(one):
    """Cancelled and sent again: the second life is not the one that was cancelled."""
    one.submit(both(num_steps=3), requests())
    run(one)
    one.cancel("a")
    one.submit(both(), [request("a", A)])
    events = run(one)
    assert events[0] == Cancelled(instance="i0", request_id="a")
    assert [t for s in steps(events) for id, _, t in s.tokens if id == "a"] == [*EXPECTED["a"]]


def test_a_request_that_is_sent_again_starts_over(one):
    """A loop that moved it elsewhere and back sends what was sampled as part of the prompt."""
    one.submit(both(num_steps=3), requests())
    run(one)
    longer = A + EXPECTED["a"][:5]
    one.submit(
        plan("i0", {"a": len(longer)}, chunks=[(0, "a", 0, len(longer))], decodes={"a": 200}),
        [request("a", longer, 19)],
    )
    assert outputs(run(one))["a"] == EXPECTED["a"][5:]


# Handing over


@pytest.fixture
def pair():
    """A prefill and a decode instance."""
    sides = [engine(id, checkpoint("llama"), channel="local") for id in ("p0", "d0")]
    yield sides
    for side in sides:
        side.check_integrity()
        side.close()


def exported(prefill, of_request=None) -> KVHandle:
    """Prefill request a and take its KV."""
    wanted = of_request or request("a", A)
    id, length = wanted.id, len(wanted.prompt)
    prefill.submit(
        plan("p0", {id: length}, chunks=[(0, id, 0, length)], exports={id: "d0"}), [wanted]
    )
    (event,) = of(KVExported, run(prefill))
    assert id not in prefill.residents.rows
    return event.handle


def hand_over(prefill, decode, wanted):
    id, length = wanted.id, len(wanted.prompt)
    decode.submit(plan("d0", {id: length}, decodes={id: 200}, imports={id: "p0"}))
    prefill.submit(
        plan("p0", {id: length}, chunks=[(0, id, 0, length)], exports={id: "d0"}), [wanted]
    )
    return run(prefill, decode)


def test_a_handle_says_all_that_is_needed_to_go_on(pair):
    handle = exported(pair[0])
    assert (handle.source, handle.target, handle.request.id) == ("p0", "d0", "a")
    assert (handle.output, handle.computed_tokens) == (EXPECTED["a"][:1], 6)
    assert handle.layout == pair[1].capability().kv_layout
    assert pair[0].residents.pool.num_held == 0


def test_a_request_that_ends_with_its_first_token_is_not_handed_over(pair):
    events = hand_over(*pair, request("a", A, max_output_tokens=1))
    assert finished(events) == {"a": FinishReason.LENGTH}
    assert not of(KVExported, events)


def test_received_kv_is_kept_until_a_plan_names_its_request(pair):
    prefill, decode = pair
    decode.receive(exported(prefill))
    decode.submit(plan("d0", {"other": 3}, imports={"other": "p0"}, decodes={"other": 9}))
    assert run(decode) == []
    decode.submit(plan("d0", {"a": 6}, imports={"a": "p0"}, decodes={"a": 200}))
    assert outputs(run(decode), first=1) == {"a": EXPECTED["a"][1:]}
    assert not decode.residents.rows


def test_a_plan_waits_for_kv_while_others_decode(pair):
    """A request whose KV comes late joins late; the one that is there is not held up."""
    prefill, decode = pair
    late, early = exported(prefill), exported(prefill, request("b", B))
    decode.receive(early)
    decode.submit(
        plan(
            "d0",
            BOTH,
            decodes=dict.fromkeys(BOTH, 200),
            imports=dict.fromkeys(BOTH, "p0"),
        )
    )
    events = decode.poll() + decode.poll()
    assert [step.decodes for step in steps(events)] == [("b",), ("b",)]
    decode.receive(late)
    events += run(decode)
    assert steps(events)[2].decodes == ("b", "a")
    assert {e.request_id: e.begin_us for e in of(KVImported, events)} == {
        "a": late.begin_us,
        "b": early.begin_us,
    }


def test_imports_take_room_in_the_order_of_their_arrival(pair):
    prefill, _ = pair
    decode = engine("d0", checkpoint("llama"), kv_blocks=5, block_tokens=8, channel="local")
    third = request("c", B, 4)
    handles = [exported(prefill, one) for one in (request("a", A, 8), request("b", B, 6), third)]
    for handle in handles:
        decode.receive(handle)
    ids = {"a": 6, "b": 3, "c": 3}
    decode.submit(
        plan(
            "d0",
            ids,
            decodes=dict.fromkeys(ids, 200),
            imports=dict.fromkeys(ids, "p0"),
            kv_blocks={"a": 3, "b": 3, "c": 1},
        )
    )
    events = run(decode)
    assert [event.request_id for event in of(KVImported, events)] == ["a", "b", "c"]
    assert steps(events)[0].decodes == ("a",)
    assert {id: len(tokens) for id, tokens in outputs(events, 1).items()} == {
        "a": 7,
        "b": 5,
        "c": 3,
    }
    decode.check_integrity()


def test_a_request_may_come_back_to_the_instance_that_it_left(pair):
    prefill, decode = pair
    events = hand_over(prefill, decode, request("a", A))[:3]
    decode.close()
    back = exported(prefill, request("a", A))
    prefill.receive(msgspec.structs.replace(back, source="d0", target="p0"))
    prefill.submit(plan("p0", {"a": 6}, decodes={"a": 200}, imports={"a": "d0"}))
    events = run(prefill)
    assert outputs(events, first=1) == {"a": EXPECTED["a"][1:]}


def spoil_layout(handle: KVHandle) -> KVHandle:
    return msgspec.structs.replace(handle, layout="float32:1x1x1x1x1:none")


def spoil_place(handle: KVHandle) -> KVHandle:
    return msgspec.structs.replace(handle, place="local:nowhere")


def spoil_count(handle: KVHandle) -> KVHandle:
    return msgspec.structs.replace(handle, computed_tokens=5)


def spoil_size(handle: KVHandle) -> KVHandle:
    return msgspec.structs.replace(handle, num_bytes=handle.num_bytes - 8)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_layout, "KV from 'p0' has layout float32:1x1x1x1x1:none, here it is float32:2x8x2x"),
        (spoil_place, "no segment 'local:nowhere' in this process"),
        (spoil_count, "holds other KV than its handle says"),
        (spoil_size, "bytes, "),
    ],
)
def test_kv_that_is_not_what_its_handle_says_is_refused(pair, spoil, message: str):
    prefill, decode = pair
    decode.receive(spoil(exported(prefill)))
    decode.submit(plan("d0", {"a": 6}, decodes={"a": 200}, imports={"a": "p0"}))
    events = run(decode)
    assert message in errors(events)["a"]
    assert not outputs(events)
    assert decode.residents.pool.num_held == 0


def test_kv_of_another_model_is_refused(pair):
    other = engine("d0", checkpoint("llama-biased"), channel="local")
    other.receive(exported(pair[0]))
    other.submit(plan("d0", {"a": 6}, decodes={"a": 200}, imports={"a": "p0"}))
    assert "both instances need one model, dtype and block_tokens" in errors(run(other))["a"]


def flip_bit(decode, handle: KVHandle, *, hide: bool) -> None:
    """Flip the top exponent bit of a float of the payload; `hide` mends the checksum."""
    segment = decode._channel.receive(handle.place, handle.num_bytes)
    segment[HEADER_BYTES + 3] ^= 0x40
    if hide:
        struct.pack_into("<I", segment, 60, checksum(segment[HEADER_BYTES:]))


@pytest.mark.parametrize("hide", [False, True])
def test_a_flipped_bit_is_refused_and_would_have_changed_the_output(pair, hide: bool):
    """With the checksum mended the same flip passes, and wrong tokens come out: the check works."""
    prefill, decode = pair
    handle = exported(prefill)
    flip_bit(decode, handle, hide=hide)
    decode.receive(handle)
    decode.submit(plan("d0", {"a": 6}, decodes={"a": 200}, imports={"a": "p0"}))
    events = run(decode)
    if hide:
        tokens = outputs(events, first=1)["a"]
        assert len(tokens) == 23
        assert tokens != EXPECTED["a"][1:]
    else:
        assert "was damaged on the way (its checksum differs)" in errors(events)["a"]
        assert not outputs(events)


def test_the_checksum_sees_any_flipped_bit_and_any_swapped_page():
    payload = np.random.default_rng(0).integers(0, 256, 4096 * 3 + 40, np.uint8)
    whole = checksum(memoryview(payload))
    for bit in range(0, len(payload) * 8, 777):
        payload[bit // 8] ^= 1 << bit % 8
        assert checksum(memoryview(payload)) != whole
        payload[bit // 8] ^= 1 << bit % 8
    swapped = np.concatenate((payload[4096:8192], payload[:4096], payload[8192:]))
    assert checksum(memoryview(swapped)) != whole


# The end


def test_an_instance_that_breaks_says_so_once_and_stays_quiet(one):
    one.submit(both(), requests())
    one.residents.model.kernels = _Broken()
    events = run(one)
    assert errors(events) == {None: "RuntimeError: no more memory"}
    one.submit(both())
    assert one.poll() == []


class _Broken:
    """Kernels on a device that is full."""

    short_tokens, padded = 1, True

    def begin_step(self, batch) -> None:
        raise RuntimeError("no more\n memory")


def test_closing_frees_the_kv_that_waits():
    prefill, decode = (engine(id, checkpoint("llama")) for id in ("p0", "d0"))
    handle = exported(prefill)
    decode.receive(handle)
    decode.close()
    assert decode.poll() == []
    with pytest.raises(Exception, match="No such file or directory"):
        prefill._channel.receive(handle.place, handle.num_bytes)


def test_a_step_report_is_a_message(one):
    """Events cross processes as msgpack."""
    one.submit(both(num_steps=2), requests())
    for event in run(one):
        if isinstance(event, StepReport):
            assert msgspec.msgpack.decode(msgspec.msgpack.encode(event), type=StepReport) == event


def test_bfloat16_is_as_close_to_float32_as_transformers_is():
    """The logits of a prompt, in C and in torch, against those of float32."""
    model = copy.deepcopy(reference("llama"))
    ids = torch.tensor([[*A, *B]])
    with torch.no_grad():
        exact = model(ids).logits[0, -1]
        theirs = model.to(torch.bfloat16)(ids).logits[0, -1].float()
    allowed = 2 * (theirs - exact).abs().max()
    for native in ("on", "off"):
        made = engine("i0", checkpoint("llama"), dtype="bfloat16", native=native)
        assert (last_logits(made, tuple(ids[0].tolist())) - exact).abs().max() < allowed


def last_logits(made, prompt: tuple[int, ...]):
    from sagec.runtime.engines.torch.batch import Span, build_batch

    residents = made.residents
    row = residents.add(request("a", prompt))
    residents.make_room(row, len(prompt))
    kernels = residents.model.kernels
    for begin, end in ((0, 5), (5, len(prompt) - 1), (len(prompt) - 1, len(prompt))):
        span = Span(row.slot, begin, prompt[begin:end], True)
        batch = build_batch(
            [span], residents.pool, torch.device("cpu"), kernels.short_tokens, kernels.padded
        )
        logits = residents.model.forward(batch)
    return logits[0].float()
