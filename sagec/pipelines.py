"""Named pipelines: passes in an order that works, and why that order."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Pipeline:
    """Passes as the command line spells them, and the reason of their order."""

    text: str
    reason: str


_PLACED = "match-prefix,insert-transfers,chunk-prefill,assign-kv,fuse-steps,legalize"

PIPELINES: dict[str, Pipeline] = {
    "serve": Pipeline(
        f"order,apply-decision,separate-phases,select-device,{_PLACED}",
        "a file: order first, for the other passes read values that were made before; decisions "
        "before phases, so that only admitted requests count as needs; places before "
        "matches, for only what an instance has itself is of use there, and before transfers; "
        "chunks and blocks before steps; legality last, on what will run",
    ),
    "round": Pipeline(
        f"apply-decision,select-device,{_PLACED}",
        "a scheduling round: as serve, without order, for the builder writes in order, and without "
        "separate-phases: phases say what a graph needs before it has a place, to whoever sizes a "
        "cluster; plans do not depend on them, and a round has no time for what nobody reads",
    ),
    "offline": Pipeline(
        f"order,apply-decision,separate-phases,select-device{{method=solve}},{_PLACED}",
        "a file with time to spare: as serve, and a solver places the requests",
    ),
    "check": Pipeline(
        "order,apply-decision",
        "only what can be wrong before anything is placed",
    ),
    "exec": Pipeline(
        "require-exec,overlap-communication{micro_batches=2},fuse-communication,prefetch-kv,"
        "plan-memory",
        "operators: that there are some comes first, for without any the others have nothing to do "
        "and say nothing; overlap before fusing, for a fused message comes when its last part "
        "does, and hides behind less; only what overlap leaves beside each other is fused. KV is "
        "fetched ahead of the order that came of that; memory last, for its plan holds for one "
        "order",
    ),
}
"""A name of `sagec opt -p` and `sagec compile --pipeline`."""

_WORD = re.compile(r'\{(?:"(?:\\.|[^"\\])*"|[^}"])*\}|[\w-]+(?!\{)')
"""Options in braces, or a name without any."""


def expanded(text: str) -> str:
    """The text with the passes of each named pipeline in its place.

    >>> expanded("check,legalize")
    'order,apply-decision,legalize'
    """

    def passes(word: re.Match[str]) -> str:
        named = PIPELINES.get(word[0])
        return word[0] if named is None else named.text

    return _WORD.sub(passes, text)


DEFAULT = "serve"
