"""Somebody's own engine, stepped through a Session: the same tokens, and no threads."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagec.compiler import Compiler
from sagec.runtime.clock import VirtualClock
from sagec.runtime.embedding import Session, SessionError
from sagec.runtime.loop import Finished, Planned, Refused, Token
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.strategies import create
from tests.direct_planner import DirectPlanner

EXAMPLE = Path(__file__).parents[2] / "examples" / "embed.py"

CLUSTER = """
model toy { layers 2 hidden 64 heads 4 ffn 128 vocab 100 max_context 256 }
cluster here {
  device cpu kind cpu
  instance engine role both on cpu engine embedded model toy block 16 kv_blocks %d
}
serve on here mode %s chunk 32 horizon 8 { request "any" tokens 1 generate 1 }
"""


class Summing:
    """The next token is the sum of all before it; refuses chunks that leave a gap."""

    def __init__(self):
        self.kv = {}

    def compute(self, step):
        for name in step.dropped:
            self.kv.pop(name, None)
        for chunk in step.chunks:
            computed, total = self.kv.get(chunk.request_id, (0, 0)) if chunk.begin else (0, 0)
            assert computed == chunk.begin
            assert chunk.tokens
            self.kv[chunk.request_id] = chunk.end, total + sum(chunk.tokens)
        return {c.request_id: self.kv[c.request_id][1] % 100 for c in step.chunks if c.samples}


def expected(request, eos=()):
    tokens = list(request.prompt)
    for _ in range(request.max_output_tokens):
        token = sum(tokens) % 100
        if token in request.stop_tokens or token in eos:
            break
        tokens.append(token)
    return tokens[len(request.prompt) :]


def session(kv_blocks=24, planner=None, **more):
    return Session(
        create("fifo"), planner or DirectPlanner(), kv_blocks=kv_blocks, block_tokens=16, **more
    )


def run(session, engine, cancel_after=None):
    """Serve to the end; tokens and ends by request."""
    tokens, ends, steps = {}, {}, 0
    while session.num_requests:
        if step := session.next_step():
            steps += 1
            session.settle(step, engine.compute(step))
        for output in session.outputs():
            if isinstance(output, Token):
                tokens.setdefault(output.request_id, []).append(output.token)
            elif isinstance(output, Finished):
                ends[output.request_id] = output.reason
        if cancel_after and steps in cancel_after:
            session.cancel(cancel_after.pop(steps))
    return tokens, ends


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 90), min_size=1, max_size=12),
    kv_blocks=st.integers(9, 30),
    stop=st.sets(st.integers(0, 99), max_size=3),
    cancelled=st.dictionaries(st.integers(1, 20), st.sampled_from(["r0", "r1"]), max_size=2),
)
def test_every_request_gets_the_tokens_that_it_gets_alone(prompts, kv_blocks, stop, cancelled):
    asked = [
        Request(
            id=f"r{i}",
            prompt=tuple(range(i, i + n)),
            max_output_tokens=1 + 7 * i % 30,
            stop_tokens=tuple(stop),
        )
        for i, n in enumerate(prompts)
    ]
    serving = session(kv_blocks, eos_tokens=(7,))
    for request in asked:
        serving.add(request)
    tokens, ends = run(serving, Summing(), dict(cancelled))
    assert set(ends) == {request.id for request in asked}
    for request in asked:
        whole = expected(request, eos=(7,))
        found = tokens.get(request.id, [])
        if ends[request.id] is FinishReason.CANCELLED:
            assert request.id in cancelled.values()
            assert found == whole[: len(found)]
        else:
            assert ends[request.id] in (FinishReason.LENGTH, FinishReason.STOP)
            assert found == whole


@pytest.mark.parametrize("mode", ["hybrid", "time-share"])
@pytest.mark.parametrize("kv_blocks", [10, 40])
def test_the_compiler_plans_for_it(mode, kv_blocks):
    compiler = Compiler()
    planner = compiler.planner(compiler.parse(CLUSTER % (kv_blocks, mode), "c.sage").module)
    serving = session(kv_blocks, planner, model="toy")
    asked = [
        Request(id=f"r{i}", prompt=tuple(range(30 + i)), max_output_tokens=40) for i in range(9)
    ]
    for request in asked:
        serving.add(request)
    tokens, _ = run(serving, Summing())
    assert tokens == {request.id: expected(request) for request in asked}


def test_requests_may_come_between_any_two_steps():
    serving, engine = session(), Summing()
    tokens, count = {}, 0
    while serving.num_requests or count < 10:
        if count < 10:
            request = Request(id=f"r{count}", prompt=(count, 1, 2), max_output_tokens=9)
            serving.add(request)
            count += 1
        if step := serving.next_step():
            serving.settle(step, engine.compute(step))
        for output in serving.outputs():
            if isinstance(output, Token):
                tokens.setdefault(output.request_id, []).append(output.token)
    for i in range(10):
        request = Request(id=f"r{i}", prompt=(i, 1, 2), max_output_tokens=9)
        assert tokens[f"r{i}"] == expected(request)


def test_nothing_runs_behind_the_owners_back():
    threads = threading.active_count()
    serving, engine = session(clock=VirtualClock()), Summing()
    serving.add(Request(id="a", prompt=(1, 2), max_output_tokens=3))
    assert not engine.kv
    step = serving.next_step()
    assert [chunk.request_id for chunk in step.chunks] == ["a"]
    assert threading.active_count() == threads


def test_who_watches_hears_rounds_and_steps():
    heard = []
    serving = session(watch=[heard.append])
    serving.add(Request(id="a", prompt=(1, 2), max_output_tokens=3))
    run(serving, Summing())
    kinds = {type(said).__name__ for said in heard}
    assert {"Arrived", "Planned", "Submit", "StepReport", "Token", "Finished"} <= kinds
    assert any(isinstance(said, Planned) for said in heard)


def test_with_nothing_to_do_there_is_no_step():
    assert session().next_step() is None


def test_a_step_has_to_be_settled_once_with_all_its_tokens():
    serving, engine = session(), Summing()
    serving.add(Request(id="a", prompt=(1, 2), max_output_tokens=3))
    step = serving.next_step()
    with pytest.raises(SessionError, match="not settled yet"):
        serving.next_step()
    with pytest.raises(SessionError, match="'a' samples in this step; its token is missing"):
        serving.settle(step, {})
    serving.settle(step, engine.compute(step))
    with pytest.raises(SessionError, match="not the step that next_step gave last"):
        serving.settle(step, {"a": 1})


def test_what_it_cannot_serve_is_said_at_once():
    serving = session()
    with pytest.raises(SessionError, match="stop strings need a tokenizer"):
        serving.add(Request(id="a", prompt=(1,), stop_strings=("end",)))
    serving.add(Request(id="b", prompt=tuple(range(2000)), max_output_tokens=3))
    serving.add(Request(id="c", prompt=(1,), max_output_tokens=300))
    serving.add(Request(id="c", prompt=(2,), max_output_tokens=3))
    _, ends = run(serving, Summing())
    assert ends["b"] is FinishReason.REJECTED
    serving = session()
    serving.add(Request(id="c", prompt=(1,), max_output_tokens=3))
    serving.add(Request(id="c", prompt=(2,), max_output_tokens=3))
    serving.next_step()
    assert [type(output) for output in serving.outputs()] == [Refused]


def test_the_example_is_short_and_runs():
    assert len(EXAMPLE.read_text().splitlines()) < 60
    said = subprocess.run(
        [sys.executable, str(EXAMPLE)], capture_output=True, text=True, check=True
    ).stdout
    assert len(said.splitlines()) == 6
    assert said.startswith("request 0 length [80, 60, 20, 40,")
