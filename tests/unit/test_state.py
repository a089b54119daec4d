"""State in columns: views, decisions and the request table."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sagec.runtime.plan import RECOMPUTE, SWAP
from sagec.runtime.request import Request
from sagec.runtime.state import (
    ADMIT,
    ANY,
    DEFER,
    REJECT,
    UNBOUNDED,
    Decision,
    Instances,
    RequestTable,
    Running,
    State,
    StateError,
    Waiting,
    check,
)


def state(waiting: int = 3, running: int = 2) -> State:
    return State(
        now_us=0,
        round=0,
        waiting=Waiting.of([f"w{i}" for i in range(waiting)]),
        running=Running.of([f"r{i}" for i in range(running)]),
        instances=Instances.of(["x0", "x1"], role="both"),
    )


def test_columns_take_lists_single_values_and_defaults():
    waiting = Waiting.of(["a", "b"], prompt_tokens=[3, 5], generate_tokens=UNBOUNDED, model="m")
    assert waiting.prompt_tokens.tolist() == [3, 5]
    assert waiting.generate_tokens.tolist() == [UNBOUNDED, UNBOUNDED]
    assert waiting.model.tolist() == ["m", "m"]
    assert waiting.tenant.tolist() == ["", ""]
    assert len(waiting) == 2
    assert waiting.rows.tolist() == [0, 1]


def test_a_view_cannot_be_changed():
    waiting = Waiting.of(["a"])
    with pytest.raises(ValueError, match="read-only"):
        waiting.prompt_tokens[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        waiting.ids = waiting.tenant


def test_an_unknown_column_is_named():
    with pytest.raises(StateError, match="Waiting has no column 'prompt'; it has \\['ids'"):
        Waiting.of(["a"], prompt=3)


def test_columns_of_different_lengths_are_named():
    good = Waiting.of(["a", "b"])
    with pytest.raises(StateError, match=r"Waiting: columns of different lengths: .*'priority': 1"):
        dataclasses.replace(good, priority=good.priority[:1])


def test_instances_know_what_they_may_do():
    instances = Instances.of(
        ["p", "d", "x", "dead"],
        role=["prefill", "decode", "both", "both"],
        alive=[True, True, True, False],
    )
    assert instances.prefills.tolist() == [True, False, True, False]
    assert instances.decodes.tolist() == [False, True, True, False]


def test_a_decision_admits_in_order_and_leaves_the_rest():
    waiting = Waiting.of(["a", "b", "c", "d"])
    decision = Decision.admit(np.array([2, 0]), waiting, ["oldest", "fits"], "no room")
    assert decision.verdict.tolist() == [ADMIT, DEFER, ADMIT, DEFER]
    assert decision.admitted.tolist() == [2, 0]
    assert decision.reason.tolist() == ["fits", "no room", "oldest", "no room"]
    assert decision.prefill_on.tolist() == [ANY] * 4


def test_a_decision_rejects_and_preempts_without_changing_the_one_it_comes_from():
    waiting = Waiting.of(["a", "b"])
    first = Decision.admit(np.array([0, 1]), waiting)
    second = first.reject(np.array([1]), "too long").preempt(np.array([4]), "full")
    third = second.preempt(np.array([2]), "full", SWAP)
    assert first.rejected.tolist() == []
    assert second.verdict.tolist() == [ADMIT, REJECT]
    assert second.preempt_how.tolist() == [RECOMPUTE]
    assert third.preempt_rows.tolist() == [4, 2]
    assert third.preempt_how.tolist() == [RECOMPUTE, SWAP]
    assert third.preempt_reason.tolist() == ["full", "full"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": np.zeros(2, np.int64)}, "rank has 2 rows for 3 waiting requests"),
        ({"verdict": np.full(3, 3, np.int8)}, r"verdict\[0\]: 3 is not in \[0, 3\)"),
        ({"preempt_rows": np.array([0, 2])}, r"preempt_rows\[1\]: 2 is not in \[0, 2\)"),
        ({"preempt_rows": np.array([1, 1])}, "preempt_rows names a row twice"),
        ({"decode_on": np.array([0, 1, 2])}, r"decode_on\[2\]: 2 is not in \[0, 2\)"),
        ({"prefill_on": np.array([-1, 0, 0])}, r"prefill_on\[0\]: -1 is not in \[0, 2\)"),
    ],
)
def test_a_decision_that_does_not_fit_is_refused(changes, message):
    seen = state()
    decision = dataclasses.replace(Decision.defer(seen.waiting), **changes)
    with pytest.raises(StateError, match=f"^fifo: {message}"):
        check(decision, seen, "fifo")


def test_a_decision_that_fits_passes():
    seen = state()
    check(Decision.admit(seen.waiting.rows, seen.waiting).preempt(np.array([0]), ""), seen)


# The table.


def request(name: str, prompt: int = 4, **fields) -> Request:
    return Request(id=name, prompt=tuple(range(prompt)), **fields)


def test_a_request_appears_waiting_with_all_it_asked_for():
    table = RequestTable()
    table.add(
        request(
            "a",
            max_output_tokens=9,
            arrival_us=5,
            priority=2,
            ttft_us=100,
            tenant="t",
            session="s",
            adapter="l",
        ),
        "m",
    )
    waiting = table.waiting()
    row = {field.name: getattr(waiting, field.name)[0] for field in dataclasses.fields(waiting)}
    assert row == {
        "ids": "a",
        "sequence": 0,
        "output_tokens": 0,
        "first_token_us": 0,
        "preemptions": 0,
        "arrival_us": 5,
        "priority": 2,
        "ttft_us": 100,
        "tpot_us": 0,
        "model": "m",
        "tenant": "t",
        "session": "s",
        "adapter": "l",
        "prompt_tokens": 4,
        "generate_tokens": 9,
    }


def test_views_are_kept_until_something_changes():
    table = RequestTable()
    a = table.add(request("a"), "")
    waiting, running = table.waiting(), table.running()
    assert table.waiting() is waiting
    table.run(a, 0, 0)
    assert table.waiting() is not waiting
    assert table.running() is not running
    assert waiting.ids.tolist() == ["a"]


def test_blocks_are_counted_where_a_request_is_and_where_it_goes():
    table = RequestTable()
    a, b = table.add(request("a", 31), ""), table.add(request("b", 32), "")
    table.run(a, 0, 1)
    table.run(b, 0, 0)
    assert table.kv_blocks_used(np.array([16, 8])).tolist() == [2 + 3, 4]
    table.move(a, 1, arriving=True)
    assert table.kv_blocks_used(np.array([16, 8])).tolist() == [3, 4]
    table.leave(b)
    assert table.kv_blocks_used(np.array([16, 8])).tolist() == [3, 4]


def columns_of(view):
    return {f.name: getattr(view, f.name).tolist() for f in dataclasses.fields(view)}


class TableMachine(RuleBasedStateMachine):
    """A table against plain dictionaries."""

    def __init__(self):
        super().__init__()
        self.table = RequestTable(capacity=2, room_tokens=[UNBOUNDED, UNBOUNDED])
        self.rows, self.waiting, self.running, self.count = {}, [], [], 0
        self.shown = []

    @rule(prompt=st.integers(1, 50), limit=st.none() | st.integers(1, 50))
    def add(self, prompt, limit):
        name = f"r{self.count}"
        self.count += 1
        self.rows[name] = self.table.add(request(name, prompt, max_output_tokens=limit), "m")
        self.waiting.append(name)

    @rule(data=st.data())
    def admit(self, data):
        if self.waiting:
            name = data.draw(st.sampled_from(self.waiting))
            self.waiting.remove(name)
            self.running.append(name)
            self.table.run(self.rows[name], 1, 0)

    @rule(data=st.data())
    def send_back(self, data):
        if self.running:
            name = data.draw(st.sampled_from(self.running))
            self.running.remove(name)
            self.waiting.append(name)
            self.table.wait(self.rows[name], 7)

    @rule(data=st.data())
    def generate(self, data):
        if self.running:
            row = self.rows[data.draw(st.sampled_from(self.running))]
            before = int(self.table.remaining_tokens[row])
            self.table.generated([row], [9])
            expected = before if before == UNBOUNDED else before - 1
            assert self.table.remaining_tokens[row] == expected

    @rule(data=st.data(), arriving=st.booleans())
    def move(self, data, arriving):
        if self.running:
            row = self.rows[data.draw(st.sampled_from(self.running))]
            self.table.move(row, data.draw(st.integers(0, 1)), arriving)
            self.table.decode_at(row, data.draw(st.integers(0, 1)))

    @rule(data=st.data(), instance=st.integers(0, 1), tokens=st.integers(0, 9))
    def cache(self, data, instance, tokens):
        if names := self.waiting + self.running:
            row = self.rows[data.draw(st.sampled_from(names))]
            self.table.cached([row], instance, tokens)

    @rule(data=st.data())
    def remove(self, data):
        names = self.waiting + self.running
        if names:
            name = data.draw(st.sampled_from(names))
            (self.waiting if name in self.waiting else self.running).remove(name)
            self.table.remove(self.rows.pop(name))

    @invariant()
    def views_show_everybody_in_the_order_of_coming(self):
        def key(name):
            return int(name[1:])

        assert self.table.waiting().ids.tolist() == sorted(self.waiting, key=key)
        assert self.table.running().ids.tolist() == sorted(self.running, key=key)
        assert len(self.table) == len(self.rows)
        assert len(set(self.rows.values())) == len(self.rows)

    @invariant()
    def views_say_what_the_table_says_and_older_ones_what_it_said(self):
        for view, before in self.shown:
            assert columns_of(view) == before
        for view in (self.table.waiting(), self.table.running()):
            rows = [self.rows[name] for name in view.ids]
            for name, column in columns_of(view).items():
                stored = {"generate_tokens": "remaining_tokens"}.get(name, name)
                assert column == getattr(self.table, stored)[rows].tolist() or name in (
                    "remaining_tokens",
                    "cached_tokens",
                )
            self.shown = [*self.shown[-4:], (view, columns_of(view))]

    @invariant()
    def what_is_cached_is_seen_until_a_prompt_is_begun(self):
        cached, row_of = self.table.cached_tokens, self.rows
        waiting, running = self.table.waiting(), self.table.running()
        expected = [cached[row_of[name]].tolist() for name in waiting.ids]
        assert self.table.waiting_cached_tokens().tolist() == expected
        at = zip(running.ids, running.instance, running.computed_tokens, strict=True)
        expected = [cached[row_of[name], i] if not begun else 0 for name, i, begun in at]
        assert running.cached_tokens.tolist() == expected

    @invariant()
    def blocks_are_counted_as_if_anew(self):
        blocks = [0, 0]
        for name in self.running:
            row = self.rows[name]
            tokens = max(self.table.prompt_tokens[row], self.table.computed_tokens[row]) + 1
            for instance in {int(self.table.instance[row]), int(self.table.decode_on[row])}:
                blocks[instance] += -(-int(tokens) // (8, 16)[instance])
        assert self.table.kv_blocks_used(np.array([8, 16])).tolist() == blocks


TestTable = TableMachine.TestCase


@given(st.integers(1, 200))
def test_the_table_grows_and_forgets_nothing(count):
    table = RequestTable(capacity=1)
    for i in range(count):
        table.add(request(f"r{i}", prompt=i % 7 + 1), "m")
    assert table.waiting().ids.tolist() == [f"r{i}" for i in range(count)]
    assert table.waiting().prompt_tokens.tolist() == [i % 7 + 1 for i in range(count)]
