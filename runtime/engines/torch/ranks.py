"""What the ranks of one instance tell each other while they compute a step: collectives over gloo.

A process may be rank 0 of several instances, so each has a process group of its own and none is
torch's default one. Ranks find each other through a file and talk over the loopback interface.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed

MOST_WAIT = timedelta(seconds=120)
"""For the slowest rank of a collective; one that takes longer counts as lost."""

ADDRESS = "127.0.0.1"

_distributed: Any = torch.distributed  # Its type hints leave out what is made in C++.


class RankLost(RuntimeError):
    """Another rank of the instance has gone, or does not answer."""


class Work(Protocol):
    """A message under way. wait: until it is done; raises RankLost."""

    def wait(self) -> None: ...


@dataclass(frozen=True)
class RankStatistics:
    """What one rank told the others. A message may carry several tensors.

    sent_bytes: of the tensors that it gave, not what the algorithm makes of them on the wire.
    waited_us: how long it stood still for messages; one that runs beside compute costs less.
    """

    messages: int
    tensors: int
    sent_bytes: int
    waited_us: float


class Ranks:
    """One rank of `size`, connected to the others. All call the same methods in the same order.

    Tensors of one message have one dtype. All methods raise RankLost where a rank is gone.
    """

    def __init__(self, meeting: Path, rank: int, size: int) -> None:
        """Meet the others, who name the same file `meeting`; waits for them."""
        self.rank, self.size = rank, size
        self._messages = self._tensors = self._sent_bytes = 0
        self._waited_s = 0.0
        gloo = _distributed.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=ADDRESS)]
        options._timeout = MOST_WAIT
        try:
            store = _distributed.FileStore(str(meeting), size)
            self._group = gloo(store, rank, size, options)
        except RuntimeError as error:
            raise RankLost(f"rank {rank} does not find the others: {_one_line(error)}") from None

    def all_reduce(self, tensors: Sequence[torch.Tensor]) -> None:
        """Each tensor becomes its sum over the ranks; all of them go in one message."""
        self.begin_all_reduce(tensors).wait()

    def begin_all_reduce(self, tensors: Sequence[torch.Tensor]) -> Work:
        """As `all_reduce`, beside what is computed meanwhile: the tensors are sums after `wait`."""
        self._count(tensors)
        if len(tensors) == 1 and tensors[0].is_contiguous():
            return _AllReduce(self, self._begin("allreduce", [tensors[0]]), (), None)
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        return _AllReduce(self, self._begin("allreduce", [flat]), tensors, flat)

    def all_gather(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """All ranks' tensors, which have one shape, one behind the other along `axis`."""
        self._count([tensor])
        whole = tensor.new_empty((self.size, *tensor.shape))
        self.wait_for(self._begin("allgather", [list(whole)], [tensor.contiguous()]))
        return torch.cat(list(whole), dim=axis) if axis else whole.flatten(0, 1)

    def reduce_scatter(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """This rank's share, along `axis`, of the sum; the axis splits evenly over the ranks."""
        self._count([tensor])
        parts = [part.contiguous() for part in tensor.chunk(self.size, dim=axis)]
        share = torch.empty_like(parts[self.rank])
        self.wait_for(self._begin("reduce_scatter", [share], [parts]))
        return share

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Give a tensor to one other rank, which calls `recv`."""
        self._count([tensor])
        self.wait_for(self._begin("send", [tensor.contiguous()], to, _TAG))

    def recv(self, like: torch.Tensor, source: int) -> torch.Tensor:
        """What rank `source` sends: a new tensor of the shape and dtype of `like`."""
        received = torch.empty_like(like, memory_format=_PLAIN)
        self.wait_for(self._begin("recv", [received], source, _TAG))
        return received

    def statistics(self) -> RankStatistics:
        """What this rank has sent, and waited, since it met the others."""
        return RankStatistics(
            self._messages, self._tensors, self._sent_bytes, round(self._waited_s * 1e6, 1)
        )

    def wait_for(self, work: Any) -> None:
        """Wait for a message of the process group, and count the time."""
        begin_s = time.perf_counter()
        try:
            with self._losing():
                work.wait()
        finally:
            self._waited_s += time.perf_counter() - begin_s

    def _begin(self, operation: str, *arguments: Any) -> Any:
        """Begin an operation of the process group."""
        with self._losing():
            return getattr(self._group, operation)(*arguments)

    @contextmanager
    def _losing(self) -> Iterator[None]:
        """Name the error of a group of which a rank is gone."""
        try:
            yield
        except RuntimeError as error:
            raise RankLost(f"rank {self.rank} lost another: {_one_line(error)}") from None

    def _count(self, tensors: Sequence[torch.Tensor]) -> None:
        self._messages += 1
        self._tensors += len(tensors)
        self._sent_bytes += sum(tensor.nbytes for tensor in tensors)


_PLAIN, _TAG = torch.contiguous_format, 0


@dataclass(frozen=True)
class _AllReduce:
    """flat: the tensors one behind the other, where they had to be put together."""

    ranks: Ranks
    work: Any
    tensors: Sequence[torch.Tensor]
    flat: torch.Tensor | None

    def wait(self) -> None:
        """Until each tensor holds its sum."""
        self.ranks.wait_for(self.work)
        if self.flat is not None:
            begin = 0
            for tensor in self.tensors:
                end = begin + tensor.numel()
                tensor.copy_(self.flat[begin:end].view(tensor.shape))
                begin = end


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
