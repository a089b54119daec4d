"""The requests on an instance, and which KV blocks they hold."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from sagec.runtime.engines.torch.model import Model
from sagec.runtime.engines.torch.pool import BlockPool
from sagec.runtime.engines.torch.row import Row
from sagec.runtime.engines.torch.sampling import draw_key
from sagec.runtime.engines.torch.text import StopStrings, TokenizerFile
from sagec.runtime.request import Request


class Refused(ValueError):
    """A request that this instance cannot serve; says why."""


@dataclass
class Residents:
    """Rows by request id; every block of `pool` is free or a row's."""

    model: Model
    pool: BlockPool
    max_context_tokens: int
    folder: Path
    rows: dict[str, Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._tokenizer = TokenizerFile(self.folder)

    def add(self, request: Request, output: tuple[int, ...] = ()) -> Row:
        """A row for `request`, without KV. Raises Refused where it cannot be served here."""
        self._check(request)
        longest = self.model.config.max_context_tokens
        if request.max_output_tokens is not None:
            longest = min(longest, len(request.prompt) + request.max_output_tokens)
        stop_strings = self._stop_strings(request)
        for token in output:
            if stop_strings is not None:
                stop_strings.push(token)
        row = self.rows[request.id] = Row(
            request=request,
            slot=self.pool.open_slot(),
            draw_key=draw_key(request),
            stops=frozenset(request.stop_tokens + self.model.config.eos_tokens),
            max_tokens=longest,
            room_tokens=self.max_context_tokens,
            stop_strings=stop_strings,
            tokens=[*request.prompt, *output],
        )
        return row

    def drop(self, row: Row) -> None:
        """Free all that the row holds and forget it."""
        del self.rows[row.id]
        self.pool.close_slot(row.slot)

    def reserve(self, row: Row, blocks: int) -> None:
        """Hold `blocks` blocks, or as many as the row's KV fills, if so many are free."""
        self.pool.grow(row.slot, max(blocks, self.pool.blocks_for(row.computed)))

    def release(self, row: Row, blocks: int) -> None:
        """Hold no more than `blocks` blocks, or as many as the row's KV fills."""
        filled = 0 if row.host_kv is not None else self.pool.blocks_for(row.computed)
        self.pool.shrink(row.slot, max(blocks, filled))

    def make_room(self, row: Row, tokens: int) -> bool:
        """Have blocks for the row's first `tokens` tokens, its KV in them; false: none are free."""
        if row.host_kv is None and tokens <= self.pool.held(row.slot) * self.pool.block_tokens:
            return True
        if not self.pool.grow(row.slot, self.pool.blocks_for(max(tokens, row.computed))):
            return False
        if row.host_kv is not None:
            blocks = self.filled(row)
            for kv, saved in zip(self.model.kv, row.host_kv, strict=True):
                kv.index_copy_(0, blocks, saved.to(kv.device))
            row.host_kv = None
        return True

    def swap_out(self, row: Row) -> None:
        """Move the row's KV to host memory and free its blocks."""
        if row.host_kv is None and row.computed:
            blocks = self.filled(row)
            row.host_kv = [kv.index_select(0, blocks).cpu() for kv in self.model.kv]
        self.pool.shrink(row.slot, 0)

    def forget_kv(self, row: Row) -> None:
        """Free the row's blocks; its tokens stay and are to be computed again."""
        row.host_kv, row.computed = None, 0
        self.pool.shrink(row.slot, 0)

    def filled(self, row: Row) -> torch.Tensor:
        """The blocks that the row's KV fills, [n]."""
        count = self.pool.blocks_for(row.computed)
        blocks = torch.from_numpy(self.pool.blocks(row.slot, count).astype("int64"))
        return blocks.to(self.model.kv[0].device)

    def _check(self, request: Request) -> None:
        vocab = self.model.config.vocab
        if not request.prompt:
            raise Refused("the prompt is empty; it needs a token at least")
        if min(request.prompt) < 0 or max(request.prompt) >= vocab:
            bad = next(token for token in request.prompt if not 0 <= token < vocab)
            raise Refused(f"prompt token {bad} is not in [0, {vocab}); another model's tokenizer?")
        if len(request.prompt) >= self.max_context_tokens:
            raise Refused(
                f"a prompt of {len(request.prompt)} tokens leaves no room for an answer in "
                f"{self.max_context_tokens} tokens of context"
            )
        if request.adapter:
            raise Refused(f"adapter {request.adapter!r}: the torch engine serves the model alone")

    def _stop_strings(self, request: Request) -> StopStrings | None:
        if not request.stop_strings:
            return None
        if "" in request.stop_strings:
            raise Refused("an empty stop string would stop before the first token; leave it out")
        try:
            return StopStrings(self._tokenizer.tokenizer, request.stop_strings)
        except ValueError as error:
            raise Refused(str(error)) from None
