"""Names of blocks: a hash that stands for a block's tokens and for all tokens before them."""

import hashlib
from collections.abc import Sequence

import numpy as np

_DIGEST_BYTES = 8


def block_hashes(
    tokens: Sequence[int], block_tokens: int, salt: str = "", known: Sequence[int] = ()
) -> tuple[int, ...]:
    """Hashes of the whole blocks of `tokens`, each of which names the prefix that ends with it.

    They are 64-bit integers with a sign, the same in every process and on every machine. salt: what
    else the KV depends on (the model, an adapter). known: those of the first blocks, where somebody
    has them already. Two prefixes may share a hash, once in 2^64: who reuses KV compares the
    tokens, which are the blocks' `block_contents`.

    >>> a, b = block_hashes([1, 2, 3, 4, 5], 2), block_hashes([1, 2, 9, 9], 2)
    >>> len(a), a[0] == b[0], a[1] == b[1]
    (2, True, False)
    >>> block_hashes([1, 2, 3, 4], 2, known=a[:1]) == a
    True
    """
    count = len(tokens) // block_tokens
    hashes = list(known[:count])
    if known:
        previous = known[-1].to_bytes(_DIGEST_BYTES, "little", signed=True)
    else:
        previous = hashlib.blake2b(salt.encode(), digest_size=_DIGEST_BYTES).digest()
    for block in _blocks(tokens, block_tokens, len(known)):
        previous = hashlib.blake2b(previous + block, digest_size=_DIGEST_BYTES).digest()
        hashes.append(int.from_bytes(previous, "little", signed=True))
    return tuple(hashes)


def block_contents(
    tokens: Sequence[int], block_tokens: int, salt: str = "", begin: int = 0
) -> list[bytes]:
    """The tokens of the whole blocks from number `begin` on, as bytes to compare.

    The salt is part of the first block's.

    >>> both, second = block_contents([1, 2, 3, 4, 5], 2), block_contents([1, 2, 3, 4], 2, begin=1)
    >>> len(both), both[1:] == second
    (2, True)
    """
    contents = _blocks(tokens, block_tokens, begin)
    if contents and not begin:
        contents[0] = salt.encode() + contents[0]
    return contents


def _blocks(tokens: Sequence[int], block_tokens: int, begin: int) -> list[bytes]:
    """The whole blocks from number `begin` on, 8 little-endian bytes a token."""
    count, size = len(tokens) // block_tokens, 8 * block_tokens
    flat = np.asarray(tokens[begin * block_tokens : count * block_tokens], "<i8").tobytes()
    return [flat[at : at + size] for at in range(0, len(flat), size)]
