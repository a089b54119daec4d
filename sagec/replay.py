"""Recorded rounds, compiled and decided again: the same plans bit by bit, or another strategy's.

replay = Replay(Recording("serve.rec"))
for outcome in replay.outcomes():
    print(outcome.round, outcome.differences)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from xdsl.dialects.builtin import ModuleOp

from sagec.dialects import pd
from sagec.planner import CompilingPlanner, Planner, put_on
from sagec.runtime.loop import Instance
from sagec.runtime.plan import digest_of
from sagec.runtime.recording import Header, Recording, RecordingError, Round
from sagec.runtime.recording.entries import Came, Tokens
from sagec.runtime.recording.rounds import same_value
from sagec.runtime.request import Request
from sagec.runtime.state import VERDICTS, Decision, State
from sagec.runtime.strategies import Strategy
from sagec.source import parse_module
from sagec.strategies import strategy_of, text_of
from sagec.universe import sagec_context


def header_of(
    strategy: Strategy,
    planner: Planner,
    instances: Sequence[Instance],
    *,
    prompts: bool = True,
    tokens: bool = True,
) -> Header:
    """What a recording says of itself, so that `Replay` can do all of it again.

    prompts, tokens: whether they are recorded too.
    """
    builder = planner.builder
    return Header(
        strategy=text_of(strategy),
        cluster=str(_cluster_of(builder.module)),
        planner={
            "mode": builder.mode,
            "chunk": builder.chunk,
            "horizon": builder.horizon,
            "policy": builder.policy,
            "pipeline": ",".join(str(made) for made in planner.passes.passes),
        },
        instances=tuple(instances),
        sagec=_version(),
        prompts=prompts,
        tokens=tokens,
    )


def _cluster_of(module: ModuleOp) -> ModuleOp:
    return ModuleOp([op.clone() for op in module.ops if not isinstance(op, pd.GraphOp)])


def _version() -> str:
    try:
        return version("sagec")
    except PackageNotFoundError:
        return "not installed"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A round that was done again. differences: what is not as recorded, a line each."""

    round: int
    plans: int
    identical: int
    differences: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Change:
    """A request with which another strategy would have done otherwise.

    recorded, other: a verdict, or for running requests preempt or keep; each with its reason.
    """

    round: int
    request_id: str
    recorded: str
    recorded_reason: str
    other: str
    other_reason: str

    def __str__(self) -> str:
        before = self.recorded + (f" ({self.recorded_reason})" if self.recorded_reason else "")
        now = self.other + (f" ({self.other_reason})" if self.other_reason else "")
        return f"round {self.round}: {self.request_id}: {before} -> {now}"

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        return dataclasses.asdict(self)


class Replay:
    """Does a recording's rounds again."""

    def __init__(self, recording: Recording, engine: str | None = None) -> None:
        """engine: on which its instances are, instead of those that it was made with.

        Raises RecordingError where it was made without the compiler or by an unknown strategy's
        text, as do StrategyError and ParseError."""
        self.recording = recording
        header = recording.header
        if not header.cluster:
            raise RecordingError(f"{recording.path}: no compiler made its plans: nothing to replay")
        self.module = parse_module(
            header.cluster, f"the cluster in {recording.path}", sagec_context()
        )
        if engine is not None:
            put_on(self.module, engine)
        self.strategy = strategy_of(header.strategy)
        self.planner = CompilingPlanner(self.module, **_settings(recording))

    def outcomes(self) -> Iterator[Outcome]:
        """Every round: decided again and compiled again, and compared."""
        return (self.outcome(each) for each in self.recording.rounds())

    def outcome(self, recorded: Round) -> Outcome:
        """A round, decided and compiled again."""
        differences = []
        decision = self.strategy.decide(recorded.state)
        if differing := differing_fields(decision, recorded.decision):
            differences.append(f"{self.strategy.name} decides otherwise: {', '.join(differing)}")
        plans = self.planner.plan(recorded.state, recorded.decision)
        now = {plan.plan_id: digest_of(plan) for plan in plans}
        before = {note.plan_id: note.digest for note in recorded.plans}
        for plan_id in sorted(now.keys() | before.keys()):
            if (was := before.get(plan_id)) != (made := now.get(plan_id)):
                differences.append(
                    f"plan {plan_id}: {was or 'none'} recorded, {made or 'none'} now"
                )
        identical = sum(before[plan_id] == now.get(plan_id) for plan_id in before)
        return Outcome(recorded.state.round, len(before), identical, tuple(differences))

    def text(self, recorded: Round) -> str:
        """The IR of a round with its cluster, as it went into the compiler; it compiles again."""
        graph = self.planner.builder.build_round(recorded.state, recorded.decision)
        try:
            said = [f"// round {recorded.state.round}, strategy {self.recording.header.strategy}"]
            said += [f"// plan {note.plan_id}: digest {note.digest}" for note in recorded.plans]
            return "\n".join([*said, str(graph.module), ""])
        finally:
            self.planner.builder.drop(graph)

    def changes(self, other: Strategy) -> Iterator[tuple[Round, list[Change]]]:
        """What another strategy would have decided on the recorded states, round by round.

        It remembers what it said itself; what would have come of its decisions nobody knows.
        """
        memory: Any = {}
        for recorded in self.recording.rounds():
            state = dataclasses.replace(recorded.state, memory=memory)
            decision = other.decide(state)
            memory = decision.memory
            yield recorded, list(_changes(recorded.state, recorded.decision, decision))


def as_json(recorded: Round) -> dict[str, Any]:
    """A round for programs: a list a column, as in `State` and `Decision`."""
    return {
        "state": _listed(recorded.state),
        "decision": _listed(recorded.decision),
        "plans": [
            {"plan_id": note.plan_id, "instance": note.instance, "digest": note.digest}
            for note in recorded.plans
        ],
        "decide_us": recorded.decide_us,
        "plan_us": recorded.plan_us,
    }


def _listed(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: _listed(getattr(value, field.name)) for field in fields}
    return value.tolist() if isinstance(value, np.ndarray) else value


def _settings(recording: Recording) -> dict[str, Any]:
    """The planner's settings. Raises RecordingError where it does not know one of them."""
    settings = recording.header.planner
    known = {"mode", "chunk", "horizon", "policy", "pipeline"}
    if unknown := sorted(settings.keys() - known):
        raise RecordingError(f"{recording.path}: a planner's {unknown[0]!r} means nothing here")
    return settings


def differing_fields(one: Decision, other: Decision) -> list[str]:
    """Names of the fields in which two decisions differ."""
    return [
        field.name
        for field in dataclasses.fields(Decision)
        if not same_value(getattr(one, field.name), getattr(other, field.name))
    ]


def _changes(state: State, recorded: Decision, other: Decision) -> Iterator[Change]:
    for row in np.flatnonzero(recorded.verdict != other.verdict).tolist():
        yield Change(
            state.round,
            state.waiting.ids[row],
            VERDICTS[recorded.verdict[row]],
            recorded.reason[row],
            VERDICTS[other.verdict[row]],
            other.reason[row],
        )
    before, now = _preempted(recorded), _preempted(other)
    for row in sorted(before.keys() ^ now.keys()):
        yield Change(
            state.round,
            state.running.ids[row],
            "preempt" if row in before else "keep",
            before.get(row, ""),
            "preempt" if row in now else "keep",
            now.get(row, ""),
        )


def _preempted(decision: Decision) -> dict[int, str]:
    rows, reasons = decision.preempt_rows.tolist(), decision.preempt_reason.tolist()
    return dict(zip(rows, reasons, strict=True))


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request of a recording, to be served again, and the tokens that it got.

    arrival_us counts from the first arrival.
    """

    request: Request
    tokens: tuple[int, ...]

    @property
    def is_determined(self) -> bool:
        """Whether the same model must give the same tokens: greedy, or with a seed."""
        sampling = self.request.sampling
        return sampling.temperature == 0 or sampling.seed is not None


def asked(recording: Recording) -> list[Asked]:
    """The requests of a recording, in the order of their coming.

    Raises RecordingError where prompts were left out, or there is no request.
    """
    came: dict[int, Came] = {}
    tokens: dict[int, list[int]] = {}
    for entry in recording.entries():
        if isinstance(entry, Came):
            came.setdefault(entry.number, entry)
        elif isinstance(entry, Tokens):
            for number, token in zip(entry.numbers, entry.tokens, strict=False):
                tokens.setdefault(number, []).append(token)
    if not came:
        raise RecordingError(f"{recording.path}: no request in it to serve again")
    if any(each.prompt is None for each in came.values()):
        raise RecordingError(f"{recording.path}: recorded without prompts: nothing to serve again")
    first_us = min(each.request.arrival_us for each in came.values())
    return [
        Asked(each.as_sent(-first_us), tuple(tokens.get(number, ())))
        for number, each in came.items()
    ]
