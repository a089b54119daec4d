"""Who has KV of whom: as fast as what changes, and always what counting anew would give."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sagec.runtime.kv import block_hashes
from sagec.runtime.kv.directory import Directory
from sagec.runtime.request import Request
from sagec.runtime.state import RUNNING, WAITING, Instances, RequestTable

INSTANCES = Instances.of(
    ["a", "b", "wide", "other", "plain", "d"],
    role=["both", "prefill", "both", "both", "both", "decode"],
    model=["m", "m", "m", "n", "m", "m"],
    block_tokens=[2, 2, 3, 2, 2, 2],
)
CACHES = (True, True, True, True, False, True)


def directory_of() -> tuple[Directory, RequestTable]:
    table = RequestTable(capacity=2, room_tokens=[1000] * len(INSTANCES))
    return Directory(INSTANCES, CACHES, table), table


def asked(*prompt: int, model: str = "m", **fields: Any) -> Request:
    return Request(id="r", prompt=prompt, model=model, **fields)


def waits(directory: Directory, table: RequestTable, request: Request) -> int:
    row = table.add(request, request.model)
    directory.wait(row, request)
    return row


texts = st.lists(st.integers(0, 1), min_size=1, max_size=9).map(tuple)
instances = st.integers(0, len(INSTANCES) - 1)


class DirectoryMachine(RuleBasedStateMachine):
    """A directory against sets of hashes, which are searched block by block."""

    def __init__(self) -> None:
        super().__init__()
        self.directory, self.table = directory_of()
        self.held: list[set[int]] = [set() for _ in CACHES]
        self.tokens: dict[int, tuple[int, ...]] = {}
        self.requests: dict[int, Request] = {}
        self.begun: set[int] = set()
        self.kept: dict[int, tuple[int, int]] = {}

    def row(self, data: Any, rows: Any) -> int | None:
        return data.draw(st.sampled_from(sorted(rows))) if rows else None

    @rule(prompt=texts, model=st.sampled_from(("m", "n")), adapter=st.sampled_from(("", "poet")))
    def wait(self, prompt: Any, model: str, adapter: str) -> None:
        request = asked(*prompt, model=model, adapter=adapter)
        row = waits(self.directory, self.table, request)
        self.requests[row], self.tokens[row] = request, prompt
        self.begun.discard(row)
        self.kept.pop(row, None)

    @rule(data=st.data())
    def begin(self, data: Any) -> None:
        if (row := self.row(data, self.tokens.keys() - self.begun)) is not None:
            self.table.run(row, 0, 0)
            self.directory.leave(row)
            self.begun.add(row)
            self.kept.pop(row, None)

    @rule(data=st.data(), output=texts, at=st.none() | instances)
    def wait_again(self, data: Any, output: Any, at: int | None) -> None:
        """With more output, and KV that was swapped out or not."""
        if (row := self.row(data, self.begun)) is None:
            return
        prompt = self.requests[row].prompt
        self.tokens[row] = tokens = (*self.tokens[row], *output)
        self.table.wait(row, len(tokens))
        self.directory.wait(row, self.requests[row], tokens[len(prompt) :])
        self.begun.discard(row)
        if at is not None:
            kept = data.draw(st.integers(1, len(tokens)))
            self.directory.keep(row, at, kept)
            self.kept[row] = at, min(kept, len(tokens) - 1)

    @rule(data=st.data())
    def end(self, data: Any) -> None:
        if (row := self.row(data, self.tokens)) is not None:
            self.directory.forget(row)
            self.table.remove(row)
            for rows in (self.tokens, self.requests, self.kept):
                rows.pop(row, None)
            self.begun.discard(row)

    @rule(data=st.data(), at=instances, text=texts, adapter=st.sampled_from(("", "poet")))
    def blocks_change(self, data: Any, at: int, text: Any, adapter: str) -> None:
        """Blocks of a text come, and others go; in any order, and with gaps."""
        chain = block_hashes(text, int(INSTANCES.block_tokens[at]), adapter)
        stored = data.draw(st.lists(st.sampled_from(chain), unique=True)) if chain else []
        gone = self.held[at] - set(stored)
        evicted = data.draw(st.lists(st.sampled_from(sorted(gone)), unique=True)) if gone else []
        self.directory.changed(at, stored, evicted)
        self.held[at] = gone - set(evicted) | (self.held[at] & set(stored)) | set(stored)

    @rule(at=instances)
    def lose(self, at: int) -> None:
        self.directory.lose(at)
        self.held[at].clear()
        self.kept = {row: kept for row, kept in self.kept.items() if kept[0] != at}

    def expected(self, row: int, at: int) -> int:
        where, kept = self.kept.get(row, (None, 0))
        if where == at:
            return kept
        request = self.requests[row]
        useful = CACHES[at] and INSTANCES.role[at] != "decode"
        if not useful or INSTANCES.model[at] != request.model:
            return 0
        size = int(INSTANCES.block_tokens[at])
        count = 0
        for block_hash in block_hashes(self.tokens[row][:-1], size, request.adapter):
            if block_hash not in self.held[at]:
                break
            count += size
        return count

    @invariant()
    def the_table_says_what_counting_anew_gives(self) -> None:
        for row in self.tokens.keys() - self.begun:
            found = self.table.cached_tokens[row].tolist()
            assert found == [self.expected(row, at) for at in range(len(CACHES))]

    @invariant()
    def it_knows_what_instances_have(self) -> None:
        for at, held in enumerate(self.held):
            assert self.directory.held(at) == held

    @invariant()
    def nothing_is_left_of_requests_that_wait_no_more(self) -> None:
        waiting = self.tokens.keys() - self.begun
        for tree in self.directory._trees.values():
            for node in tree.nodes.values():
                assert node.rows and node.rows <= waiting
                assert node.children <= tree.nodes.keys()
            for reached in tree.reached.values():
                assert reached <= tree.nodes.keys()


DirectoryMachine.TestCase.settings = settings(max_examples=60, deadline=None)
TestDirectory = DirectoryMachine.TestCase


def test_a_prompt_that_is_cached_whole_computes_its_last_block() -> None:
    directory, table = directory_of()
    row = waits(directory, table, asked(1, 2, 3, 4))
    directory.changed(0, block_hashes((1, 2, 3, 4), 2), ())
    assert table.cached_tokens[row, 0] == 2


def test_hashes_that_the_sender_knows_are_not_computed_again() -> None:
    directory, table = directory_of()
    row = waits(directory, table, asked(1, 2, 3, 4, 5, block_hashes=(70, 71)))
    directory.changed(0, (70, 71), ())
    assert table.cached_tokens[row].tolist() == [4, 0, 0, 0, 0, 0]


def test_hashes_of_other_blocks_than_an_instances_are_passed_over() -> None:
    directory, table = directory_of()
    request = asked(1, 2, 3, 4, 5, 6, 7, block_hashes=(70, 71, 72))
    row = waits(directory, table, request)
    directory.changed(2, (*block_hashes(request.prompt, 3), 70, 71), ())
    assert table.cached_tokens[row].tolist() == [0, 0, 6, 0, 0, 0]


@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), max_size=5), st.data())
def test_hashes_that_a_sender_made_up_do_no_harm(made_up: list[list[int]], data: Any) -> None:
    directory, table = directory_of()
    rows = [waits(directory, table, asked(1, 2, 3, 4, 5, block_hashes=(*h,))) for h in made_up]
    for _ in range(3):
        blocks = data.draw(st.lists(st.integers(0, 3), unique=True))
        directory.changed(0, blocks, [block for block in range(4) if block not in blocks])
        assert set(table.cached_tokens[rows, 0].tolist()) <= {0, 2, 4}
    for row in data.draw(st.permutations(rows)):
        directory.forget(row)
    assert not any(tree.nodes for tree in directory._trees.values())


def test_where_no_instance_caches_nothing_is_hashed() -> None:
    table = RequestTable(room_tokens=[1000] * len(INSTANCES))
    directory = Directory(INSTANCES, [False] * len(INSTANCES), table)
    row = waits(directory, table, asked(*range(100)))
    directory.changed(0, block_hashes(range(100), 2), ())
    assert not table.cached_tokens[row].any()
    assert not directory._chains


@given(st.integers(1, 40))
def test_what_a_running_request_may_reuse_is_seen_until_it_is_begun(blocks: int) -> None:
    directory, table = directory_of()
    prompt = tuple(range(100))
    row = waits(directory, table, asked(*prompt))
    table.run(row, instance=1, decode_on=1)
    chain = block_hashes(prompt, 2)
    directory.changed(1, chain[:blocks], ())
    assert table.phase[row] == RUNNING != WAITING
    assert table.running().cached_tokens.tolist() == [2 * blocks]
    directory.changed(1, (), chain[blocks - 1 :])
    assert table.running().cached_tokens.tolist() == [2 * blocks - 2]
    table.progress(row, 10)
    directory.leave(row)
    assert table.running().cached_tokens.tolist() == [0]
    assert np.array_equal(table.waiting_cached_tokens(), np.zeros((0, len(INSTANCES))))
