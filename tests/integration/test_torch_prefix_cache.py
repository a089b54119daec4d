"""The prefix cache changes no token of the torch engine, whatever is planned and dropped."""

import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from sagec.runtime.engines import Event, Failed  # noqa: E402
from sagec.runtime.kv import block_hashes, policies  # noqa: E402
from sagec.runtime.plan import RECOMPUTE, SWAP  # noqa: E402
from tests.checkpoints import VOCAB, Undecided, checkpoint, generate  # noqa: E402
from tests.torch_engines import engine, of, outputs, plan, request, steps  # noqa: E402

TOKENS, BLOCK_TOKENS, KV_BLOCKS = 12, 8, 14
"""Tokens of each answer; the largest request below fills 11 blocks."""
SHARED_TOKENS = (0, 9, 16, 40, 40, 64)
"""How much of one long text each prompt of the family begins with."""


@functools.cache
def family() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompts that begin alike, with their greedy tokens, none of which is a close call."""
    text = random.Random(1)
    common = tuple(text.randrange(VOCAB) for _ in range(max(SHARED_TOKENS)))
    made = []
    for shared, length in zip(SHARED_TOKENS, (5, 12, 30, 41, 57, 73), strict=True):
        for seed in itertools.count():
            draw = random.Random(seed)
            prompt = common[:shared] + tuple(draw.randrange(VOCAB) for _ in range(length - shared))
            try:
                made.append((prompt, generate("llama", prompt, TOKENS)))
                break
            except Undecided:
                continue
    return made


@dataclass
class Client:
    """Sends requests of the family to one engine and plans them until they are answered."""

    one: object
    draw: random.Random
    live: dict[str, tuple[int, ...]] = field(default_factory=dict)
    expected: dict[str, tuple[int, ...]] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    events: list[Event] = field(default_factory=list)
    num_plans: int = 0

    def send(self, number: int) -> None:
        id = f"r{len(self.expected)}"
        prompt, self.expected[id] = family()[number]
        self.live[id] = prompt
        self._plan([request(id, prompt, TOKENS)])

    def plan(self) -> None:
        self._plan([])

    def cancel(self) -> None:
        if self.live:
            id = self.draw.choice(sorted(self.live))
            self.one.cancel(id)
            self.cancelled.add(id)
            del self.live[id]

    def preempt(self, count: int) -> None:
        """Take some rows off the device, in either way."""
        ids = self.draw.sample(sorted(self.live), min(count, len(self.live)))
        self._plan([], {id: self.draw.choice((RECOMPUTE, SWAP)) for id in ids})

    def poll(self, count: int = 1) -> int:
        """How many steps were computed."""
        before = len(steps(self.events))
        for _ in range(count):
            self.events += self.one.poll()
            self.one.check_integrity()
        for step in steps(self.events):
            for id, _ in step.finished:
                self.live.pop(id, None)
        return len(steps(self.events)) - before

    def finish(self) -> None:
        while self.live:
            self._plan([])
            if not self.poll(6):
                others = list(self.live)[1:]
                self._plan([], {id: self.draw.choice((RECOMPUTE, SWAP)) for id in others})
                self.poll()
            assert not of(Failed, self.events)
            assert self.num_plans < 500, f"these get nowhere: {sorted(self.live)}"

    def _plan(self, new: Sequence, preemptions: dict[str, int] | None = None) -> None:
        """A plan for all rows: each is cut anew, from the beginning, and half are said to reuse."""
        lengths = {id: len(prompt) for id, prompt in self.live.items()}
        for id, row in self.one.residents.rows.items():
            if id in lengths:
                lengths[id] = len(row.tokens)
        chunks, claims = [], {}
        caches = self.one.capability().caches_prefixes
        for id, length in lengths.items():
            claimed = self.draw.choice((0, (length - 1) // BLOCK_TOKENS * BLOCK_TOKENS)) * caches
            if claimed:
                claims[id] = claimed
            cuts = {self.draw.randrange(claimed, length) for _ in range(self.draw.randrange(3))}
            edges = [claimed, *sorted(cuts - {claimed}), length]
            begin_step = self.draw.randrange(3)
            for step, (begin, end) in enumerate(itertools.pairwise(edges), begin_step):
                chunks.append((step, id, begin, end))
        self.num_plans += 1
        gone = [name for prompt, _ in family() for name in block_hashes(prompt, BLOCK_TOKENS)]
        self.one.submit(
            plan(
                "i0",
                lengths,
                chunks=[c for c in chunks if c[1] not in (preemptions or {})],
                decodes={id: 200 for id in lengths if id not in (preemptions or {})},
                reuses=claims,
                preemptions=preemptions,
                evictions=self.draw.sample(gone, self.draw.choice((0, 0, 1)) * caches),
                kv_blocks={id: self.draw.randrange(4) for id in lengths},
                num_steps=8,
                max_step_tokens=self.draw.choice((8, 512)),
                plan_id=f"plan-{self.num_plans}",
            ),
            new,
        )


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["send", "send", "poll", "poll", "preempt", "cancel", "plan"]),
        st.integers(0, 5),
    ),
    min_size=2,
    max_size=24,
)


@settings(max_examples=40, deadline=None)
@given(
    actions=ACTIONS,
    seed=st.integers(0, 1000),
    prefix_cache=st.sampled_from(["on", "on", "on", "off"]),
    eviction=st.sampled_from(policies.known()),
    tiers=st.sampled_from([(0, 0), (4, 0), (0, 4), (6, 8)]),
    migration=st.sampled_from(["always", "where-it-pays"]),
)
def test_tokens_are_the_same_whatever_is_reused_dropped_preempted_and_cancelled(
    actions, seed: int, prefix_cache: str, eviction: str, tiers: tuple[int, int], migration: str
):
    options = {"prefix_cache": prefix_cache, "eviction": eviction, "migration": migration}
    options |= {"host_blocks": str(tiers[0]), "disk_blocks": str(tiers[1])}
    one = engine("i0", checkpoint("llama"), KV_BLOCKS, BLOCK_TOKENS, channel="local", **options)
    client = Client(one, random.Random(seed))
    for action, number in actions:
        if action == "send":
            client.send(number)
        elif action in ("poll", "preempt"):
            getattr(client, action)(number)
        else:
            getattr(client, action)()
        client.poll(0)
    client.finish()
    client.poll()
    assert not of(Failed, client.events)
    found = outputs(client.events)
    for id, expected in client.expected.items():
        given = found.get(id, ())
        assert given == expected[: len(given)]
        assert id in client.cancelled or given == expected
    assert not one.residents.rows
    assert one.residents.pool.num_held == 0
    one.close()
