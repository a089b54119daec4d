"""Names of blocks: a hash that stands for a block's tokens and for all tokens before them."""

import hashlib
from collections.abc import Sequence

import numpy as np

_DIGEST_BYTES = 8


def block_hashes(tokens: Sequence[int], block_tokens: int, salt: str = "") -> tuple[int, ...]:
    """Hashes of the whole blocks of `tokens`, each of which names the prefix that ends with it.

    They are 64-bit integers with a sign, the same in every process and on every machine. salt: what
    else the KV depends on (the model, an adapter). Two prefixes may share a hash, once in 2^64: who
    reuses KV compares the tokens.

    >>> a, b = block_hashes([1, 2, 3, 4, 5], 2), block_hashes([1, 2, 9, 9], 2)
    >>> len(a), a[0] == b[0], a[1] == b[1]
    (2, True, False)
    """
    count = len(tokens) // block_tokens
    flat = np.asarray(tokens[: count * block_tokens], "<i8").tobytes()
    size = 8 * block_tokens
    hashes = []
    previous = hashlib.blake2b(salt.encode(), digest_size=_DIGEST_BYTES).digest()
    for begin in range(0, len(flat), size):
        block = previous + flat[begin : begin + size]
        previous = hashlib.blake2b(block, digest_size=_DIGEST_BYTES).digest()
        hashes.append(int.from_bytes(previous, "little", signed=True))
    return tuple(hashes)
