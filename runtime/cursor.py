"""A plan under way: which tokens of which requests the next step computes."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from sagec.runtime.plan import ExecutionPlan


class Resident(Protocol):
    """A request as its instance knows it.

    num_tokens: prompt and output. computed: how many of the first of them have KV here. decodes:
    whether only the token sampled last has none.
    """

    @property
    def id(self) -> str: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def computed(self) -> int: ...
    @property
    def decodes(self) -> bool: ...


ResidentT = TypeVar("ResidentT", bound=Resident)
ResidentCoT = TypeVar("ResidentCoT", bound=Resident, covariant=True)


class Residents(Protocol[ResidentCoT]):
    """The requests on an instance, and the room for their KV.

    rows: by id. begin: a chunk of the row's prompt is due; whoever caches prefixes gives it what it
    has, where it has nothing yet. make_room: have blocks for the row's first `tokens` tokens; False
    where none are free. never_fits: why no empty instance would hold so many; "" where it would.
    """

    @property
    def rows(self) -> Mapping[str, ResidentCoT]: ...
    def begin(self, row: Any) -> None: ...
    def make_room(self, row: Any, tokens: int) -> bool: ...
    def never_fits(self, row: Any, tokens: int) -> str: ...


@dataclass(slots=True)
class Pick(Generic[ResidentT]):
    """Tokens [begin, end) of a row, to be computed in one step.

    is_decode: whether this is one token, the last one sampled.
    """

    row: ResidentT
    begin: int
    end: int
    is_decode: bool

    @property
    def samples(self) -> bool:
        """Whether the row's next token can be sampled after this."""
        return self.end == self.row.num_tokens


@dataclass(slots=True)
class Membership:
    """A row of the plan's decode table."""

    id: str
    begin_step: int
    until_tokens: int
    prompt_tokens: int

    def admits(self, row: Resident) -> bool:
        """Whether the row, which is here, has its prompt computed and tokens left to decode."""
        computed = row.computed
        if computed >= self.until_tokens or computed >= row.num_tokens:
            return False
        return computed >= self.prompt_tokens or row.decodes


@dataclass
class PlanCursor(Generic[ResidentT]):
    """A plan and how far it is: `step` is the next one.

    computing_ids: the requests that compute or decode here. imported_ids: those whose KV comes.
    exports: where rows go once their first token is sampled. kv_blocks: reserved, by request.
    failures: (request id, why). missed_tokens: those that the plan took for cached, and that were
    computed beyond what it allows a step.
    """

    plan: ExecutionPlan
    step: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    missed_tokens: int = 0

    def __post_init__(self) -> None:
        plan, ids = self.plan, self.plan.request_ids
        rows, chunks, decodes = plan.rows, plan.chunks, plan.decodes
        self.kv_blocks = dict(zip(ids, rows.kv_blocks.tolist(), strict=True))
        self.exports = {
            ids[row]: plan.peers[peer]
            for row, peer in zip(plan.exports.row.tolist(), plan.exports.peer.tolist(), strict=True)
        }
        self._chunks: dict[int, list[tuple[str, int, int]]] = defaultdict(list)
        columns = (chunks.step, chunks.row, chunks.begin, chunks.end)
        for step, row, begin, end in zip(*(column.tolist() for column in columns), strict=True):
            self._chunks[step].append((ids[row], begin, end))
        reuses = (plan.reuses.row.tolist(), plan.reuses.tokens.tolist())
        self._reuses = {ids[row]: tokens for row, tokens in zip(*reuses, strict=True)}
        prompts = rows.prompt_tokens[decodes.row]
        columns = (decodes.row, decodes.begin_step, decodes.until_tokens, prompts)
        self._outside = [
            Membership(ids[row], begin, until, prompt)
            for row, begin, until, prompt in zip(*(c.tolist() for c in columns), strict=True)
        ]
        self._starts = sorted({*chunks.step.tolist(), *decodes.begin_step.tolist()})
        self._joined: list[Membership] = []
        self.imported_ids = {ids[row] for row in plan.imports.row.tolist()}
        self.computing_ids = {ids[row] for row in (*chunks.row.tolist(), *decodes.row.tolist())}
        self._stalled: set[str] = set()

    @property
    def is_done(self) -> bool:
        """Whether all its steps have gone by."""
        return self.step >= self.plan.num_steps

    def next_picks(self, residents: Residents[ResidentT]) -> list[Pick[ResidentT]]:
        """What the next step that has anything to do computes; `step` goes there. Empty: none."""
        later = (start for start in self._starts if start > self.step)
        for step in (self.step, *later):
            if step >= self.plan.num_steps:
                break
            picks: dict[str, Pick[ResidentT]] = {}
            self._pick_chunks(step, residents, picks)
            if not picks or self.plan.mixes_phases:
                self._pick_decodes(step, residents, picks)
            if picks:
                self.step = step
                return list(picks.values())
        return []

    def _pick_chunks(
        self, step: int, residents: Residents[ResidentT], picks: dict[str, Pick[ResidentT]]
    ) -> None:
        for id, begin, end in self._chunks.get(step, ()):
            row = residents.rows.get(id)
            if row is None or id in self._stalled:
                continue
            residents.begin(row)
            earlier = picks.get(id)
            computed = earlier.end if earlier else row.computed
            if computed >= end:
                continue
            missed = max(begin - computed, 0) if begin <= self._reuses.get(id, 0) else 0
            if error := _chunk_error(row, computed + missed, begin, end):
                self.failures.append((id, f"plan {self.plan.plan_id!r} step {step}: {error}"))
                self._stalled.add(id)
            elif not self._has_room(residents, row, end):
                self._stalled.add(id)  # its later chunks are no gap; a newer plan goes on with it
            else:
                self.missed_tokens += missed
                if earlier:
                    earlier.end = end
                else:
                    picks[id] = Pick(row, computed, end, row.decodes)

    def _pick_decodes(
        self, step: int, residents: Residents[ResidentT], picks: dict[str, Pick[ResidentT]]
    ) -> None:
        """Rows of the batch first, then late ones, while the step's token budget lasts."""
        budget = self.plan.max_step_tokens - sum(pick.end - pick.begin for pick in picks.values())
        joining: list[Membership] = []
        for member in self._joined + self._outside:
            if budget <= 0:
                break
            row = residents.rows.get(member.id)
            if row is None or member.id in picks or step < member.begin_step:
                continue
            if not member.admits(row):
                continue
            end = min(row.num_tokens, member.until_tokens, row.computed + budget)
            if self._has_room(residents, row, end):
                picks[member.id] = Pick(row, row.computed, end, row.decodes)
                budget -= end - row.computed
                joining.append(member)
        self._join(joining)

    def _join(self, members: list[Membership]) -> None:
        joined = {member.id for member in self._joined}
        if new := [member for member in members if member.id not in joined]:
            self._joined += new
            ids = {member.id for member in new}
            self._outside = [member for member in self._outside if member.id not in ids]

    def _has_room(self, residents: Residents[ResidentT], row: ResidentT, tokens: int) -> bool:
        """Whether the row gets blocks now; one that never can is a failure."""
        if residents.make_room(row, tokens):
            return True
        if why := residents.never_fits(row, tokens):
            self.failures.append((row.id, why))
        return False


def _chunk_error(row: Resident, computed: int, begin: int, end: int) -> str | None:
    if computed < begin:
        return f"chunk [{begin}, {end}) leaves a gap: only {computed} tokens are computed"
    if end > row.num_tokens:
        return f"chunk [{begin}, {end}) goes beyond the request's {row.num_tokens} tokens"
    return None
