"""chunk-prefill: no step computes more of a prompt than a bound."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass

from sagec.dialects import pd
from sagec.dialects.columns import Ints, ListsAttr
from sagec.passes import flow
from sagec.passes.errors import PassError
from sagec.runtime.direct import chunking


@dataclass(frozen=True)
class ChunkPrefillPass(ModulePass):
    """Cut prompts into chunks of at most `tokens`; 0 leaves each whole.

    `prefill [0, 1024) --> prefill [0, 512) [512, 1024)` with `tokens=512`

    A bound in the source wins: `chunk` of the pd.prefill, then `chunk` of the request. Tokens that
    have KV already are not computed again. fuse-steps may cut a chunk where a step is full.
    """

    name = "chunk-prefill"
    tokens: int = 0

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        if self.tokens < 0:
            raise PassError(f"chunk-prefill: tokens={self.tokens}; 0 (whole prompts) or more")
        for graph in flow.graphs(op):
            for prefill in flow.ops_of(graph, pd.PrefillOp):
                if prefill.bounds is None:
                    chunk(prefill, self.tokens)


def chunk(prefill: pd.PrefillOp, tokens: int) -> None:
    """Write the bounds of each row's chunks into `prefill`."""
    rows = flow.table(prefill.wave)
    most = prefill.chunk_tokens or tokens
    begin = rows.computed + rows.cached
    if most or rows.chunk.any():
        bounds = bounds_of(begin, rows.prompt, np.where(rows.chunk > 0, rows.chunk, most))
    else:
        bounds = whole(begin, rows.prompt)
    prefill.properties["bounds"] = bounds


def whole(begin: Ints, end: Ints) -> ListsAttr:
    """The bounds of prompts that are one chunk each."""
    return ListsAttr.from_offsets(*chunking.whole(begin, end))


def bounds_of(begin: Ints, end: Ints, most: Ints) -> ListsAttr:
    """Where the chunks of [begin, end) begin and end, none longer than `most` (0: no bound).

    >>> bounds_of(np.array([0, 16]), np.array([96, 20]), np.array([64, 0])).rows()
    [[0, 64, 96], [16, 20]]
    """
    return ListsAttr.from_offsets(*chunking.bounds_of(begin, end, most))
