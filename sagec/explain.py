"""Why a request took as long as it did, from a recording, in plain sentences.

story = story_of(Recording("serve.rec"), "chat-1")
print("\\n".join(story.sentences))
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sagec.diagnostics import there_are
from sagec.runtime.engines import DecidedBy
from sagec.runtime.loop import Instance
from sagec.runtime.recording import Recording, RecordingError, Round
from sagec.runtime.recording.entries import (
    Came,
    Cancelling,
    Ended,
    Failed,
    Joined,
    Moved,
    Preempted,
    Refused,
    Retried,
    Step,
    Tokens,
)
from sagec.runtime.report import RequestReport
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.state import ADMIT, VERDICTS

NAMED = 4
"""A sentence names so many other requests, and counts the rest."""

_NUMBER = r"[0-9]+(?:\.[0-9]+)?"


@dataclasses.dataclass(frozen=True)
class Span:
    """Something that happened to the request; times are on the loop's clock."""

    kind: str
    begin_us: int
    end_us: int
    text: str


@dataclasses.dataclass(frozen=True)
class Story:
    """What a recording tells of a request. spans: in the order of their beginning.

    parts_us: what the time until its first token went to. report: None where it had not ended.
    """

    request: Request
    prompt_tokens: int
    begun_us: int
    spans: tuple[Span, ...]
    parts_us: dict[str, int]
    report: RequestReport | None

    @property
    def sentences(self) -> list[str]:
        """The story, a sentence or two a span."""
        return [span.text for span in self.spans]

    def as_json(self) -> dict[str, Any]:
        """The same for programs; times count from the beginning of the recording."""
        return {
            "request": self.request.id,
            "prompt_tokens": self.prompt_tokens,
            "arrival_us": self.request.arrival_us - self.begun_us,
            "ttft_parts_us": self.parts_us,
            "spans": [
                {
                    **dataclasses.asdict(span),
                    "begin_us": span.begin_us - self.begun_us,
                    "end_us": span.end_us - self.begun_us,
                }
                for span in self.spans
            ],
            "report": None if self.report is None else report_row(self.report),
        }


def report_row(report: RequestReport) -> dict[str, Any]:
    """A record of a request, as columns of a table; times in µs, None where it never came to it."""
    return {
        "request": report.request_id,
        "end": str(report.reason),
        "prompt_tokens": report.prompt_tokens,
        "output_tokens": report.output_tokens,
        "queue_us": report.queue_us,
        "ttft_us": report.ttft_us,
        "tpot_us": report.tpot_us,
        "total_us": report.end_us - report.arrival_us,
        "attempts": report.attempts,
        "preemptions": report.preemptions,
    }


def slowest(recording: Recording, limit: int) -> list[RequestReport]:
    """The requests of a recording that took longest from arrival to end."""
    ended = (entry.report for entry in recording.entries() if isinstance(entry, Ended))
    return sorted(ended, key=lambda report: report.arrival_us - report.end_us)[:limit]


def unfinished(recording: Recording) -> list[str]:
    """Ids of the requests that were taken in and had not ended when the recording did."""
    live: dict[int, str] = {}
    for entry in recording.entries():
        if isinstance(entry, Came):
            live[entry.number] = entry.request.id
        elif isinstance(entry, Refused | Ended):
            live.pop(entry.number, None)
    return list(live.values())


def story_of(recording: Recording, request_id: str) -> Story:
    """The story of the last request of this id that was taken in.

    Raises RecordingError where there is none.
    """
    found = list(recording.entries())
    refused = {entry.number for entry in found if isinstance(entry, Refused)}
    came = [e for e in found if isinstance(e, Came) and e.number not in refused]
    numbers = {entry.request.id: entry.number for entry in came}
    if request_id not in numbers:
        said = there_are(request_id, numbers)
        raise RecordingError(f"{recording.path}: no request {request_id!r}; {said}")
    facts = _Facts(numbers[request_id], recording.header.instances)
    for entry in recording.everything():
        facts.hear(entry)
        if facts.end is not None:
            break
    return _told(facts, recording.header.begun_us)


# What is collected.


@dataclasses.dataclass(frozen=True)
class _Look:
    """What a round saw of the request and said of it.

    place, decode_on: where it runs, "" while it waits. admitted: who else was let in. present:
    who else was running.
    """

    round: int
    now_us: int
    verdict: int = ADMIT
    reason: str = ""
    admitted: tuple[str, ...] = ()
    present: tuple[str, ...] = ()
    place: str = ""
    decode_on: str = ""
    preempted: str | None = None


class _Facts:
    """All that entries say of one request, and of what ran beside it."""

    def __init__(self, number: int, instances: Sequence[Instance]) -> None:
        self.number = number
        self.pools = {instance.id: instance.pool for instance in instances if instance.pool}
        self.came: Came | None = None
        self.ids: dict[int, str] = {}
        self.looks: list[_Look] = []
        self.steps: list[Step] = []
        self.token_times_us: list[int] = []
        self.moves: list[Moved] = []
        self.losses: list[Preempted | Retried | Failed] = []
        self.joined: list[Joined] = []
        self.cancelled_us: int | None = None
        self.end: Ended | None = None

    def hear(self, entry: object) -> None:
        """Keep what bears on the request."""
        match entry:
            case Came():
                self.ids[entry.number] = entry.request.id
                if entry.number == self.number and self.came is None:
                    self.came = entry
            case _ if self.came is None or self.end is not None:
                return
            case Round():
                self._look(entry)
            case Step():
                self.steps.append(entry)
                self.token_times_us += _simulated_us(entry, self.number)
            case Tokens():
                self._count(entry)
            case Moved(number=self.number):
                self.moves.append(entry)
            case Preempted(number=self.number) | Retried(number=self.number):
                self.losses.append(entry)
            case Failed(number=self.number):
                self.losses.append(entry)
            case Joined():
                self.joined.append(entry)
            case Cancelling(number=self.number):
                self.cancelled_us = entry.time_us
            case Ended(number=self.number):
                self.end = entry

    def lost_us(self, loss: Preempted | Retried | Failed) -> int:
        """When it lost its place: with the round that said so, and before it waited again."""
        if isinstance(loss, Preempted) and (look := self.preempting(loss)) is not None:
            return look.now_us
        came_us = self.came.request.arrival_us if self.came else 0
        ran_us = max((s.end_us for s in self.steps if s.end_us <= loss.time_us), default=came_us)
        back = (look.now_us for look in self.looks if not look.place and look.now_us > ran_us)
        return min(loss.time_us, next(back, loss.time_us))

    def preempting(self, loss: Preempted) -> _Look | None:
        """The round that said so; None where an engine did it by itself."""
        said = [one for one in self.looks if one.preempted is not None]
        return next((one for one in reversed(said) if one.now_us <= loss.time_us), None)

    def _count(self, entry: Tokens) -> None:
        for row, number in enumerate(entry.numbers):
            if number == self.number:
                time_us = entry.time_us
                self.token_times_us.append(time_us[row] if isinstance(time_us, list) else time_us)

    def _look(self, seen: Round) -> None:
        state, decision = seen.state, seen.decision
        name = self.ids[self.number]
        self._forget_left_out(set(state.waiting.ids.tolist()))
        look = _Look(
            state.round,
            state.now_us,
            admitted=_without(name, state.waiting.ids[decision.admitted].tolist()),
            present=_without(name, state.running.ids.tolist()),
        )
        for row in np.flatnonzero(state.waiting.ids == name).tolist():
            verdict, reason = int(decision.verdict[row]), decision.reason[row]
            self.looks.append(dataclasses.replace(look, verdict=verdict, reason=reason))
        for row in np.flatnonzero(state.running.ids == name).tolist():
            names = state.instances.ids
            self.looks.append(
                dataclasses.replace(
                    look,
                    place=names[state.running.instance[row]],
                    decode_on=names[state.running.decode_on[row]],
                    preempted=_reason_to_leave(seen, row, self.number),
                )
            )

    def _forget_left_out(self, waiting: set[str]) -> None:
        """Who was let in by the round before and waits still was left out of its plans."""
        if self.looks:
            last = self.looks[-1]
            went = tuple(other for other in last.admitted if other not in waiting)
            self.looks[-1] = dataclasses.replace(last, admitted=went)


def _without(name: str, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(other for other in names if other != name)


def _simulated_us(step: Step, number: int) -> list[int]:
    """When tokens came of which a simulator says only how many: spread over its steps."""
    duration_us = step.end_us - step.begin_us
    return [
        step.begin_us + duration_us * (each + 1) // step.steps
        for other, _, count in step.advanced
        if other == number
        for each in range(count)
    ]


def _reason_to_leave(seen: Round, row: int, number: int) -> str | None:
    """Why a running row is preempted in this round; None: it is not."""
    rows = seen.decision.preempt_rows.tolist()
    if row in rows:
        return str(seen.decision.preempt_reason[rows.index(row)])
    if any(number in note.preempted for note in seen.plans):
        return "the compiler found no KV blocks for all"
    return None


# What is told.


_ORDER = (
    "arrival", "cancel", "loss", "wait", "reject", "place", "prefill", "hand-over", "deviation"
)  # fmt: skip
"""Which span comes first of those that begin at the same time."""


def _told(facts: _Facts, begun_us: int) -> Story:
    came = facts.came
    assert came is not None
    spans = [
        _arrival(came, begun_us),
        *_waits(facts, came.request.arrival_us),
        *_placements(facts),
        *_prefills(facts),
        *_hand_overs(facts),
        *_losses(facts),
        *_cancellation(facts),
        *_deviations(facts),
    ]
    spans.sort(key=lambda span: (span.begin_us, _ORDER.index(span.kind)))
    parts_us = _ttft_parts(facts, came.request.arrival_us)
    report = facts.end.report if facts.end is not None else None
    spans += [*_decoding(facts), _ending(facts)]
    spans += _promises(came.request, report, parts_us)
    return Story(came.request, came.prompt_tokens, begun_us, tuple(spans), parts_us, report)


def _arrival(came: Came, begun_us: int) -> Span:
    request = came.request
    limit = request.max_output_tokens
    wants = "until it stops" if limit is None else f"at most {counted(limit, 'token')}"
    promised = [
        f"{what} {shown(us)}"
        for what, us in (("TTFT", request.ttft_us), ("TPOT", request.tpot_us))
        if us
    ]
    promise = f"; promised: {', '.join(promised)}" if promised else ""
    if request.timeout_us is not None:
        promise += f"; its client waits {shown(request.timeout_us)}"
    when = shown(max(0, request.arrival_us - begun_us))
    text = (
        f"{request.id} came {when} after the recording began, with a prompt of "
        f"{counted(came.prompt_tokens, 'token')}, to generate {wants}{promise}."
    )
    return Span("arrival", request.arrival_us, request.arrival_us, text)


def _waits(facts: _Facts, arrival_us: int) -> Iterator[Span]:
    """Rounds in a row in which it waited for the same reason, one span each."""
    since_us = arrival_us
    looks = facts.looks
    for key, group in itertools.groupby(enumerate(looks), lambda look: _kind_of(looks, look[0])):
        rows = list(group)
        after = rows[-1][0] + 1
        before_us = rows[0][1].now_us
        lost_us = [us for us in map(facts.lost_us, facts.losses) if us <= before_us]
        since_us = max([since_us, *lost_us])
        if key[0] == "wait":
            end_us = looks[after].now_us if after < len(looks) else _last_us(facts)
            yield _wait([look for _, look in rows], since_us, end_us)
        since_us = looks[after].now_us if after < len(looks) else since_us


def _kind_of(looks: Sequence[_Look], at: int) -> tuple[str, str]:
    """What a look is part of; numbers in reasons make no other reason."""
    look = looks[at]
    if look.place:
        return "run", ""
    if look.verdict == ADMIT and (at + 1 == len(looks) or looks[at + 1].place):
        return "place", ""
    return "wait", f"{look.verdict} {re.sub(_NUMBER, '#', look.reason)}"


def _wait(looks: Sequence[_Look], begin_us: int, end_us: int) -> Span:
    first, last = looks[0], looks[-1]
    reason = _both(first.reason, last.reason) or "no reason was given"
    if first.verdict == ADMIT:
        reason = "it was admitted, but the plans of the round had no room for it"
    elif VERDICTS[first.verdict] == "reject":
        return Span("reject", begin_us, end_us, f"Round {first.round} rejected it: {reason}.")
    others = tuple(dict.fromkeys(name for look in looks for name in look.admitted))
    who = [f"{named(first.present)} {_were(first.present)} running"] if first.present else []
    who += [f"{named(others)} went before it"] if others else []
    text = f"It waited {shown(end_us - begin_us)} ({rounds(first.round, last.round)}): {reason}."
    if who:
        text += f" {'; '.join(who)}."
    return Span("wait", begin_us, end_us, text)


def _both(first: str, last: str) -> str:
    """Two reasons that differ in numbers only, as one.

    >>> _both("slack 90 ms: waits", "slack 40 ms: waits")
    'slack 90 (at last 40) ms: waits'
    """
    numbers, later = (re.findall(_NUMBER, reason) for reason in (first, last))
    told = (n if n == m else f"{n} (at last {m})" for n, m in zip(numbers, later, strict=True))
    return re.sub(_NUMBER, lambda _: next(told), first)


def _placements(facts: _Facts) -> Iterator[Span]:
    looks = facts.looks
    for at, look in enumerate(looks):
        if _kind_of(looks, at)[0] != "place":
            continue
        after = looks[at + 1] if at + 1 < len(looks) else look
        steps = (step for step in _own_steps(facts) if step.begin_us >= look.now_us)
        place = next((step.instance for step in steps), after.place)
        if not place:
            continue
        decode_on = after.decode_on
        to = f" to {place}" + (
            f", to decode on {decode_on}" if decode_on not in ("", place) else ""
        )
        why = f": {look.reason}" if look.reason else ""
        text = f"Round {look.round} gave it{to}{why}."
        yield Span("place", look.now_us, look.now_us, text)


def _own_steps(facts: _Facts) -> list[Step]:
    """Steps that computed tokens of its prompt."""
    return [s for s in facts.steps if any(number == facts.number for number, _, _ in s.chunks)]


def _prefills(facts: _Facts) -> Iterator[Span]:
    """Prompt tokens that an instance computed, one span for each time it began with them."""
    stints: list[list[Step]] = []
    for step in _own_steps(facts):
        begins_anew = any(loss.time_us <= step.begin_us for loss in facts.losses[len(stints) - 1 :])
        if not stints or stints[-1][-1].instance != step.instance or begins_anew:
            stints.append([])
        stints[-1].append(step)
    for steps in stints:
        first, last = steps[0], steps[-1]
        reused = sum(n for step in steps for number, n in step.reused if number == facts.number)
        from_cache = f"; {reused} more came from the prefix cache" if reused else ""
        busy_us = sum(step.end_us - step.begin_us for step in steps)
        between_us = last.end_us - first.begin_us - busy_us
        rest = f", with {shown(between_us)} between them" if between_us > busy_us // 10 else ""
        text = (
            f"{first.instance} computed {_computed(facts, steps)} in "
            f"{counted(_num_steps(steps), 'step')} that took {shown(busy_us)}{rest}{from_cache}."
        )
        yield Span("prefill", first.begin_us, last.end_us, text)


def _computed(facts: _Facts, steps: Sequence[Step]) -> str:
    """Whose tokens: of its prompt, and where it had lost its place, of its output again."""
    assert facts.came is not None
    prompt_tokens = facts.came.prompt_tokens
    chunks = [c[1:] for step in steps for c in step.chunks if c[0] == facts.number]
    every = sum(end - begin for begin, end in chunks)
    of_prompt = sum(max(0, min(end, prompt_tokens) - begin) for begin, end in chunks)
    told = f"{counted(of_prompt, 'token')} of its prompt" if of_prompt else ""
    if of_prompt == every:
        return told
    again = f"{counted(every - of_prompt, 'token')} of its output again"
    return f"{told} and {again}" if told else again


def _num_steps(steps: Sequence[Step]) -> int:
    """How many steps these are: one of a simulator stands for several."""
    return sum(step.steps for step in steps)


def _hand_overs(facts: _Facts) -> Iterator[Span]:
    for move in facts.moves:
        text = (
            f"Its KV ({size(move.num_bytes)}) went from {move.source} to {move.target} in "
            f"{shown(move.end_us - move.begin_us)}."
        )
        yield Span("hand-over", move.begin_us, move.end_us, text)


def _losses(facts: _Facts) -> Iterator[Span]:
    for loss in facts.losses:
        if isinstance(loss, Preempted):
            text = _preemption(facts, loss)
        elif isinstance(loss, Retried):
            error = loss.error.removeprefix(f"instance {loss.instance!r}: ")
            back = f"; it started over{_return(facts, loss)}"
            text = f"{loss.instance} lost its KV ({error}){back}."
        else:
            text = f"It failed on {loss.instance}: {loss.error}."
        lost_us = facts.lost_us(loss)
        yield Span("loss", lost_us, lost_us, text)


def _return(facts: _Facts, loss: Retried) -> str:
    """When the instance that failed was there again, if the request was not placed before that."""
    back = (one.time_us for one in facts.joined if one.instance == loss.instance)
    joined_us = next((us for us in back if us >= loss.time_us), None)
    own = (step.end_us for step in _own_steps(facts) if step.begin_us >= loss.time_us)
    if joined_us is None or joined_us > next(own, joined_us):
        return ""
    return f", and {loss.instance} was there again {shown(joined_us - loss.time_us)} later"


def _cancellation(facts: _Facts) -> Iterator[Span]:
    if (at_us := facts.cancelled_us) is not None:
        yield Span("cancel", at_us, at_us, "Its client cancelled it.")


def _deviations(facts: _Facts) -> Iterator[Span]:
    """Where an instance computed otherwise than planned of it: the first step, and how many."""
    by_place: dict[str, list[tuple[Step, int, int]]] = {}
    for step in facts.steps:
        for number, planned, computed in step.deviations:
            if number == facts.number:
                by_place.setdefault(step.instance, []).append((step, planned, computed))
    for place, found in by_place.items():
        first, last = found[0][0], found[-1][0]
        more = counted(len(found) - 1, "step")
        times = f"; so it was in {more} more" if found[1:] else ""
        text = f"{_deviation(place, *found[0])}{times}."
        yield Span("deviation", first.begin_us, last.end_us, text)


def _deviation(place: str, step: Step, planned: int, computed: int) -> str:
    if step.decided_by is DecidedBy.DEADLINE:
        by_itself = f"it computed {counted(computed, 'token')} of it by itself"
        return f"No decision came to {place} in time, and {by_itself}"
    where = f"in step {step.step} of {step.plan_id}"
    told = f"{place} was to compute {counted(planned, 'token')} of it {where}"
    return f"{told}, and computed {computed}"


def _preemption(facts: _Facts, loss: Preempted) -> str:
    kept = f"; KV of {counted(loss.kept_tokens, 'token')} was kept" if loss.kept_tokens else ""
    if (look := facts.preempting(loss)) is None:
        return f"It lost its place on {loss.instance}{kept}."
    others = f", while {named(look.admitted)} went in" if look.admitted else ""
    why = f": {look.preempted}" if look.preempted else ""
    return f"Round {look.round} preempted it on {loss.instance}{why}{others}{kept}."


def _decoding(facts: _Facts) -> Iterator[Span]:
    """The tokens after the first, and the longest time without one."""
    times = facts.token_times_us
    if len(times) < 2:
        return
    steps = {step.end_us: step for step in facts.steps}
    places = dict.fromkeys(steps[us].instance for us in times[1:] if us in steps)
    span_us = times[-1] - times[0]
    who = " and ".join(places) or "An instance"
    text = (
        f"{who} decoded {counted(len(times) - 1, 'more token')} in {shown(span_us)}, "
        f"{shown(span_us / (len(times) - 1))} each."
    )
    yield Span("decode", times[0], times[-1], text)
    index = max(range(1, len(times)), key=lambda i: times[i] - times[i - 1])
    yield _gap(facts, index)


def _gap(facts: _Facts, index: int) -> Span:
    begin_us, end_us = facts.token_times_us[index - 1 : index + 1]
    ending = [step for step in facts.steps if step.end_us == end_us]
    meanwhile = [
        step
        for step in facts.steps
        if ending and step.instance == ending[-1].instance and begin_us < step.end_us <= end_us
    ]
    text = f"The longest wait for a token was {shown(end_us - begin_us)}, before token {index + 1}"
    if not meanwhile:
        return Span("gap", begin_us, end_us, f"{text}.")
    busy_us = sum(step.end_us - max(step.begin_us, begin_us) for step in meanwhile)
    ran = (
        f"{meanwhile[0].instance} ran {counted(_num_steps(meanwhile), 'step')} ({shown(busy_us)})"
        f"{_work(facts, meanwhile)}"
    )
    idle_us = end_us - begin_us - busy_us
    idle = f", and computed nothing for {shown(idle_us)}" if idle_us > busy_us // 10 else ""
    if idle and (others := _with_the_turn(facts, meanwhile[0].instance, begin_us, end_us)):
        idle += f", while {named(others)} had the turn"
    cause = ""
    if any(begin_us <= loss.time_us <= end_us for loss in facts.losses):
        cause = "; it had lost its place"
    elif any(begin_us < move.end_us and move.begin_us < end_us for move in facts.moves):
        cause = "; its KV was on its way"
    return Span("gap", begin_us, end_us, f"{text}: {ran}{idle}{cause}.")


def _with_the_turn(facts: _Facts, instance: str, begin_us: int, end_us: int) -> list[str]:
    """Instances of the same pool that computed between two moments."""
    pool = facts.pools.get(instance)
    ran = (s.instance for s in facts.steps if begin_us < s.end_us and s.begin_us < end_us)
    return list(
        dict.fromkeys(n for n in ran if n != instance and pool and facts.pools.get(n) == pool)
    )


def _work(facts: _Facts, steps: Sequence[Step]) -> str:
    """What steps computed: decodes, and prefill of others."""
    others: Counter[int] = Counter()
    for step in steps:
        others.update({n: end - begin for n, begin, end in step.chunks if n != facts.number})
    names = [facts.ids.get(number, f"number {number}") for number in others]
    decodes = max(step.decodes for step in steps)
    parts = [f"up to {counted(decodes, 'decode')}"] if decodes else []
    parts += [f"{counted(others.total(), 'token')} of prefill for {named(names)}"] if others else []
    return f" with {', and '.join(parts)}" if parts else ""


def _ending(facts: _Facts) -> Span:
    last_us = _last_us(facts)
    if facts.end is None:
        text = "The recording ends before the request does."
        return Span("end", last_us, last_us, text)
    report = facts.end.report
    because = f" ({facts.end.detail})" if facts.end.detail else ""
    took = shown(report.end_us - report.arrival_us)
    tokens = counted(report.output_tokens, "token")
    text = f"It ended {took} after it came, with {tokens}: {facts.end.reason}{because}."
    if facts.end.reason is FinishReason.REJECTED:
        text = f"It was rejected {took} after it came: {facts.end.detail or 'nobody said why'}."
    return Span("end", report.end_us, report.end_us, text)


def _promises(
    request: Request, report: RequestReport | None, parts_us: dict[str, int]
) -> Iterator[Span]:
    """What became of TTFT and TPOT, against what was promised."""
    if report is None:
        return
    if report.ttft_us is not None:
        most = max(parts_us, key=lambda part: parts_us[part], default="")
        is_most = bool(most) and 2 * parts_us[most] > report.ttft_us
        part = "most of it" if is_most else "the largest part of it"
        share = f"; {part}, {shown(parts_us[most])}, was {most}" if most else ""
        text = f"TTFT {shown(report.ttft_us)}{_against(report.ttft_us, request.ttft_us)}{share}."
        yield Span("ttft", report.arrival_us, report.first_token_us or report.end_us, text)
    if report.tpot_us is not None and request.tpot_us:
        text = f"TPOT {shown(report.tpot_us)}{_against(report.tpot_us, request.tpot_us)}."
        yield Span("tpot", report.first_token_us or report.arrival_us, report.end_us, text)


def _against(value_us: float, promised_us: int | None) -> str:
    if not promised_us:
        return ""
    word = "met" if value_us <= promised_us else "missed"
    return f": the promised {shown(promised_us)} {word} by {shown(abs(promised_us - value_us))}"


def _ttft_parts(facts: _Facts, arrival_us: int) -> dict[str, int]:
    """What the time until the first token went to, in µs."""
    if not facts.token_times_us:
        return {}
    first_us = facts.token_times_us[0]
    own = [step for step in _own_steps(facts) if step.end_us <= first_us]
    if not own:
        return {}
    places = [
        look.now_us
        for at, look in enumerate(facts.looks)
        if _kind_of(facts.looks, at)[0] == "place" and look.now_us <= own[0].begin_us
    ]
    placed_us = places[-1] if places else own[0].begin_us
    computing_us = sum(step.end_us - step.begin_us for step in own)
    parts_us = {
        "waiting for a place": placed_us - arrival_us,
        "waiting for its first step": own[0].begin_us - placed_us,
        "computing its prompt": computing_us,
        "waiting between its steps": first_us - own[0].begin_us - computing_us,
    }
    return {part: us for part, us in parts_us.items() if us > 0}


def _last_us(facts: _Facts) -> int:
    """The last moment that anything is known of."""
    if facts.end is not None:
        return facts.end.report.end_us
    times = [look.now_us for look in facts.looks] + facts.token_times_us
    times += [step.end_us for step in facts.steps[-1:]]
    assert facts.came is not None
    return max(times, default=facts.came.request.arrival_us)


# Words.


def shown(time_us: float) -> str:
    """A time as people say it.

    >>> shown(5), shown(850), shown(12_345), shown(2_000_000)
    ('5 us', '0.85 ms', '12.3 ms', '2 s')
    """
    if 0 < time_us < 9.5:
        return f"{_trimmed(time_us, 1)} us"
    if time_us < 999_500:
        digits = 2 if time_us < 9_995 else 1 if time_us < 99_950 else 0
        return f"{_trimmed(time_us / 1000, digits)} ms"
    return f"{_trimmed(time_us / 1e6, 2 if time_us < 99_995_000 else 0)} s"


def _trimmed(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def size(num_bytes: int) -> str:
    """
    >>> size(900), size(1_250_000)
    ('900 B', '1.2 MB')
    """
    value = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def counted(count: int, what: str) -> str:
    """
    >>> counted(1, "token"), counted(2, "token")
    ('1 token', '2 tokens')
    """
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def rounds(first: int, last: int) -> str:
    """
    >>> rounds(4, 18), rounds(4, 4)
    ('rounds 4 to 18', 'round 4')
    """
    return f"round {first}" if first == last else f"rounds {first} to {last}"


def _were(names: Sequence[str]) -> str:
    return "was" if len(names) == 1 else "were"


def named(names: Sequence[str]) -> str:
    """
    >>> named(["a", "b", "c", "d", "e", "f"]), named(["a", "b"])
    ('a, b, c, d and 2 more', 'a and b')
    """
    if len(names) > NAMED:
        return f"{', '.join(names[:NAMED])} and {len(names) - NAMED} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
