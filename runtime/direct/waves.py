"""What a round asks, as columns: residents, prompts under way, and what was admitted.

The columns are those of the ops that `sagec.builder` makes of the same state and decision, after
`apply-decision`: also which of them are there at all, and how words are numbered, for the digest
of a plan names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sagec.runtime.direct import digest
from sagec.runtime.direct.cluster import Cluster
from sagec.runtime.direct.columns import Bools, Coded, Ints, Words, same, words_in_order, zeros
from sagec.runtime.plan import RECOMPUTE, SWAP
from sagec.runtime.state import ADMIT, ANY, REJECT, UNBOUNDED, Decision, Running, State, Waiting

_ADMITTED, _DEFERRED, _REJECTED, _PREEMPTED, _SWAPPED = range(5)
"""Verdicts, as the dialect pd numbers them."""

_VERDICTS = np.zeros(3, np.int64)
_VERDICTS[[ADMIT, 1, REJECT]] = _ADMITTED, _DEFERRED, _REJECTED


class NotCovered(Exception):
    """A round that the direct planner makes no plans for; its text is the reason."""


@dataclass(frozen=True, eq=False)
class Residents:
    """Requests that decode already, or will when their KV has arrived.

    at: the instance of each, by number. context: tokens of KV. arriving: None where none is.
    """

    names: tuple[str, ...]
    at: Ints
    context: Ints
    remaining: Ints
    arriving: Bools | None

    def some(self, rows: Ints) -> Residents:
        """These rows."""
        return Residents(
            names=tuple([self.names[row] for row in rows.tolist()]),
            at=self.at[rows],
            context=self.context[rows],
            remaining=self.remaining[rows],
            arriving=None if self.arriving is None else self.arriving[rows],
        )


@dataclass(frozen=True, eq=False)
class Wave:
    """Requests whose prompts are to be computed, in rank order.

    said: the columns that their op has, for the digest. on, decode_on: instances by number, ANY
    where that is open. matches: [rows, instances], leading tokens that instances have; None where
    none has any. asks_adapter: whether a request names one.
    """

    said: dict[str, digest.Column]
    names: tuple[str, ...]
    prompt: Ints
    computed: Ints
    cached: Ints
    generate: Ints
    deadline: Ints
    chunk: Ints
    on: Ints
    decode_on: Ints
    model: Coded
    matches: Ints | None = None
    asks_adapter: bool = False

    def __len__(self) -> int:
        return len(self.names)


@dataclass(eq=False)
class Asked:
    """A round. ops: bytes of what is known of its digest. gone: (name, how), by instance."""

    residents: Residents | None = None
    waves: list[Wave] = field(default_factory=list)
    gone: dict[int, list[tuple[str, int]]] = field(default_factory=dict)
    turns: dict[int, int] = field(default_factory=dict)
    ops: list[bytes] = field(default_factory=list)

    def preempt(self, at: int, name: str, ids: tuple[str, ...], because: str) -> None:
        """Have residents leave the instance `at`, which has this name, as `assign-kv` does."""
        nothing = zeros(len(ids))
        said = {
            "ids": digest.of_names(ids),
            "verdict": digest.of_numbers(same(_PREEMPTED, len(ids))),
            "on": digest.of_words(Words((name,), nothing)),
            "because": digest.of_words(Words((because,), nothing)),
        }
        self.ops.append(digest.of_op("pd.preempt", said))
        self.gone.setdefault(at, []).extend((one, RECOMPUTE) for one in ids)


def read(state: State, decision: Decision, cluster: Cluster) -> Asked:
    """What a round asks of the cluster's instances, which are those of the state that live.

    Raises NotCovered for what is on other instances.
    """
    asked = Asked()
    reader = _Reader(state, decision, cluster, asked)
    if decision.turn_steps is not None:
        reader.read_turns(decision.turn_steps)
    if len(state.running):
        reader.read_running()
    if len(state.waiting):
        asked.waves.append(reader.waiting_wave())
    return asked


class _Reader:
    """Reads a state and a decision into what is asked."""

    def __init__(self, state: State, decision: Decision, cluster: Cluster, asked: Asked) -> None:
        self.state, self.decision, self.asked = state, decision, asked
        self.names = (*cluster.names, "")
        ids = tuple(state.instances.ids.tolist())
        self._number: Ints | None = None
        if ids != cluster.names:
            number = {name: at for at, name in enumerate(cluster.names)}
            self._number = np.array([*(number.get(name, ANY) for name in ids), ANY], np.int64)

    def _numbers(self, at: Ints) -> Ints:
        """Indices of the state's instances as numbers of the cluster's."""
        if self._number is None:
            return at
        found = self._number[np.minimum(at, len(self._number) - 1)]
        if ((found == ANY) & (at != ANY)).any():
            raise NotCovered("a request on an instance that is not there")
        return found

    def _places(self, at: Ints) -> Words:
        """Names of numbered instances; ANY is no name."""
        return Words(*words_in_order(self.names, np.minimum(at, len(self.names) - 1)))

    def read_turns(self, steps: Ints) -> None:
        """Instances that may not compute as they like."""
        bound = np.flatnonzero(steps != ANY)
        if not bound.size:
            return
        column = _column(steps[bound])
        at = self._numbers(bound)
        self.asked.turns = dict(zip(at.tolist(), column.tolist(), strict=True))
        ids = [self.names[one] for one in at.tolist()]
        self.asked.ops.append(
            digest.of_op(
                "pd.turns", {"ids": digest.of_names(ids), "steps": digest.of_numbers(column)}
            )
        )

    # Running requests

    def read_running(self) -> None:
        """Who decodes, who leaves, and whose prompt is under way."""
        running, gone = self.state.running, self.decision.preempt_rows
        started = ~running.arriving & (running.computed_tokens < running.prompt_tokens)
        done = ~started
        if gone.size:
            done[gone] = started[gone] = False
        num_done = int(np.count_nonzero(done))
        if num_done:
            rows = None if num_done == len(done) else done.nonzero()[0]
            self.asked.residents = self._residents(running, rows)
        if gone.size:
            self._read_preempted(self._residents(running, gone))
        if np.count_nonzero(started):
            self.asked.waves.append(self._started_wave(running, started.nonzero()[0]))

    def _residents(self, running: Running, rows: Ints | None) -> Residents:
        """These rows, or all; their op is among those of the digest then."""
        columns = (running.instance, running.computed_tokens, running.remaining_tokens)
        arriving: Bools | None = running.arriving
        assert arriving is not None
        ids = running.ids
        if rows is not None:
            columns = (columns[0][rows], columns[1][rows], columns[2][rows])
            arriving, ids = arriving[rows], ids[rows]
        at, context, remaining = columns
        context = np.maximum(context, 1)
        if not np.count_nonzero(arriving):
            arriving = None
        else:
            prompt = running.prompt_tokens if rows is None else running.prompt_tokens[rows]
            context = np.where(arriving, prompt, context)
        at = self._numbers(at)
        found = Residents(tuple(ids.tolist()), at, context, _column(remaining), arriving)
        self._say_residents(found)
        return found

    def _say_residents(self, residents: Residents) -> None:
        said = {
            "ids": digest.of_names(residents.names),
            "on": digest.of_words(self._places(residents.at)),
            "context": digest.of_numbers(residents.context),
        }
        if np.count_nonzero(residents.remaining != UNBOUNDED):
            said["remaining"] = digest.of_numbers(residents.remaining)
        if residents.arriving is not None:
            said["arriving"] = digest.of_numbers(residents.arriving.astype(np.int64))
        self.asked.ops.append(digest.of_op("pd.resident", said))

    def _read_preempted(self, residents: Residents) -> None:
        decision = self.decision
        swaps = decision.preempt_how == SWAP
        said = {
            "ids": digest.of_names(residents.names),
            "verdict": digest.of_numbers(np.where(swaps, _SWAPPED, _PREEMPTED)),
            "on": digest.of_words(self._places(residents.at)),
        }
        if any(reasons := decision.preempt_reason.tolist()):
            said["because"] = digest.of_words(_words(reasons))
        self.asked.ops.append(digest.of_op("pd.preempt", said))
        leaving = zip(residents.at.tolist(), residents.names, swaps.tolist(), strict=True)
        for at, name, swap in leaving:
            self.asked.gone.setdefault(at, []).append((name, int(swap)))

    def _started_wave(self, running: Running, rows: Ints) -> Wave:
        """Prompts under way: they go on where they are, before anything new."""
        instances = self.state.instances
        names = tuple(running.ids[rows].tolist())
        prompt, on = _column(running.prompt_tokens[rows]), self._numbers(running.instance[rows])
        there = running.decode_on[rows]
        decode_on = np.where((instances.role != "prefill")[there], self._numbers(there), ANY)
        generate = np.maximum(running.remaining_tokens[rows], 1)
        computed, cached = running.computed_tokens[rows], running.cached_tokens[rows]
        said = {
            "ids": digest.of_names(names),
            "prompt": digest.of_numbers(prompt),
            "on": digest.of_words(self._places(on)),
            "decode_on": digest.of_words(self._places(decode_on)),
        }
        if np.count_nonzero(generate != UNBOUNDED):
            said["generate"] = digest.of_numbers(generate)
        if np.count_nonzero(computed):
            said["computed"] = digest.of_numbers(computed)
        model = _NO_MODEL
        if any(models := running.model[rows].tolist()):
            model = _words(models)
            said["model"] = digest.of_words(model)
        nothing = zeros(len(rows))
        return Wave(
            said, names, prompt, computed, cached, generate, nothing, nothing, on, decode_on, model
        )

    # Waiting requests

    def waiting_wave(self) -> Wave:
        """What was admitted, in rank order; who was not is among the ops of the digest then."""
        waiting, decision = self.state.waiting, self.decision
        rows = decision.admitted
        if len(rows) < len(waiting):
            self._say_left(waiting, decision)
        in_order = len(rows) == len(waiting) and not np.count_nonzero(rows != waiting.rows)
        taken = None if in_order else rows
        said, words = _waiting_columns(waiting, taken)
        names = tuple((waiting.ids if taken is None else waiting.ids[taken]).tolist())
        said["ids"] = digest.of_names(names)
        on = self._hint("on", decision.prefill_on, rows, said)
        decode_on = self._hint("decode_on", decision.decode_on, rows, said)
        nothing = zeros(len(rows))
        chunk = nothing
        if np.count_nonzero(decision.chunk_tokens):
            chunk = np.maximum(decision.chunk_tokens[rows], 0)
            said["chunk"] = digest.of_numbers(chunk)
        ttft = waiting.ttft_us
        deadline = nothing
        if np.count_nonzero(ttft):
            late = np.where(ttft > 0, waiting.arrival_us + ttft, 0)
            deadline = late if taken is None else late[taken]
            said["deadline"] = digest.of_numbers(deadline)
        prompt = _taken(waiting.prompt_tokens, taken)
        return Wave(
            said=said,
            names=names,
            prompt=prompt,
            computed=nothing,
            cached=nothing,
            generate=_taken(waiting.generate_tokens, taken),
            deadline=deadline,
            chunk=chunk,
            on=on,
            decode_on=decode_on,
            model=words.get("model", _NO_MODEL),
            matches=self._matches(rows, prompt),
            asks_adapter="adapter" in words,
        )

    def _hint(self, name: str, at: Ints, rows: Ints, said: dict[str, digest.Column]) -> Ints:
        """Of each row, the instance that the strategy asks for."""
        if not np.count_nonzero(at != ANY):
            return same(ANY, len(rows))
        at = self._numbers(at)
        words = ("", *(word for word in self._places(at).words if word))
        number = np.zeros(len(self.names), np.int64)
        number[[self.names.index(word) for word in words]] = np.arange(len(words))
        chosen = at[rows]
        codes = number[np.minimum(chosen, len(self.names) - 1)]
        said[name] = digest.of_words(Words(words, codes))
        return chosen

    def _say_left(self, waiting: Waiting, decision: Decision) -> None:
        gone = np.flatnonzero(decision.verdict != ADMIT)
        verdict = _VERDICTS[decision.verdict[gone]]
        said = {
            "ids": digest.of_names(waiting.ids[gone].tolist()),
            "verdict": digest.of_numbers(verdict),
            "because": digest.of_words(_words(decision.reason[gone].tolist())),
        }
        self.asked.ops.append(digest.of_op("pd.leave", said))

    def _matches(self, rows: Ints, prompt: Ints) -> Ints | None:
        """Leading tokens that instances have of the admitted, where that may be of use: one that
        does not prefill goes on only where no more than the last token is to be computed."""
        cached = self.state.cached_tokens
        if not np.count_nonzero(cached):
            return None
        instances, cached = self.state.instances, cached[rows]
        useful = instances.prefills | (
            instances.decodes & (cached == (self.state.waiting.prompt_tokens[rows] - 1)[:, None])
        )
        chosen = self.decision.prefill_on[rows][:, None]
        useful &= (chosen == ANY) | (chosen == instances.rows)
        tokens = np.where(useful, cached, 0)
        if not np.count_nonzero(tokens):
            return None
        tokens = np.minimum(tokens, (prompt - 1)[:, None])
        if self._number is not None:
            there = self._number[:-1] != ANY
            tokens = tokens[:, there][:, np.argsort(self._number[:-1][there])]
        return tokens


_NO_MODEL = Words(("",), zeros(0))
"""Of rows of which none names a model."""


def _column(values: Ints) -> Ints:
    return values if values.dtype == np.int64 else values.astype(np.int64)


def _taken(column: Ints, rows: Ints | None) -> Ints:
    return column if rows is None else column[rows]


def _words(rows: Sequence[str]) -> Words:
    """The column of these strings; words are numbered as they first appear."""
    words: dict[str, int] = {}
    codes = [words.setdefault(row, len(words)) for row in rows]
    return Words(tuple(words), np.array(codes, np.int64))


_NUMBERS = (
    ("generate", "generate_tokens", UNBOUNDED),
    ("arrived", "arrival_us", 0),
    ("priority", "priority", 0),
    ("ttft", "ttft_us", 0),
    ("tpot", "tpot_us", 0),
)
"""Columns of waiting requests: name, that of the state, and the value that need not be said."""


def _waiting_columns(
    waiting: Waiting, rows: Ints | None
) -> tuple[dict[str, digest.Column], dict[str, Words]]:
    """Columns of these rows, or all, as the digest takes them; and those of words.

    What anybody who waits says is a column, also where those that are taken do not say it.
    """
    said = {"prompt": digest.of_numbers(_taken(waiting.prompt_tokens, rows))}
    for name, of, default in _NUMBERS:
        column = getattr(waiting, of)
        if np.count_nonzero(column != default if default else column):
            said[name] = digest.of_numbers(_taken(column, rows))
    found: dict[str, Words] = {}
    for name in ("model", "tenant", "session", "adapter"):
        if any(words := getattr(waiting, name).tolist()):
            every = _words(words)
            found[name] = every if rows is None else Words(every.words, every.codes[rows])
            said[name] = digest.of_words(found[name])
    return said, found
