"""A recording replays to the same plans, and says what another strategy would have decided."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from sagec.compiler import Compiler
from sagec.replay import Replay, as_json, asked, differing_fields
from sagec.runtime import strategies
from sagec.runtime.clock import VirtualClock
from sagec.runtime.plan import digest_of
from sagec.runtime.recording import Header, Recorder, Recording, RecordingError
from sagec.runtime.request import Sampling
from sagec.runtime.state import Decision, State, Waiting
from sagec.strategies import strategy_of
from tests.echo_cluster import requests
from tests.recordings import recorded


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """A run of 24 requests under fifo."""
    path = tmp_path_factory.mktemp("recording") / "run.rec"
    recorded(path, requests(24))
    return Recording(path)


@pytest.mark.parametrize("name", strategies.known())
def test_every_strategy_replays_to_the_same_decisions_and_plans(name: str, tmp_path: Path) -> None:
    served, _ = recorded(tmp_path / "run.rec", requests(16), name)
    outcomes = list(Replay(Recording(tmp_path / "run.rec")).outcomes())
    assert len(outcomes) == len(served.rounds)
    assert [o.differences for o in outcomes] == [()] * len(outcomes)
    assert sum(o.identical for o in outcomes) == sum(len(r.plans) for r in served.rounds) > 0


def test_a_strategy_of_the_language_replays(tmp_path: Path) -> None:
    text = "strategy short { order by prompt_tokens }"
    recorded(tmp_path / "run.rec", requests(8), text)
    replay = Replay(Recording(tmp_path / "run.rec"))
    assert replay.strategy.name == "short"
    assert all(not outcome.differences for outcome in replay.outcomes())


def test_another_compiler_is_noticed(run: Recording) -> None:
    replay = Replay(run)
    replay.planner.builder.horizon += 1
    differing = [outcome for outcome in replay.outcomes() if outcome.differences]
    assert differing
    round_, plans = differing[0].round, differing[0].plans
    assert differing[0].identical < plans
    assert differing[0].differences[0].startswith(f"plan round_{round_}/")


def test_another_decision_is_noticed_and_its_fields_are_named(run: Recording) -> None:
    replay = Replay(run)
    replay.strategy = Nobody()
    outcomes = list(replay.outcomes())
    assert outcomes[0].differences == ("nobody decides otherwise: verdict, reason",)
    assert all(outcome.identical == outcome.plans for outcome in outcomes)


@dataclasses.dataclass(frozen=True)
class Nobody:
    """Lets nobody in."""

    name = "nobody"

    def decide(self, state: State) -> Decision:
        return Decision.defer(state.waiting, "for no reason")


def test_a_round_prints_as_ir_that_compiles_to_its_plans(run: Recording) -> None:
    replay = Replay(run)
    for recorded_round in list(run.rounds())[::5]:
        text = replay.text(recorded_round)
        compiler = Compiler()
        unit = compiler.parse(text, "round.mlir")
        compiler.optimize(unit.module, "round")
        digests = sorted(digest_of(plan) for plan in compiler.lower(unit.module))
        assert digests == sorted(note.digest for note in recorded_round.plans)


def test_a_round_as_json_has_a_list_for_each_column(run: Recording) -> None:
    recorded_round = next(run.rounds())
    shown: Any = msgspec.json.decode(msgspec.json.encode(as_json(recorded_round)))
    assert shown["state"]["waiting"]["ids"] == recorded_round.state.waiting.ids.tolist()
    assert shown["decision"]["verdict"] == recorded_round.decision.verdict.tolist()
    assert shown["plans"][0]["digest"] == recorded_round.plans[0].digest


def test_the_same_strategy_would_change_nothing(run: Recording) -> None:
    assert all(not changes for _, changes in Replay(run).changes(strategy_of("fifo")))


def test_what_another_strategy_would_do_is_said_with_both_reasons(run: Recording) -> None:
    changes = [c for _, of_round in Replay(run).changes(Nobody()) for c in of_round]
    admitted = [c for c in changes if c.recorded == "admit"]
    assert admitted
    assert {(c.other, c.other_reason) for c in admitted} == {("defer", "for no reason")}
    assert str(admitted[0]) == (
        f"round {admitted[0].round}: {admitted[0].request_id}: admit (its turn, and it fits) "
        "-> defer (for no reason)"
    )


@dataclasses.dataclass(frozen=True)
class Everybody:
    """Throws everybody out."""

    name = "everybody"

    def decide(self, state: State) -> Decision:
        rows = np.arange(len(state.running))
        return Decision.defer(state.waiting, "full").preempt(rows, "to make room")


def test_whom_another_strategy_would_preempt_is_said(run: Recording) -> None:
    changes = [c for _, of_round in Replay(run).changes(Everybody()) for c in of_round]
    preempted = [c for c in changes if c.other == "preempt"]
    running = sum(len(one.state.running) for one in run.rounds())
    assert len(preempted) == running > 0
    assert (preempted[0].recorded, preempted[0].recorded_reason) == ("keep", "")
    assert preempted[0].other_reason == "to make room"


@dataclasses.dataclass(frozen=True)
class Counting:
    """Remembers how often it was asked."""

    name = "counting"

    def decide(self, state: State) -> Decision:
        count = state.memory.get("count", 0)
        assert set(state.memory) <= {"count"}
        memory = {"count": count + 1}
        waiting = Decision.defer(state.waiting, f"asked {count} times")
        return dataclasses.replace(waiting, memory=memory)


def test_another_strategy_remembers_what_it_said_itself(run: Recording) -> None:
    last = [of_round for _, of_round in Replay(run).changes(Counting()) if of_round][-1]
    rounds = [one.state.round for one in run.rounds()]
    assert last[0].other_reason in ("", f"asked {rounds.index(last[0].round)} times")


def test_decisions_differ_by_their_fields() -> None:
    one = Decision.defer(Waiting.of(["a", "b"]))
    assert differing_fields(one, dataclasses.replace(one, memory={})) == []
    assert differing_fields(one, dataclasses.replace(one, turn_steps=np.zeros(2, np.int64))) == [
        "turn_steps"
    ]
    assert differing_fields(one, dataclasses.replace(one, mode="strict", memory={"a": 1})) == [
        "mode",
        "memory",
    ]


def test_a_recording_without_a_compiler_has_nothing_to_replay(tmp_path: Path) -> None:
    Recorder(tmp_path / "x.rec", Header(strategy="fifo"), VirtualClock()).close()
    with pytest.raises(RecordingError, match="no compiler made its plans"):
        Replay(Recording(tmp_path / "x.rec"))


def test_a_setting_of_a_planner_that_nobody_knows_is_named(tmp_path: Path) -> None:
    header = Header(strategy="fifo", cluster="builtin.module {}", planner={"mood": "good"})
    Recorder(tmp_path / "x.rec", header, VirtualClock()).close()
    with pytest.raises(RecordingError, match="a planner's 'mood' means nothing here"):
        Replay(Recording(tmp_path / "x.rec"))


def test_the_requests_come_back_with_arrivals_from_0_on(run: Recording) -> None:
    sent = requests(24)
    got = asked(run)
    assert [each.request for each in got] == sent
    assert all(len(each.tokens) == 20 for each in got)
    assert all(each.is_determined for each in got)


def test_a_request_sampled_without_a_seed_is_not_determined(run: Recording) -> None:
    each = asked(run)[0]
    for seed, determined in ((None, False), (7, True)):
        sampling = Sampling(temperature=0.8, seed=seed)
        request = msgspec.structs.replace(each.request, sampling=sampling)
        assert dataclasses.replace(each, request=request).is_determined is determined


def test_requests_without_prompts_are_not_served_again(tmp_path: Path) -> None:
    recorded(tmp_path / "run.rec", requests(2), prompts=False)
    with pytest.raises(RecordingError, match="recorded without prompts"):
        asked(Recording(tmp_path / "run.rec"))
    recorded(tmp_path / "none.rec", [])
    with pytest.raises(RecordingError, match="no request in it"):
        asked(Recording(tmp_path / "none.rec"))
