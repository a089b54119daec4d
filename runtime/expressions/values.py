"""What the names in an expression stand for, per place where an expression may stand.

A class here is a place; its values are the names there, each with its unit, and a line for people.
An object of it gives their columns in one round: of requests a row each, or of instances, or of one
request before all instances. What is not asked for is not computed.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from sagec.runtime.expressions.units import Unit
from sagec.runtime.state import Instances, Running, State, Waiting
from sagec.runtime.strategies import _promises
from sagec.runtime.strategies.choosers._load import Load

Column = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

ENDLESS = _promises.NEVER
"""What has no end: the deadline, in us, of a request that was promised nothing; 1 / 0."""

EVERY = slice(None)
"""All rows of a table, as `rows`."""


class Value(functools.cached_property[Any]):
    """A name of the language; its method computes the column, once."""

    def __init__(self, compute: Callable[[Any], Any], unit: Unit) -> None:
        super().__init__(compute)
        self.unit = unit

    @property
    def summary(self) -> str:
        """What it is, in a line."""
        return " ".join((self.func.__doc__ or "").split())


def _in(unit: Unit) -> Callable[[Callable[[Any], Any]], Value]:
    return lambda compute: Value(compute, unit)


class RequestValues:
    """Columns of some rows of a table of requests; `rows` may be one row's number."""

    def __init__(self, state: State, table: Waiting | Running, rows: Any) -> None:
        self.state, self.table, self.rows = state, table, rows

    @_in(Unit.MOMENT)
    def arrival(self) -> Any:
        """when the request came"""
        return self.table.arrival_us[self.rows]

    @_in(Unit.TIME)
    def waited(self) -> Any:
        """how long ago that was"""
        return self.state.now_us - self.arrival

    @_in(Unit.NUMBER)
    def sequence(self) -> Any:
        """its number in the order of coming"""
        return self.table.sequence[self.rows]

    @_in(Unit.NUMBER)
    def priority(self) -> Any:
        """as the client said; smaller goes first"""
        return self.table.priority[self.rows]

    @_in(Unit.TOKENS)
    def prompt_tokens(self) -> Any:
        """to compute before its next token; after a preemption with its output so far"""
        return self.table.prompt_tokens[self.rows]

    @_in(Unit.TOKENS)
    def output_tokens(self) -> Any:
        """generated so far"""
        return self.table.output_tokens[self.rows]

    @_in(Unit.TIME)
    def ttft(self) -> Any:
        """promised time to the first token; endless where none was promised"""
        return _promised(self.table.ttft_us[self.rows])

    @_in(Unit.TIME)
    def tpot(self) -> Any:
        """promised time for each token after it; endless where none was promised"""
        return _promised(self.table.tpot_us[self.rows])

    @_in(Unit.MOMENT)
    def deadline(self) -> Any:
        """when its next token is due: arrival + ttft + output_tokens * tpot; or never"""
        return _promises.token_deadlines_us(self.table)[self.rows]

    @_in(Unit.NUMBER)
    def preemptions(self) -> Any:
        """how often it lost its place"""
        return self.table.preemptions[self.rows]

    @_in(Unit.TEXT)
    def model(self) -> Any:
        """the model it asks for"""
        return self.table.model[self.rows]

    @_in(Unit.TEXT)
    def tenant(self) -> Any:
        """who pays"""
        return self.table.tenant[self.rows]

    @_in(Unit.TEXT)
    def session(self) -> Any:
        """the conversation it belongs to"""
        return self.table.session[self.rows]

    @_in(Unit.TEXT)
    def adapter(self) -> Any:
        """its LoRA adapter"""
        return self.table.adapter[self.rows]

    @_in(Unit.MOMENT)
    def now(self) -> Any:
        """the round's time"""
        return self.state.now_us


def _promised(times_us: Any) -> Any:
    return np.where(times_us > 0, times_us, ENDLESS)


class WaitingValues(RequestValues):
    """order by, reject when: a waiting request, and the instances that serve its model.

    Of the two phases, KV figures are those of the one with less room; rows are of `State.waiting`.
    """

    table: Waiting

    def __init__(self, state: State, rows: Any) -> None:
        super().__init__(state, state.waiting, rows)

    @_in(Unit.TOKENS)
    def generate_tokens(self) -> Any:
        """how many may still be generated"""
        return self.table.generate_tokens[self.rows]

    @_in(Unit.TOKENS)
    def cached_tokens(self) -> Any:
        """leading tokens whose KV an instance has; the most of any"""
        return self.state.cached_tokens[self.rows].max(axis=1, initial=0)

    @_in(Unit.TIME)
    def prefill_time(self) -> Any:
        """predicted for its tokens without KV, where that is quickest; 0 where nobody knows"""
        return _promises.bare_prefill_us(self.state)[self.rows]

    @_in(Unit.TIME)
    def slack(self) -> Any:
        """deadline - now - prefill_time; endless where nothing was promised"""
        return np.where(
            self.deadline < ENDLESS, self.deadline - self.now - self.prefill_time, ENDLESS
        )

    @_in(Unit.SHARE)
    def kv_free(self) -> Any:
        """free KV, of all of it"""
        total, free, _ = self._pools
        return np.divide(free, total, out=np.zeros(free.shape), where=total > 0).min(axis=0)

    @_in(Unit.SHARE)
    def kv_used(self) -> Any:
        """KV that holds requests or is promised to them, of all of it"""
        return 1 - self.kv_free

    @_in(Unit.BLOCKS)
    def kv_free_blocks(self) -> Any:
        """free KV"""
        return self._pools[1].min(axis=0)

    @_in(Unit.BLOCKS)
    def kv_used_blocks(self) -> Any:
        """KV that holds requests or is promised to them"""
        return (self._pools[0] - self._pools[1]).max(axis=0)

    @_in(Unit.BLOCKS)
    def kv_blocks(self) -> Any:
        """all KV"""
        return self._pools[0].min(axis=0)

    @_in(Unit.TOKENS)
    def block_tokens(self) -> Any:
        """tokens in a block; the most, where instances differ"""
        return self._pools[2].max(axis=0)

    @_in(Unit.NUMBER)
    def running(self) -> Any:
        """requests on instances of its model"""
        instances = self.state.instances
        counts = np.bincount(self.state.running.instance, minlength=len(instances))
        return self._per_model(lambda model: counts[instances.model == model].sum())

    @_in(Unit.NUMBER)
    def waiting(self) -> Any:
        """waiting requests of its model, itself among them"""
        models = self.state.waiting.model
        return self._per_model(lambda model: np.count_nonzero(models == model))

    @functools.cached_property
    def _pools(self) -> Floats:
        """[total blocks, free blocks, tokens in a block; phase; row], of its model's instances."""
        instances = self.state.instances
        phases = np.array([instances.prefills, instances.decodes])
        figures = np.array([instances.kv_blocks, instances.kv_blocks - instances.kv_blocks_used])
        columns = np.empty((3, 2, len(self.model)))
        for model, here in self._models:
            pools = phases & (instances.model == model)
            columns[:2, :, here] = (figures @ pools.T)[:, :, None]
            largest = np.where(pools, instances.block_tokens, 1).max(axis=1, initial=1)
            columns[2][:, here] = largest[:, None]
        return columns

    @functools.cached_property
    def _models(self) -> list[tuple[str, Any]]:
        """Each model that a row asks for, with its rows."""
        names = set(self.model.tolist())
        if len(names) == 1:
            return [(names.pop(), EVERY)]
        return [(name, np.flatnonzero(self.model == name)) for name in sorted(names)]

    def _per_model(self, figure: Callable[[str], Any]) -> Floats:
        column = np.zeros(len(self.model))
        for model, here in self._models:
            column[here] = figure(model)
        return column


class AdmissionValues(WaitingValues):
    """admit while: the same, once all before it in the order are admitted."""

    @functools.cached_property
    def _pools(self) -> Floats:
        before: Floats = super()._pools
        need = np.ceil((self.prompt_tokens + 1) / before[2])
        for _, here in self._models:
            before[1][:, here] -= np.cumsum(need[:, here], axis=1) - need[:, here]
        return before

    @_in(Unit.NUMBER)
    def running(self) -> Any:
        """requests on instances of its model, with those admitted before it"""
        return WaitingValues.running.func(self) + self._before

    @_in(Unit.NUMBER)
    def waiting(self) -> Any:
        """requests of its model that are not admitted yet, itself among them"""
        return WaitingValues.waiting.func(self) - self._before

    @functools.cached_property
    def _before(self) -> Floats:
        """Rows of the same model before each."""
        column = np.zeros(len(self.model))
        for _, here in self._models:
            column[here] = np.arange(len(column[here]))
        return column


class _OnInstances(RequestValues):
    """Requests and an instance for each of them, or one request and every instance."""

    @property
    def _instances(self) -> Instances:
        return self.state.instances

    def _of(self, column: Column) -> Any:
        """A column of instances, as this place sees it."""
        return column

    @property
    def _used(self) -> Any:
        """KV blocks in use."""
        return self._of(self._instances.kv_blocks_used)

    @_in(Unit.TEXT)
    def instance(self) -> Any:
        """the instance's name"""
        return self._of(self._instances.ids)

    @_in(Unit.SHARE)
    def kv_free(self) -> Any:
        """free KV, of all of it"""
        return 1 - self.kv_used

    @_in(Unit.SHARE)
    def kv_used(self) -> Any:
        """KV that holds requests or is promised to them, of all of it"""
        return self._used / np.maximum(self.kv_blocks, 1)

    @_in(Unit.BLOCKS)
    def kv_free_blocks(self) -> Any:
        """free KV"""
        return self.kv_blocks - self._used

    @_in(Unit.BLOCKS)
    def kv_used_blocks(self) -> Any:
        """KV that holds requests or is promised to them"""
        return self._used

    @_in(Unit.BLOCKS)
    def kv_blocks(self) -> Any:
        """all KV"""
        return self._of(self._instances.kv_blocks)

    @_in(Unit.TOKENS)
    def block_tokens(self) -> Any:
        """tokens in a block"""
        return self._of(self._instances.block_tokens)

    @_in(Unit.TIME)
    def decode_time(self) -> Any:
        """what a step of decodes takes; 0 where nobody knows"""
        return self._of(self._instances.decode_step_us)


class PlacingValues(_OnInstances):
    """prefill on, decode on: an admitted request and an instance that it may go to.

    Requests before it in the order count where they were put.
    """

    table: Waiting

    def __init__(self, load: Load, row: int) -> None:
        """row: an index into the rows that are being placed."""
        super().__init__(load.state, load.state.waiting, load.rows[row])
        self._load = load

    @property
    def _used(self) -> Any:
        return np.array(self._load.used_blocks)

    @_in(Unit.TOKENS)
    def generate_tokens(self) -> Any:
        """how many may be generated"""
        return self.table.generate_tokens[self.rows]

    @_in(Unit.TOKENS)
    def cached_tokens(self) -> Any:
        """leading tokens whose KV the instance has"""
        return self.state.cached_tokens[self.rows]

    @_in(Unit.TIME)
    def prefill_time(self) -> Any:
        """predicted there for its tokens without KV; 0 where nobody knows"""
        tokens = self.prompt_tokens - self.cached_tokens
        return tokens * self._instances.prefill_ns_per_token / 1e3

    @_in(Unit.NUMBER)
    def running(self) -> Any:
        """requests on the instance"""
        return np.array(self._load.requests)

    @_in(Unit.TOKENS)
    def load(self) -> Any:
        """prompt tokens that are still to be computed there"""
        return np.array(self._load.pending_tokens)

    @_in(Unit.TIME)
    def switch_time(self) -> Any:
        """what it takes the instance to begin its turn"""
        return self._instances.switch_us

    @_in(Unit.CONDITION)
    def idle(self) -> Any:
        """whether no plan is at work there"""
        return self._instances.idle


class RunningValues(_OnInstances):
    """preempt: a running request, and the instance it is on; rows are of `State.running`."""

    table: Running

    def __init__(self, state: State, rows: Any) -> None:
        super().__init__(state, state.running, rows)
        self.places = state.running.instance[rows]

    def _of(self, column: Column) -> Any:
        return column[self.places]

    @_in(Unit.TOKENS)
    def generate_tokens(self) -> Any:
        """how many may still be generated"""
        return self.table.remaining_tokens[self.rows]

    @_in(Unit.TOKENS)
    def computed_tokens(self) -> Any:
        """tokens whose KV is there"""
        return self.table.computed_tokens[self.rows]

    @_in(Unit.CONDITION)
    def decoding(self) -> Any:
        """whether its prompt is computed"""
        return self.computed_tokens >= self.prompt_tokens

    @_in(Unit.MOMENT)
    def admitted(self) -> Any:
        """when it got its place"""
        return self.table.admitted_us[self.rows]

    @_in(Unit.BLOCKS)
    def held_blocks(self) -> Any:
        """what it holds or is promised: its whole prompt and the next token"""
        tokens = np.maximum(self.prompt_tokens, self.computed_tokens) + 1
        return -(-tokens // self.block_tokens)

    @_in(Unit.NUMBER)
    def running(self) -> Any:
        """requests on the instance"""
        counts = np.bincount(self.table.instance, minlength=len(self._instances))
        return self._of(counts)

    @_in(Unit.TOKENS)
    def load(self) -> Any:
        """prompt tokens that are still to be computed there"""
        table = self.table
        pending = np.maximum(table.prompt_tokens - table.computed_tokens, 0)
        return self._of(np.bincount(table.instance, pending, len(self._instances)))


class VictimValues(RunningValues):
    """preempt ... when: the same, once all that go before it have left its instance.

    Rows of one instance stand together.
    """

    @property
    def _used(self) -> Any:
        freed = np.cumsum(self.held_blocks) - self.held_blocks
        return super()._used - (freed - freed[self._first])

    @_in(Unit.NUMBER)
    def running(self) -> Any:
        """requests that are left on the instance"""
        before = np.arange(len(self.places)) - self._first
        return RunningValues.running.func(self) - before

    @functools.cached_property
    def _first(self) -> Any:
        """Of each row, the first row of its instance."""
        return np.searchsorted(self.places, self.places)


def names_of(place: type) -> dict[str, Value]:
    """The names that an expression may use in a place, by name."""
    return {
        name: value
        for kind in reversed(place.__mro__)
        for name, value in vars(kind).items()
        if isinstance(value, Value)
    }
