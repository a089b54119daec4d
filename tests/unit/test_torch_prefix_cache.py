"""How the torch engine keeps KV of whole blocks, and what a request begins with because of it."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from sagec.runtime.engines import Cancelled, Failed, KVCached, PlanDone, Preempted  # noqa: E402
from sagec.runtime.kv import block_hashes  # noqa: E402
from sagec.runtime.plan import RECOMPUTE, SWAP  # noqa: E402
from tests.checkpoints import checkpoint, decided  # noqa: E402
from tests.torch_engines import engine, of, outputs, plan, request, reused, run, steps  # noqa: E402

LONG, TOKENS = decided("llama", 37, 24)
"""A prompt of four whole blocks of 8 tokens and five tokens more, and its greedy tokens."""
HASHES = block_hashes(LONG + TOKENS, 8)


@pytest.fixture
def one():
    """An engine that must be whole at the end, whatever the test did with it."""
    made = engine("i0", checkpoint("llama"), channel="local")
    yield made
    made.check_integrity()
    made.close()


def whole(id: str, prompt=LONG, **changes):
    length = len(prompt)
    return plan("i0", {id: length}, **{"chunks": [(0, id, 0, length)], **changes})


def served(made, id: str, prompt=LONG, max_output_tokens: int = 24, **changes):
    """All events of one request that this engine serves alone."""
    changes = {"decodes": {id: 200}, **changes}
    made.submit(whole(id, prompt, **changes), [request(id, prompt, max_output_tokens)])
    return run(made)


def chunks(events):
    return [chunk for step in steps(events) for chunk in step.chunks]


def cached(one) -> int:
    return len(one.residents.cache.index)


def test_an_engine_says_whether_it_caches_prefixes(one):
    assert one.capability().caches_prefixes
    plain = engine("i0", checkpoint("llama"), prefix_cache="off")
    assert not plain.capability().caches_prefixes
    events = served(plain, "a") + served(plain, "b")
    assert reused(events) == {}
    assert outputs(events) == {"a": TOKENS, "b": TOKENS}
    assert not of(KVCached, events)
    assert plain.residents.pool.num_free == 64
    plain.check_integrity()


def test_a_prompt_that_was_seen_computes_only_what_no_whole_block_holds(one):
    served(one, "a")
    events = served(one, "b")
    assert reused(events) == {"b": 32}
    assert chunks(events) == [("b", 32, 37)]
    assert outputs(events) == {"b": TOKENS}
    assert steps(events)[0].kv_blocks_used == 5


def test_the_last_token_of_a_prompt_is_computed_whatever_is_cached(one):
    served(one, "a")
    events = served(one, "b", LONG[:32], 1)
    assert chunks(events) == [("b", 24, 32)]


def test_what_a_request_said_is_cached_like_what_it_was_asked(one):
    """A second turn of a conversation begins with the first one's answer."""
    served(one, "a")
    prompt = LONG + TOKENS
    events = served(one, "b", prompt, 1)
    assert reused(events) == {"b": 56}
    assert chunks(events) == [("b", 56, 61)]


def test_requests_share_blocks_while_they_run(one):
    """Both begin in one plan; the second finds what the first computed a step before."""
    ids = {"a": 37, "b": 37}
    one.submit(
        plan(
            "i0",
            ids,
            chunks=[(0, "a", 0, 37), (1, "b", 0, 37)],
            decodes=dict.fromkeys(ids, 200),
        ),
        [request(id, LONG) for id in ids],
    )
    events = one.poll() + one.poll()
    assert one.residents.pool.num_held == 4 + 1 + 1
    one.check_integrity()
    events += run(one)
    assert reused(events) == {"b": 32}
    assert outputs(events) == {"a": TOKENS, "b": TOKENS}


def test_requests_that_compute_the_same_blocks_in_one_step_share_them_afterwards(one):
    ids = {"a": 37, "b": 37}
    one.submit(
        plan("i0", ids, chunks=[(0, id, 0, 37) for id in ids], decodes=dict.fromkeys(ids, 200)),
        [request(id, LONG) for id in ids],
    )
    events = one.poll()
    assert one.residents.pool.num_held == 4 + 1 + 1
    one.check_integrity()
    events += run(one)
    assert reused(events) == {}
    assert outputs(events) == {"a": TOKENS, "b": TOKENS}


def test_cached_blocks_are_idle_and_count_as_nobodys(one):
    served(one, "a")
    pool = one.residents.pool
    assert (pool.num_held, pool.num_idle) == (0, 7)
    assert pool.num_free == 64 - 7


def test_a_poll_tells_what_is_cached_and_what_no_longer_is(one):
    events = served(one, "a")
    assert [e.stored for e in of(KVCached, events)] == [HASHES[:4], HASHES[4:7]]
    one.submit(plan("i0", {}, evictions=[HASHES[5]], num_steps=0))
    (event,) = of(KVCached, run(one))
    assert (event.stored, set(event.evicted)) == ((), {HASHES[5], HASHES[6]})
    assert not of(KVCached, served(one, "b", LONG, 1))


def test_figures_tell_how_blocks_are_used_and_what_was_found():
    made = engine("i0", checkpoint("llama"), channel="local", host_blocks="2")
    served(made, "a")
    made.submit(whole("b", num_steps=1), [request("b", LONG, tenant="red")])
    run(made)
    figures = made.residents.statistics()
    assert (figures.pool.held, figures.pool.idle, figures.pool.free) == (5, 3, 56)
    assert figures.pool.unused_tokens == 3
    assert figures.pool.tenant_blocks == {"red": 5}
    assert (figures.index.queries, figures.index.hit_tokens) == (2, 32)
    assert (figures.tiers.capacity, figures.tiers.moved) == ((2, 0), ())
    plain = engine("i0", checkpoint("llama"), prefix_cache="off").residents.statistics()
    assert (plain.index, plain.tiers, plain.missed_tokens) == (None, None, 0)


# What the plan expects


def test_a_plan_that_knows_of_the_cache_plans_no_chunk_for_it(one):
    served(one, "a")
    changes = {"chunks": [(0, "b", 32, 37)], "reuses": {"b": 32}}
    events = served(one, "b", **changes)
    assert outputs(events) == {"b": TOKENS}
    assert one.residents.missed_tokens == 0


def test_what_is_missing_of_an_expected_prefix_is_computed_with_the_first_chunk(one):
    served(one, "a", LONG[:17], 1)
    changes = {"chunks": [(0, "b", 32, 35), (1, "b", 35, 37)], "reuses": {"b": 32}}
    events = served(one, "b", max_step_tokens=3, **changes)
    assert reused(events) == {"b": 16}
    assert chunks(events) == [("b", 16, 35), ("b", 35, 37)]
    assert outputs(events) == {"b": TOKENS}
    assert one.residents.missed_tokens == 16


def test_a_gap_beyond_what_the_plan_takes_for_cached_is_an_error(one):
    events = served(one, "b", chunks=[(0, "b", 33, 37)], reuses={"b": 32})
    (failed,) = of(Failed, events)
    assert "chunk [33, 37) leaves a gap: only 0 tokens are computed" in failed.error


def test_a_plan_whose_tokens_are_all_cached_tells_so_without_computing(one):
    """Otherwise whoever plans would ask for the same tokens for ever."""
    served(one, "a")
    one.submit(whole("b", chunks=[(0, "b", 0, 20)]), [request("b", LONG)])
    events = run(one)
    assert (reused(events), chunks(events)) == ({"b": 32}, [])
    assert of(PlanDone, events)
    events = served(one, "b", chunks=[(0, "b", 32, 37)])
    assert outputs(events)["b"] == TOKENS


def test_what_was_told_is_kept_like_what_was_computed(one):
    """Plans rely on it, also after one that leaves the request out."""
    served(one, "a")
    one.submit(whole("b", chunks=[(0, "b", 0, 20)]), [request("b", LONG)])
    assert reused(run(one)) == {"b": 32}
    one.submit(plan("i0", {}, num_steps=0))
    run(one)
    one.submit(whole("b", chunks=[(0, "b", 32, 37)], decodes={"b": 200}))
    events = run(one)
    assert (reused(events), outputs(events)) == ({}, {"b": TOKENS})


def test_a_plan_may_drop_blocks_but_not_those_in_use(one):
    served(one, "a")
    one.submit(whole("b", num_steps=1), [request("b", LONG)])
    run(one)
    one.submit(plan("i0", {"b": 37}, evictions=[HASHES[0], HASHES[5], 12345], num_steps=0))
    run(one)
    one.check_integrity()
    assert cached(one) == 5
    assert HASHES[0] in one.residents.cache.index


# Room


def small(**options):
    return engine("i0", checkpoint("llama"), kv_blocks=8, channel="local", **options)


def test_cached_blocks_make_room_for_requests_the_last_of_a_prefix_first():
    made = small()
    served(made, "a", LONG, 4)
    other, _ = decided("llama", 64, 24)
    made.submit(
        plan("i0", {"b": 36}, chunks=[(0, "b", 0, 36)], decodes={"b": 37}),
        [request("b", other[:36], 2)],
    )
    events = run(made)
    assert set(of(KVCached, events)[0].evicted) <= set(HASHES[:5])
    assert len(of(KVCached, events)[0].evicted) == 2
    assert HASHES[0] in made.residents.cache.index
    made.check_integrity()
    assert not of(Failed, events)


def test_a_plans_rows_hold_what_they_find_before_others_take_its_room():
    """The blocks reserved for c would otherwise push out what a is about to use."""
    made = small()
    served(made, "old", LONG[:33], 1)
    ids = {"c": 30, "a": 37}
    made.submit(
        plan(
            "i0",
            ids,
            chunks=[(0, "c", 0, 30), (1, "a", 0, 37)],
            kv_blocks={"c": 4, "a": 5},
        ),
        [request("c", LONG[::-1][:30], 1), request("a", LONG, 1)],
    )
    events = run(made)
    assert reused(events)["a"] == 32
    made.check_integrity()


def test_a_row_that_only_found_blocks_gives_them_up_when_no_plan_computes_it():
    made = small()
    served(made, "old", LONG[:33], 1)
    made.submit(
        plan("i0", {"a": 37, "b": 3}, chunks=[(0, "b", 0, 3), (1, "a", 0, 37)]),
        [request("a", LONG), request("b", (1, 2, 3), 9)],
    )
    made.poll()
    assert made.residents.pool.held(made.residents.rows["a"].slot) == 4
    made.submit(plan("i0", {"b": 3}, decodes={"b": 5}))
    made.poll()
    assert made.residents.pool.held(made.residents.rows["a"].slot) == 0
    assert made.residents.rows["a"].computed == 0
    made.check_integrity()


@pytest.mark.parametrize("how", [RECOMPUTE, SWAP])
def test_a_preempted_row_finds_its_own_blocks_again(one, how: int):
    one.submit(whole("a", decodes={"a": 200}, num_steps=8), [request("a", LONG)])
    events = run(one)
    one.submit(plan("i0", {"a": 37}, preemptions={"a": how}))
    preempted = run(one)
    kept = {RECOMPUTE: 0, SWAP: 44}[how]
    assert of(Preempted, preempted) == [Preempted(instance="i0", request_id="a", kept_tokens=kept)]
    assert (one.residents.pool.num_held, one.residents.pool.num_idle) == (0, 5)
    one.check_integrity()
    one.submit(plan("i0", {"a": 45}, chunks=[(0, "a", 0, 45)], decodes={"a": 200}))
    again = run(one)
    assert reused(again) == ({"a": 40} if how == RECOMPUTE else {})
    assert outputs(events + preempted + again) == {"a": TOKENS}


def test_a_request_cancelled_in_the_middle_leaves_its_blocks_idle(one):
    one.submit(whole("a", chunks=[(0, "a", 0, 20), (1, "a", 20, 37)]), [request("a", LONG)])
    one.poll()
    one.cancel("a")
    events = run(one)
    assert of(Cancelled, events)
    assert (one.residents.pool.num_held, one.residents.pool.num_idle) == (0, 2)


# Hand-over


def test_both_sides_of_a_hand_over_keep_the_prefix():
    prefill, decode = (engine(id, checkpoint("llama"), channel="local") for id in ("p0", "d0"))
    for id in ("a", "b"):
        decode.submit(plan("d0", {id: 37}, decodes={id: 200}, imports={id: "p0"}))
        prefill.submit(
            plan("p0", {id: 37}, chunks=[(0, id, 0, 37)], exports={id: "d0"}), [request(id, LONG)]
        )
        events = run(prefill, decode)
        assert outputs(events) == {id: TOKENS}
        for side in (prefill, decode):
            side.check_integrity()
            assert side.residents.pool.num_held == 0
    assert reused(events) == {"b": 32}
    assert (cached(prefill), cached(decode)) == (4, 7)
    for side in (prefill, decode):
        side.close()


def test_kv_that_was_damaged_on_the_way_is_not_cached():
    from sagec.runtime.engines import KVExported
    from sagec.runtime.engines.torch.transfer import HEADER_BYTES

    prefill, decode = (engine(id, checkpoint("llama"), channel="local") for id in ("p0", "d0"))
    prefill.submit(
        plan("p0", {"a": 37}, chunks=[(0, "a", 0, 37)], exports={"a": "d0"}), [request("a", LONG)]
    )
    (event,) = of(KVExported, run(prefill))
    segment = decode._channel.receive(event.handle.place, event.handle.num_bytes)
    segment[HEADER_BYTES + 3] ^= 0x40
    decode.receive(event.handle)
    decode.submit(plan("d0", {"a": 37}, decodes={"a": 200}, imports={"a": "p0"}))
    assert of(Failed, run(decode))
    assert cached(decode) == 0
    assert decode.residents.pool.num_free == 64
    decode.check_integrity()


# Collisions and quotas


def test_prompts_whose_hashes_collide_get_their_own_tokens(one, monkeypatch):
    """Every block is called by its number; only what its tokens are tells them apart."""
    from sagec.runtime.kv import prefix_cache

    def colliding(tokens, block_tokens, salt="", known=()):
        return tuple(range(len(tokens) // block_tokens))

    monkeypatch.setattr(prefix_cache, "block_hashes", colliding)
    other, expected = decided("llama", 64, 24)
    events = served(one, "a") + served(one, "b", other) + served(one, "c")
    assert outputs(events) == {"a": TOKENS, "b": expected, "c": TOKENS}
    assert reused(events) == {"c": 32}
    assert one.residents.cache.index.statistics().collisions > 0


def test_a_tenant_beyond_its_quota_waits_and_one_that_asks_for_more_than_all_of_it_fails():
    made = engine("i0", checkpoint("llama"), quotas="red=5", channel="local")
    ids = {"a": 37, "b": 20, "c": 64}
    big, _ = decided("llama", 64, 24)
    made.submit(
        plan(
            "i0",
            ids,
            chunks=[(0, "a", 0, 37), (1, "b", 0, 20), (2, "c", 0, 64)],
        ),
        [
            request("a", LONG, 3, tenant="red"),
            request("b", LONG[::-1][:20], 1, tenant="red"),
            request("c", big, 1, tenant="red"),
        ],
    )
    events = run(made)
    assert [e.error for e in of(Failed, events)] == ["64 tokens need 8 KV blocks; 'red' may hold 5"]
    assert {id for id, _, _ in chunks(events)} == {"a"}
    made.cancel("a")
    made.submit(plan("i0", {"b": 20}, chunks=[(0, "b", 0, 20)]))
    assert chunks(run(made)) == [("b", 0, 20)]
    made.check_integrity()


# Tiers


def three_tiers(**options):
    """A device of 8 blocks, which one request of LONG and its answer nearly fills."""
    return small(host_blocks="4", disk_blocks="16", **options)


def serve_others(made, count: int) -> None:
    """Requests with nothing in common, which push out what is cached."""
    for number in range(count):
        served(made, f"other{number}", tuple(range(number, number + 60)), 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kv_comes_back_through_host_memory_and_disk_as_it_was(dtype: str):
    made = three_tiers(dtype=dtype)
    before = served(made, "a")
    kv = {block.hash: bits(made, block.place) for block in made.residents.cache.index}
    serve_others(made, 2)
    index = made.residents.cache.index
    assert {index.find(name).tier for name in HASHES[:4]} == {2}
    events = served(made, "b")
    assert reused(events) == {"b": 32}
    assert outputs(events)["b"] == outputs(before)["a"]
    for name in HASHES[:4]:
        assert index.find(name).tier == 0
        assert torch.equal(bits(made, index.find(name).place), kv[name])
    moved = made.residents.cache.tiers.statistics().moved
    assert {(pair.source, pair.target) for pair in moved} >= {(0, 1), (1, 2), (2, 0)}
    block_bytes = 8 * made.capability().kv_bytes_per_token
    assert all(pair.bytes == pair.blocks * block_bytes for pair in moved)
    made.check_integrity()
    made.close()


def bits(made, block: int):
    return torch.stack([kv[block].view(torch.uint8) for kv in made.residents.model.kv])


def test_a_damaged_block_on_disk_is_computed_again():
    import os

    made = three_tiers()
    served(made, "a")
    serve_others(made, 2)
    cache = made.residents.cache
    place = cache.index.find(HASHES[2]).place
    os.pwrite(cache.tiers.disk.descriptor, b"damage", place * cache.tiers.block_bytes)
    events = served(made, "b")
    assert reused(events) == {"b": 16}
    assert chunks(events) == [("b", 16, 37)]
    assert outputs(events) == {"b": TOKENS}
    assert cache.tiers.statistics().failed == 1
    made.check_integrity()
    made.close()


def test_a_plan_moves_cached_blocks_between_tiers():
    made = three_tiers()
    served(made, "a")
    index = made.residents.cache.index
    out = [(HASHES[6], 0, 1), (HASHES[5], 0, 2), (HASHES[0], 0, 1), (4711, 0, 1)]
    made.submit(plan("i0", {}, migrations=out, num_steps=0))
    run(made)
    assert [index.find(name).tier for name in HASHES[4:7]] == [0, 0, 1]
    made.submit(plan("i0", {}, migrations=[(HASHES[6], 1, 0)], num_steps=0))
    assert not of(KVCached, run(made))
    assert index.find(HASHES[6]).tier == 0
    made.check_integrity()
    made.close()


def test_a_plan_for_a_tier_that_is_not_there_is_refused(one):
    one.submit(plan("i0", {"a": 37}, migrations=[(1, 0, 1)]), [request("a", LONG)])
    (failed,) = of(Failed, run(one))
    assert "migrations: 'i0' has no blocks in tier 1" in failed.error


def test_the_spool_file_lies_in_the_folder_given_and_is_gone_afterwards(tmp_path):
    made = three_tiers(spool=str(tmp_path))
    served(made, "a")
    serve_others(made, 2)
    made.close()
    assert not list(tmp_path.iterdir())
