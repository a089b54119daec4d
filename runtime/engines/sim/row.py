"""A request on a simulated instance: how far it is, in tokens and blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sagec.runtime.kv.prefix_index import CachedBlock
from sagec.runtime.request import Request


@dataclass(slots=True)
class Row:
    """prompt_tokens, num_tokens: prompt, with the output. computed: of them, how many have KV here,
    or on the host while `swapped`. limit: tokens at which it ends. blocks: those that it holds, of
    which the first, `leased`, are in the prefix cache. hashes: of its prompt's blocks, once they
    were asked for.
    """

    request: Request
    prompt_tokens: int
    num_tokens: int
    limit: int
    computed: int = 0
    blocks: int = 0
    swapped: bool = False
    leased: list[CachedBlock] = field(default_factory=list)
    hashes: Sequence[int] | None = None

    @property
    def num_output(self) -> int:
        """Tokens that were generated here, or where it came from."""
        return self.num_tokens - self.prompt_tokens

    @property
    def decodes(self) -> bool:
        """Whether only the token sampled last has no KV."""
        return self.prompt_tokens <= self.computed == self.num_tokens - 1
