"""How prompts are cut into chunks."""

from __future__ import annotations

import numpy as np

from sagec.runtime.direct.columns import Ints, Lists


def whole(begin: Ints, end: Ints) -> Lists:
    """The bounds of prompts that are one chunk each."""
    values = np.empty(2 * len(begin), np.int64)
    values[0::2], values[1::2] = begin, end
    return Lists(np.arange(0, 2 * len(begin) + 1, 2), values)


def bounds_of(begin: Ints, end: Ints, most: Ints) -> Lists:
    """Where the chunks of [begin, end) begin and end, none longer than `most` (0: no bound).

    >>> bounds_of(np.array([0, 16]), np.array([96, 20]), np.array([64, 0])).values
    array([ 0, 64, 96, 16, 20])
    """
    if not np.count_nonzero((end - begin > most) & (most > 0)):
        return whole(begin, end)
    most = np.where(most > 0, most, end - begin)
    counts = -(-(end - begin) // most)
    offsets = np.concatenate([[0], np.cumsum(counts + 1)])
    row = np.repeat(np.arange(len(begin)), counts + 1)
    index = np.arange(offsets[-1]) - offsets[row]
    values = np.minimum(begin[row] + index * most[row], end[row])
    return Lists(offsets, values)
