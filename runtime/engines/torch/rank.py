"""One rank's part in all that an instance computes and moves.

Every rank calls the same methods in the same order. Rank 0 is in the engine's process: what it is
asked it tells the others first, who do the same, so that collectives meet.
"""

import math
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from sagec.runtime.engines.torch.batch import Cut, Span, Tables, build_batch, cut
from sagec.runtime.engines.torch.model import Model
from sagec.runtime.engines.torch.program import MODULE
from sagec.runtime.engines.torch.rank_processes import RankProcesses
from sagec.runtime.engines.torch.ranks import RankLost, Ranks


@dataclass(frozen=True)
class Compute:
    """Tells a rank to compute a step."""

    spans: Sequence[Span]
    tables: Cut


@dataclass(frozen=True)
class Read:
    """Tells a rank to give its part of some blocks' KV."""

    blocks: list[int]


@dataclass(frozen=True)
class Write:
    """Tells a rank to take its part of some blocks' KV."""

    blocks: list[int]


Message = Compute | Read | Write

_TOLD = (RuntimeError, MemoryError, OSError)
"""What torch and the sockets raise; it says by itself what was wrong."""


class StepFailed(RuntimeError):
    """A step that a wrong program, or wrong code of ours, did not come through."""

    @staticmethod
    def by(error: Exception) -> "StepFailed":
        """With what was raised, and where: the last line of the program, if it came that far."""
        frames = list(traceback.walk_tb(error.__traceback__))
        of_program = [at for at in frames if at[0].f_globals.get("__name__") == MODULE]
        frame, line = (of_program or frames)[-1]
        words = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return StepFailed(f"{frame.f_code.co_filename}:{line}: {words}")


class Rank:
    """The model's share of this process. others: the processes of ranks 1 and on, in rank 0."""

    def __init__(self, model: Model, others: RankProcesses | None = None) -> None:
        self.model = model
        self.others = others
        _, block_tokens, _, kv_heads, head_dim = model.kv[0].shape
        size = 1 if model.ranks is None else model.ranks.size
        self.block_shape = (block_tokens, 2, kv_heads * size, head_dim)
        """A layer's KV of a block, of all ranks' heads."""

    @property
    def block_bytes(self) -> int:
        """KV of a block in all layers, of all ranks' heads."""
        return len(self.model.kv) * math.prod(self.block_shape) * self.model.kv[0].element_size()

    @property
    def device(self) -> torch.device:
        """Where the rank computes."""
        return self.model.kv[0].device

    def compute(self, spans: Sequence[Span], tables: Tables) -> tuple[torch.Tensor, Sequence[int]]:
        """Compute a step: logits [S, vocab] of those that sample, and which spans these are."""
        message = Compute(*cut(spans, tables)) if self.others else None
        with self._together(message):
            kernels = self.model.kernels
            short, padded = kernels.short_tokens, kernels.padded
            batch = build_batch(spans, tables, self.device, short, padded)
            # Of the last rank's rows of the output head, those beyond the vocabulary are no tokens.
            logits = self.model.forward(batch)[:, : self.model.config.vocab]
            return logits, batch.samplers

    def read_kv(self, blocks: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """KV of `blocks`, [layers, blocks, *block_shape], in host memory: `out`, or a new tensor.

        Of ranks other than 0 it is their own part.
        """
        kv = self.model.kv
        if self.model.ranks is not None:
            with self._together(Read(blocks.tolist())):
                mine = torch.stack([layer.index_select(0, blocks) for layer in kv])
                return self._gathered(self.model.ranks, mine, out)
        if out is None:
            out = torch.empty((len(kv), len(blocks), *self.block_shape), dtype=kv[0].dtype)
        for layer, target in zip(kv, out, strict=True):
            if layer.device.type == "cpu":
                torch.index_select(layer, 0, blocks, out=target)
            else:
                target.copy_(layer.index_select(0, blocks))
        return out

    def write_kv(self, blocks: torch.Tensor, source: torch.Tensor | None = None) -> None:
        """Copy what `read_kv` gave into `blocks`; rank 0 has it and gives the others their part."""
        if self.model.ranks is not None:
            with self._together(Write(blocks.tolist())):
                source = self._scattered(self.model.ranks, len(blocks), source)
        assert source is not None
        for layer, part in zip(self.model.kv, source, strict=True):
            layer.index_copy_(0, blocks, part.to(layer.device))

    def check(self) -> None:
        """Raise RankLost where another rank has ended."""
        if self.others is not None:
            try:
                self.others.check()
            except RankLost as error:
                raise self.others.end(error) from None

    def close(self) -> None:
        """Free the KV and end the other ranks."""
        if self.others is not None:
            self.others.close()
        self.model.kv.clear()

    def obey(self, message: Message) -> None:
        """Do what rank 0 does."""
        match message:
            case Compute():
                self.compute(message.spans, message.tables)
            case Read():
                self.read_kv(torch.tensor(message.blocks, dtype=torch.int64))
            case Write():
                self.write_kv(torch.tensor(message.blocks, dtype=torch.int64))

    @contextmanager
    def _together(self, message: Message | None) -> Iterator[None]:
        """Tell the others, if this is rank 0; where anything fails then, end them and say why.

        A program is code from a file and may raise anything; all of it is a RuntimeError here.
        """
        try:
            if self.others is not None and message is not None:
                self.others.tell(message)
            yield
        except Exception as error:
            told = error if isinstance(error, _TOLD) else StepFailed.by(error)
            raise (told if self.others is None else self.others.end(told)) from None

    def _gathered(self, ranks: Ranks, mine: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        if ranks.rank:
            ranks.send(mine, 0)
            return mine
        others = [ranks.recv(mine, source) for source in range(1, ranks.size)]
        parts = [mine, *others]
        return torch.cat(parts, dim=-2) if out is None else torch.cat(parts, dim=-2, out=out)

    def _scattered(self, ranks: Ranks, num_blocks: int, whole: torch.Tensor | None) -> torch.Tensor:
        """The rank's own heads of rank 0's `whole`."""
        if whole is None:
            kv = self.model.kv
            like = kv[0].new_empty((len(kv), num_blocks, *kv[0].shape[1:]))
            return ranks.recv(like, 0)
        parts = whole.chunk(ranks.size, dim=-2)
        for to, part in enumerate(parts[1:], start=1):
            ranks.send(part, to)
        return parts[0]
