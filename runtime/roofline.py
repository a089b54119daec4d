"""What one operator costs: a roofline over a device, and alpha-beta over a link.

An operator takes as long as its arithmetic or its memory traffic, whichever is longer, and a time
to begin. A message takes a latency a hop and its bytes over the bandwidth. Microseconds.

Efficiency by size is in both as Hockney's line t = t0 + n / r (R. Hockney, "The science of computer
benchmarking"): the rate that n units see is r * n / (n + t0 * r), half of r at the size t0 * r. The
rate r that large operators reach is a share of the data sheet's peak; see `SUSTAINED_FLOPS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

SUSTAINED_FLOPS = 0.7
"""Of the peak, what the large matrix products of a prefill reach: prefills of 4096 tokens of
7B to 13B models reach 0.7 of an A100's dense bf16 peak and 0.53 to 0.62 of an H100's."""

SUSTAINED_BYTES = 0.8
"""Of the peak, what reading weights and KV is taken to reach: about what a large copy does."""


@dataclass(frozen=True)
class Device:
    """What computes. flops_per_s, bytes_per_s: as the data sheet says. launch_us: of each operator,
    whatever its size. sustained_flops, sustained_bytes: what large operators get of the former."""

    flops_per_s: float
    bytes_per_s: float
    launch_us: float = 2.0
    sustained_flops: float = SUSTAINED_FLOPS
    sustained_bytes: float = SUSTAINED_BYTES

    def operator_us(self, flops: float, moved_bytes: float) -> float:
        """An operator of so much arithmetic and memory traffic.

        >>> Device(1e12, 1e11, 0.0, 1.0, 0.8).operator_us(flops=2e6, moved_bytes=1e4)
        2.0
        """
        arithmetic_s = flops / (self.flops_per_s * self.sustained_flops)
        traffic_s = moved_bytes / (self.bytes_per_s * self.sustained_bytes)
        return self.launch_us + 1e6 * max(arithmetic_s, traffic_s)

    def efficiency(self, flops: float) -> float:
        """The share of the peak that an operator of so much arithmetic reaches, if memory does not
        bound it.

        >>> device = Device(1e12, 1e11, 2.0, sustained_flops=0.5)
        >>> device.efficiency(1e6), round(device.efficiency(1e12), 3)
        (0.25, 0.5)
        """
        return flops / self.flops_per_s / (self.operator_us(flops, 0.0) * 1e-6)


@dataclass(frozen=True)
class Link:
    """What carries messages between two devices, in each direction; a ring of such links carries
    collectives."""

    bytes_per_s: float
    latency_us: float

    @property
    def half_bytes(self) -> float:
        """The message that gets half of the bandwidth; smaller ones get less."""
        return self.latency_us * 1e-6 * self.bytes_per_s

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


def ring_of(members: Sequence[str], link_between: Callable[[str, str], Link]) -> Link:
    """A ring's hops as one link: the slowest bandwidth, and the longest latency."""
    nexts = (*members[1:], members[0])
    hops = [link_between(here, there) for here, there in zip(members, nexts, strict=True)]
    return Link(min(hop.bytes_per_s for hop in hops), max(hop.latency_us for hop in hops))
