"""The torch engine gives the tokens that transformers gives, however its work is cut up."""

import functools
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import msgspec  # noqa: E402

from sagec.runtime.comm import shared_memory  # noqa: E402
from sagec.runtime.engines import KVExported, KVHandle, KVImported, Preempted  # noqa: E402
from sagec.runtime.plan import RECOMPUTE, SWAP  # noqa: E402
from tests.checkpoints import KINDS, checkpoint, decided  # noqa: E402
from tests.torch_engines import engine, of, outputs, plan, request, run, steps  # noqa: E402

TOKENS = 24
LENGTHS = (1, 2, 7, 8, 9, 37, 64, 100)


def prompt(kind: str, length: int) -> tuple[int, ...]:
    return decided(kind, length, TOKENS)[0]


def expected(kind: str, length: int) -> tuple[int, ...]:
    return decided(kind, length, TOKENS)[1]


@functools.cache
def shared_engine(kind: str, native: str = "auto", prefix_cache: str = "on"):
    """One engine a kind: the tests leave it empty, which `check_empty` looks after."""
    return engine("i0", checkpoint(kind), native=native, prefix_cache=prefix_cache)


def check_empty(one) -> None:
    one.check_integrity()
    assert one.residents.pool.num_held == 0
    assert not one.residents.rows


def whole(id: str, length: int) -> tuple[int, str, int, int]:
    return (0, id, 0, length)


@pytest.mark.parametrize("native", ["auto", "off"])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_prompts_in_one_batch_give_the_tokens_of_transformers(kind: str, native: str):
    one = shared_engine(kind, native)
    ids = {f"r{length}": length for length in LENGTHS}
    one.submit(
        plan(
            "i0",
            ids,
            chunks=[whole(id, length) for id, length in ids.items()],
            decodes=dict.fromkeys(ids, 200),
        ),
        [request(id, prompt(kind, length)) for id, length in ids.items()],
    )
    assert outputs(run(one)) == {id: expected(kind, length) for id, length in ids.items()}
    check_empty(one)


def cut(length: int, cuts: list[int]) -> list[tuple[int, int]]:
    edges = [0, *sorted({c for c in cuts if 0 < c < length}), length]
    return list(itertools.pairwise(edges))


@pytest.mark.parametrize("native", ["auto", "off"])
@settings(max_examples=15, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_any_chunks_in_any_batch_give_the_same_tokens(native: str, data, kind: str):
    """Each request begins at a step of its own and is cut where it likes; all share steps."""
    one = shared_engine(kind, native)
    lengths = data.draw(st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=6))
    ids = {f"r{number}": length for number, length in enumerate(lengths)}
    chunks = []
    for id, length in ids.items():
        begin_step = data.draw(st.integers(0, 6))
        cuts = data.draw(st.lists(st.integers(1, length), max_size=5))
        for step, (begin, end) in enumerate(cut(length, cuts)):
            chunks.append((begin_step + step, id, begin, end))
    budget = data.draw(st.sampled_from([1, 3, 512]))
    one.submit(
        plan(
            "i0",
            ids,
            chunks=chunks,
            decodes=dict.fromkeys(ids, 200),
            num_steps=400,
            max_step_tokens=budget,
        ),
        [request(id, prompt(kind, length)) for id, length in ids.items()],
    )
    assert outputs(run(one)) == {id: expected(kind, length) for id, length in ids.items()}
    check_empty(one)


@pytest.mark.parametrize("channel", ["local", "shared-memory"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prefill_and_a_decode_instance_give_the_same_tokens(kind: str, channel: str):
    prefill = engine("p0", checkpoint(kind), channel=channel)
    decode = engine("d0", checkpoint(kind), channel=channel)
    ids = {f"r{length}": length for length in LENGTHS}
    prefill.submit(
        plan(
            "p0",
            ids,
            chunks=[(step, id, 0, length) for step, (id, length) in enumerate(ids.items())],
            exports=dict.fromkeys(ids, "d0"),
        ),
        [request(id, prompt(kind, length)) for id, length in ids.items()],
    )
    decode.submit(
        plan("d0", ids, decodes=dict.fromkeys(ids, 200), imports=dict.fromkeys(ids, "p0"))
    )
    events = run(prefill, decode)
    assert outputs(events) == {id: expected(kind, length) for id, length in ids.items()}
    assert len(of(KVExported, events)) == len(of(KVImported, events)) == len(ids)
    for one in (prefill, decode):
        check_empty(one)
        one.close()


_OTHER_PROCESS = """
import sys, msgspec
from pathlib import Path
from sagec.runtime.engines import KVExported, StepReport
from tests.torch_engines import engine, plan, request, run

def main(folder, id, length):
    prompt = tuple(msgspec.json.decode(sys.stdin.buffer.readline()))
    one = engine("p0", Path(folder))
    one.submit(
        plan("p0", {id: length}, chunks=[(0, id, 0, length)], exports={id: "d0"}),
        [request(id, prompt)],
    )
    for event in run(one):
        if isinstance(event, KVExported):
            print(msgspec.json.encode(event.handle).decode(), flush=True)
    sys.stdin.readline()  # until the other side has taken it
    one.close()

main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
"""


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_kv_crosses_from_one_process_to_another(kind: str):
    decode = engine("d0", checkpoint(kind))
    command = [sys.executable, "-c", _OTHER_PROCESS, str(checkpoint(kind)), "r", "37"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root
    ) as other:
        assert other.stdin and other.stdout and other.stderr
        other.stdin.write(msgspec.json.encode(prompt(kind, 37)) + b"\n")
        other.stdin.flush()
        handle = msgspec.json.decode(other.stdout.readline(), type=KVHandle)
        decode.receive(handle)
        decode.submit(plan("d0", {"r": 37}, decodes={"r": 200}, imports={"r": "p0"}))
        events = run(decode)
        other.stdin.close()
        assert other.stderr.read() == b""
    assert handle.output + outputs(events, first=1)["r"] == expected(kind, 37)
    assert not (shared_memory.FOLDER / handle.place).exists()
    check_empty(decode)


@pytest.mark.parametrize("prefix_cache", ["on", "off"])
@pytest.mark.parametrize("how", [RECOMPUTE, SWAP])
@pytest.mark.parametrize("kind", ["llama", "qwen2-tied-yarn", "qwen3"])
def test_a_preempted_request_goes_on_with_the_same_tokens(kind: str, how: int, prefix_cache: str):
    one = shared_engine(kind, prefix_cache=prefix_cache)
    ids = {"kept": 37, "gone": 64}
    one.submit(
        plan(
            "i0",
            ids,
            chunks=[whole(id, length) for id, length in ids.items()],
            decodes=dict.fromkeys(ids, 200),
            num_steps=8,
        ),
        [request(id, prompt(kind, length)) for id, length in ids.items()],
    )
    events = run(one)
    row = one.residents.rows["gone"]
    tokens = len(row.tokens)
    one.submit(plan("i0", ids, decodes={"kept": 200}, preemptions={"gone": how}, num_steps=4))
    events += run(one)
    assert one.residents.pool.held(row.slot) == 0
    assert len(of(Preempted, events)) == 1
    ids["gone"] = tokens
    one.submit(
        plan(
            "i0",
            ids,
            chunks=[(0, "gone", 0, 20), (1, "gone", 20, tokens)],
            decodes=dict.fromkeys(ids, 200),
        )
    )
    events += run(one)
    assert outputs(events) == {"kept": expected(kind, 37), "gone": expected(kind, 64)}
    computed = sum(end - begin for e in steps(events) for _, begin, end in e.chunks)
    computed += sum(found for e in steps(events) for _, found in e.reused)
    assert computed == 37 + 64 + (tokens if how == RECOMPUTE else 0)
    check_empty(one)


@settings(max_examples=25, deadline=None)
@given(polls=st.lists(st.integers(0, 5), min_size=1, max_size=4), size=st.integers(1, 40))
def test_a_plan_superseded_midway_computes_no_token_twice(polls: list[int], size: int):
    """The same work is planned again and again, from the beginning; progress is absolute."""
    kind = "qwen3"
    one = shared_engine(kind)
    ids = {"a": 100, "b": 9}
    chunks = [
        (step, id, begin, min(begin + size, length))
        for id, length in ids.items()
        for step, begin in enumerate(range(0, length, size))
    ]
    requests = [request(id, prompt(kind, length)) for id, length in ids.items()]
    events = []
    for number, count in enumerate([*polls, 1]):
        again = plan(
            "i0",
            ids,
            chunks=chunks,
            decodes=dict.fromkeys(ids, 200),
            num_steps=400,
            plan_id=f"plan-{number}",
        )
        one.submit(again, requests if number == 0 else ())
        for _ in range(count):
            events += one.poll()
    events += run(one)
    assert outputs(events) == {id: expected(kind, length) for id, length in ids.items()}
    computed = [c for e in steps(events) for c in e.chunks]
    computed += [(id, 0, found) for e in steps(events) for id, found in e.reused]
    for id, length in ids.items():
        spans = [(begin, end) for other, begin, end in computed if other == id]
        assert sum(end - begin for begin, end in spans) == length
    check_empty(one)
