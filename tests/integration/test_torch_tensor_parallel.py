"""The torch engine on several ranks, each a process: the tokens of one, and no rank left behind."""

import contextlib
import functools
import os
import select
import signal
import threading
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from sagec.runtime.engines import (  # noqa: E402
    Failed,
    InstanceSpec,
    KVExported,
    KVImported,
    StepReport,
)
from sagec.runtime.kv import block_hashes  # noqa: E402
from sagec.runtime.plan import RECOMPUTE, SWAP  # noqa: E402
from sagec.runtime.process import ProcessEngine  # noqa: E402
from tests.checkpoints import KINDS, checkpoint, decided  # noqa: E402
from tests.torch_engines import engine, of, outputs, plan, request, reused, run  # noqa: E402
from tests.torch_programs import program  # noqa: E402

TOKENS = 24
LENGTHS = (1, 7, 8, 37, 100)
SLOW = pytest.mark.slow
_SHARED: list = []


def ranked(id: str, kind: str = "llama", tp: int = 2, how: tuple = (), **options: str):
    """An engine on `tp` ranks, with a program for so many; on one, with its own layers."""
    if tp > 1:
        options |= {"tp": str(tp), "program": str(program(checkpoint(kind), tp, *how))}
    return engine(id, checkpoint(kind), channel="local", host_blocks="8", **options)


@functools.cache
def shared(id: str, tp: int = 2):
    """An engine that the tests leave empty; `close_shared` ends its processes."""
    one = ranked(id, tp=tp)
    _SHARED.append(one)
    return one


@pytest.fixture(scope="module", autouse=True)
def close_shared() -> Iterator[None]:
    yield
    for one in _SHARED:
        one.close()


def check_empty(one) -> None:
    one.check_integrity()
    assert one.residents.pool.num_held == 0
    assert not one.residents.rows


def asked(kind: str, lengths=LENGTHS, prefix: str = "r"):
    """Ids with prompt lengths, the requests, and the tokens that they are to get."""
    ids = {f"{prefix}{length}": length for length in lengths}
    known = {id: decided(kind, length, TOKENS) for id, length in ids.items()}
    requests = [request(id, prompt) for id, (prompt, _) in known.items()]
    return ids, requests, {id: tokens for id, (_, tokens) in known.items()}


def serve(one, kind: str) -> list:
    """One plan with chunks of 16 tokens, the next one of each request a step later."""
    ids, requests, expected = asked(kind)
    chunks = [
        (number + begin // 16, id, begin, min(begin + 16, length))
        for number, (id, length) in enumerate(ids.items())
        for begin in range(0, length, 16)
    ]
    one.submit(plan("i0", ids, chunks=chunks, decodes=dict.fromkeys(ids, 200)), requests)
    events = run(one)
    assert outputs(events) == expected
    return events


def test_prompts_in_chunks_get_the_tokens_of_transformers():
    one = shared("i0")
    before = one.residents.model.ranks.statistics()
    steps = len(serve(one, "llama"))
    check_empty(one)
    after = one.residents.model.ranks.statistics()
    assert after.messages - before.messages >= 2 * steps
    assert after.sent_bytes > before.sent_bytes


@pytest.mark.parametrize(
    ("kind", "native"),
    [*((kind, "auto") for kind in KINDS if kind != "llama-one-kv-head"), ("qwen3-tied", "off")],
)
@SLOW
def test_every_kind_of_model_gets_the_tokens_of_transformers(kind: str, native: str):
    """Biases are added once, the output head is shared out also where it is the embedding, and the
    vocabulary, which two does not divide, is padded."""
    one = ranked("i0", kind, native=native)
    with contextlib.closing(one):
        serve(one, kind)
        check_empty(one)


BOTH = "overlap-communication,fuse-communication"


@pytest.mark.parametrize(
    ("how", "most_messages"),
    [
        pytest.param((2, "overlap-communication"), 10, id="overlapped"),
        pytest.param((2, BOTH, 20_000.0), 6, id="fused", marks=SLOW),
    ],
)
def test_passes_over_two_lanes_change_messages_and_no_token(how: tuple, most_messages: int):
    """Two layers have four all-reduces a lane, and the logits are gathered. Fused, lanes share."""
    one = ranked("i0", how=how)
    with contextlib.closing(one):
        steps = len(of(StepReport, serve(one, "llama")))
        assert one.residents.model.ranks.statistics().messages <= most_messages * steps
        check_empty(one)


@SLOW
def test_four_ranks_give_the_tokens_of_one(monkeypatch):
    monkeypatch.setitem(KINDS, "llama-wide", ("Llama", {"num_key_value_heads": 4}))
    one = ranked("i0", "llama-wide", tp=4)
    with contextlib.closing(one):
        serve(one, "llama-wide")
        check_empty(one)


@pytest.mark.parametrize("how", [RECOMPUTE, SWAP], ids=["recompute", "swap"])
def test_a_preempted_request_goes_on_with_the_same_tokens(how: int):
    one = shared("i0")
    ids, requests, expected = asked("llama", (37, 64))
    whole = [(0, id, 0, length) for id, length in ids.items()]
    decodes = dict.fromkeys(ids, 200)
    one.submit(plan("i0", ids, chunks=whole, decodes=decodes, num_steps=8), requests)
    events = run(one)
    row = one.residents.rows["r64"]
    one.submit(plan("i0", ids, decodes={"r37": 200}, preemptions={"r64": how}, num_steps=4))
    events += run(one)
    assert one.residents.pool.held(row.slot) == 0
    if how == SWAP:
        assert row.host_kv is not None and row.host_kv.shape[-2] == 2  # the heads of both ranks
    one.submit(
        plan(
            "i0",
            {"r37": 37, "r64": len(row.tokens)},
            chunks=[] if how == SWAP else [(0, "r64", 0, len(row.tokens))],
            decodes=decodes,
        )
    )
    assert outputs(events + run(one)) == expected
    check_empty(one)


@pytest.mark.parametrize(("source", "target"), [(2, 2), (1, 2), (2, 1)])
def test_kv_is_handed_over_between_any_numbers_of_ranks(source: int, target: int):
    prefill, decode = shared("i0", source), shared("d0", target)
    assert prefill.capability() == decode.capability()
    ids, requests, expected = asked("llama", prefix=f"{source}-{target}-")
    chunks = [(step, id, 0, length) for step, (id, length) in enumerate(ids.items())]
    prefill.submit(plan("i0", ids, chunks=chunks, exports=dict.fromkeys(ids, "d0")), requests)
    decode.submit(
        plan("d0", ids, decodes=dict.fromkeys(ids, 200), imports=dict.fromkeys(ids, "i0"))
    )
    events = run(prefill, decode)
    assert outputs(events) == expected
    assert len(of(KVExported, events)) == len(of(KVImported, events)) == len(ids)
    check_empty(prefill)
    check_empty(decode)


def test_a_cached_prefix_is_found_again_on_all_ranks_also_where_it_was_in_host_memory():
    one = shared("i0")
    prompt, tokens = decided("llama", 65, TOKENS)
    names = block_hashes(prompt + tokens[:-1], 8)
    for id in ("first", "second"):
        one.submit(
            plan("i0", {id: 65}, chunks=[(0, id, 0, 65)], decodes={id: 200}),
            [request(id, prompt)],
        )
        events = run(one)
        assert outputs(events) == {id: tokens}
        moves = [(name, 0, 1) for name in reversed(names[4:])]
        one.submit(plan("i0", {}, migrations=moves, num_steps=0))
        run(one)
        assert one.residents.statistics().tiers.used[0] == len(moves)
    assert reused(events) == {"second": 64}
    check_empty(one)


def test_a_rank_that_is_killed_fails_the_instance_in_one_line_and_leaves_no_process():
    one = ranked("i0")
    ids, requests, _ = asked("llama", (8, 37))
    one.submit(
        plan(
            "i0",
            ids,
            decodes=dict.fromkeys(ids, 200),
            chunks=[(0, id, 0, length) for id, length in ids.items()],
        ),
        requests,
    )
    assert one.poll()
    (pid,) = one.residents.rank.others.pids
    gone = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    assert select.select([gone], (), (), 30)[0]
    events = [event for _ in range(3) for event in one.poll()]
    (failed,) = of(Failed, events)
    assert failed.request_id is None
    assert failed.error == f"RankLost: rank 1 (process {pid}) was killed by SIGKILL"
    one.close()
    os.close(gone)


def test_a_rank_that_is_killed_within_a_step_is_no_hang():
    """It is stopped first, so that rank 0 waits for it in a collective."""
    one = ranked("i0")
    ids, requests, _ = asked("llama", (100,))
    chunks = [(0, "r100", 0, 100)]
    one.submit(plan("i0", ids, chunks=chunks, decodes=dict.fromkeys(ids, 200)), requests)
    (pid,) = one.residents.rank.others.pids
    os.kill(pid, signal.SIGSTOP)
    with contextlib.closing(one):
        killer = threading.Timer(0.3, os.kill, (pid, signal.SIGKILL))
        killer.start()
        (failed,) = one.poll()
        killer.join()
        assert isinstance(failed, Failed)
        assert failed.error == f"RankLost: rank 1 (process {pid}) was killed by SIGKILL"
        assert one.poll() == []


def test_no_rank_outlives_the_process_of_its_instance():
    folder = checkpoint("llama")
    spec = InstanceSpec(
        id="i0",
        engine="torch",
        model=str(folder),
        kv_blocks=16,
        block_tokens=8,
        options={"tp": "2", "program": str(program(folder, 2))},
    )
    one = ProcessEngine(spec)
    one.capability()
    with open(f"/proc/{one.pid}/task/{one.pid}/children") as children:
        (child,) = map(int, children.read().split())
    gone = os.pidfd_open(child)
    one.kill("to see who stays")
    assert select.select([gone], (), (), 30)[0]
    assert [event.error for event in of(Failed, one.poll(30))]
    one.close()
    os.close(gone)
