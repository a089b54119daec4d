"""Sampling: the right distribution, and nothing of the batch in it."""

import collections

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from sagec.runtime.engines.torch.sampling import (  # noqa: E402
    draw,
    draw_key,
    probabilities,
    sample,
)
from sagec.runtime.request import Request, Sampling  # noqa: E402

DRAWS = [draw("seed 1", index) for index in range(4000)]
LOGITS = torch.tensor([1.0, 3.0, 0.5, 2.0, -1.0, 2.5])


def frequencies(sampling: Sampling) -> dict[int, float]:
    tokens = sample(LOGITS.expand(len(DRAWS), -1), [sampling] * len(DRAWS), DRAWS)
    return {token: n / len(DRAWS) for token, n in collections.Counter(tokens).items()}


def test_draws_are_spread_evenly_over_zero_to_one():
    counts = collections.Counter(int(d * 10) for d in DRAWS)
    assert sorted(counts) == list(range(10))
    assert max(abs(count - 400) for count in counts.values()) < 80


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_the_softmax_says(temperature: float):
    expected = (LOGITS / temperature).softmax(-1)
    found = frequencies(Sampling(temperature=temperature))
    for token, probability in enumerate(expected.tolist()):
        assert abs(found.get(token, 0.0) - probability) < 0.03


def test_top_k_keeps_the_k_likeliest_in_proportion():
    found = frequencies(Sampling(temperature=1.0, top_k=2))
    assert set(found) == {1, 5}
    ratio = (LOGITS[1] - LOGITS[5]).exp().item()
    assert found[1] / found[5] == pytest.approx(ratio, rel=0.1)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    likeliest = LOGITS.softmax(-1).sort(descending=True).values.cumsum(-1)
    found = frequencies(Sampling(temperature=1.0, top_p=float(likeliest[1]) - 1e-3))
    assert set(found) == {1, 5}
    found = frequencies(Sampling(temperature=1.0, top_p=float(likeliest[1]) + 1e-3))
    assert set(found) == {1, 5, 3}


def test_a_tiny_top_p_is_greedy():
    assert frequencies(Sampling(temperature=1.0, top_p=1e-9)) == {1: 1.0}


@settings(max_examples=50, deadline=None)
@given(
    temperatures=st.lists(st.sampled_from([0.0, 0.7, 1.0]), min_size=1, max_size=8),
    ks=st.lists(st.sampled_from([0, 1, 5]), min_size=8, max_size=8),
    ps=st.lists(st.sampled_from([0.3, 0.9, 1.0]), min_size=8, max_size=8),
)
def test_a_row_gets_the_token_that_it_gets_alone(temperatures, ks, ps):
    count = len(temperatures)
    samplings = [
        Sampling(temperature=t, top_k=k, top_p=p)
        for t, k, p in zip(temperatures, ks, ps, strict=False)
    ]
    logits = torch.randn(count, 50, generator=torch.Generator().manual_seed(count)) * 3
    together = sample(logits, samplings, DRAWS[:count])
    alone = [
        sample(logits[i : i + 1], [samplings[i]], [DRAWS[i]])[0] for i in range(len(samplings))
    ]
    assert together == alone


def test_the_highest_draw_never_passes_the_last_token():
    sampling = Sampling(temperature=1.0, top_k=3)
    assert sample(LOGITS[None], [sampling], [1 - 2**-53]) == [3]


def test_what_is_cut_has_no_weight():
    weights, ids = probabilities(LOGITS[None], [Sampling(temperature=1.0, top_k=3)])
    assert ids[0].tolist() == [1, 5, 3]
    assert (weights > 0).all()


def test_a_seed_keys_the_draws_and_without_one_the_id_does():
    seeded = [Request(id=i, prompt=(1,), sampling=Sampling(seed=7)) for i in "ab"]
    plain = [Request(id=i, prompt=(1,)) for i in "ab"]
    assert draw_key(seeded[0]) == draw_key(seeded[1])
    assert len({draw_key(request) for request in [*seeded, *plain]}) == 3
