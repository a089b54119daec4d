"""What one operator costs: a roofline over a device, and alpha-beta over a link.

An operator takes as long as its arithmetic or its memory traffic, whichever is longer, and the time
to launch it. A message takes a latency a hop and its bytes over the bandwidth. Microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What computes. launch_us: of each operator, whatever its size."""

    flops_per_s: float
    bytes_per_s: float
    launch_us: float = 2.0

    def operator_us(self, flops: float, moved_bytes: float) -> float:
        """An operator of so much arithmetic and memory traffic.

        >>> Device(1e12, 1e11, 0.0).operator_us(flops=2e6, moved_bytes=1e4)
        2.0
        """
        return self.launch_us + 1e6 * max(flops / self.flops_per_s, moved_bytes / self.bytes_per_s)


@dataclass(frozen=True)
class Link:
    """What carries messages between two devices, in each direction; a ring of such links carries
    collectives."""

    bytes_per_s: float
    latency_us: float

    def send_us(self, num_bytes: float) -> float:
        """A message of so many bytes."""
        return self.latency_us + 1e6 * num_bytes / self.bytes_per_s

    def all_gather_us(self, num_bytes: float, ranks: int) -> float:
        """Each rank gets all of `num_bytes`, of which each had its share: ranks - 1 hops."""
        return (ranks - 1) * self.send_us(num_bytes / ranks)

    def reduce_scatter_us(self, num_bytes: float, ranks: int) -> float:
        """Each rank gets its share of the sum of all ranks' `num_bytes`."""
        return self.all_gather_us(num_bytes, ranks)

    def all_reduce_us(self, num_bytes: float, ranks: int) -> float:
        """Each rank gets the sum of all ranks' `num_bytes`: a reduce-scatter and an all-gather.

        >>> Link(1e9, 5.0).all_reduce_us(1e6, ranks=2)
        1010.0
        """
        return 2 * self.all_gather_us(num_bytes, ranks)
