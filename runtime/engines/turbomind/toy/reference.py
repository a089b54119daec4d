"""The toy model in Python: what toy_model.cc computes where scheduling and KV are right."""

from collections.abc import Collection, Iterable

_SEED, _MASK = 2166136261, 0xFFFFFFFF


def next_token(tokens: Iterable[int], vocab_size: int) -> int:
    """The token that follows these; all of them matter, and their order.

    >>> next_token([1, 2, 3], 1000) == next_token([1, 3, 2], 1000)
    False
    """
    return _mix(_fold(_SEED, tokens)) % vocab_size


def generate(
    prompt: Iterable[int], count: int, vocab_size: int, stop: Collection[int] = ()
) -> list[int]:
    """The output after `prompt`: `count` tokens, or those before the first that is in `stop`.

    >>> generate([5, 6], 3, 1000) == generate([5, 6], 2, 1000) + generate([5, 6], 3, 1000)[2:]
    True
    """
    folded = _fold(_SEED, prompt)
    output: list[int] = []
    while len(output) < count and (token := _mix(folded) % vocab_size) not in stop:
        output.append(token)
        folded = _fold(folded, (token,))
    return output


def _fold(folded: int, tokens: Iterable[int]) -> int:
    """Each token's slot holds it, plus one, in its first and its last word."""
    for token in tokens:
        word = token + 1
        folded = ((folded ^ word) * 16777619 + word) & _MASK
    return folded


def _mix(folded: int) -> int:
    """All bits of the hash depend on all of it: the low ones alone would not."""
    folded = ((folded ^ folded >> 16) * 0x85EBCA6B) & _MASK
    folded = ((folded ^ folded >> 13) * 0xC2B2AE35) & _MASK
    return folded ^ folded >> 16
