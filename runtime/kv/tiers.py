"""Where the bytes of cached blocks are: device, host memory, a file on disk; and how they move.

The device's blocks are the pool's. Each slower tier has *places*, 0 and on, one block's bytes each.
What comes back from disk is checked: bytes that are not those that were written are no block.
"""

import os
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sagec.runtime.clock import Clock, WallClock
from sagec.runtime.kv.migration import DEVICE, DISK, HOST, TIERS

Bytes = npt.NDArray[np.uint8]


class TierError(OSError):
    """A block whose bytes cannot be written, or came back other than they were."""


class DeviceBlocks(Protocol):
    """The blocks of a device, as bytes.

    memory: host memory for blocks, [blocks, block_bytes], that the device copies to and from fast.
    save, load: the bytes of a block of the device to or from [block_bytes] of such memory.
    """

    @property
    def block_bytes(self) -> int: ...
    def memory(self, num_blocks: int) -> Bytes: ...
    def save(self, block: int, target: Bytes) -> None: ...
    def load(self, block: int, source: Bytes) -> None: ...


@dataclass(frozen=True)
class Moved:
    """What moved from one tier to another, and how long the copies took."""

    source: int
    target: int
    blocks: int
    bytes: int
    us: int

    @property
    def bytes_per_s(self) -> float:
        """Speed of the copies; 0 where nothing was measurable."""
        return 1e6 * self.bytes / self.us if self.us else 0.0


@dataclass(frozen=True)
class TierStatistics:
    """Places of the slower tiers and those in use, [host, disk]; what moved, a pair of tiers each.

    failed: blocks that could not be written, or did not come back whole.
    """

    capacity: tuple[int, int]
    used: tuple[int, int]
    moved: tuple[Moved, ...]
    failed: int


class DiskFile:
    """One file with a place a block, without a name: it goes when it is closed, however that is."""

    def __init__(self, num_blocks: int, block_bytes: int, spool: Path | None) -> None:
        """spool: the folder of the file; None: the system's for temporary files. Raises OSError."""
        # Unbuffered: what is written is read with other calls.
        self._file = tempfile.TemporaryFile(dir=spool, buffering=0)  # noqa: SIM115
        self._block_bytes = block_bytes
        self._checksums = [0] * num_blocks

    @property
    def descriptor(self) -> int:
        """The open file."""
        return self._file.fileno()

    def write(self, place: int, source: Bytes) -> None:
        """Raises TierError where the disk does not take it whole."""
        try:
            written = os.pwrite(self.descriptor, source.data, place * self._block_bytes)
        except OSError as error:
            raise TierError(f"the spool file takes no block: {error.strerror}") from None
        if written < self._block_bytes:
            raise TierError(f"the spool file took {written} of {self._block_bytes} bytes")
        self._checksums[place] = zlib.crc32(source.data)

    def read(self, place: int, target: Bytes) -> None:
        """Raises TierError where it does not read what was written."""
        try:
            count = os.preadv(self.descriptor, [target.data], place * self._block_bytes)
        except OSError as error:
            raise TierError(f"the spool file gives no block: {error.strerror}") from None
        if count < self._block_bytes or zlib.crc32(target.data) != self._checksums[place]:
            raise TierError(f"block {place} of the spool file is damaged")

    def close(self) -> None:
        """Remove the file."""
        self._file.close()


class Tiers:
    """The slower tiers of one instance's blocks, and all moves between the three.

    host_blocks, disk_blocks: their places; 0: no such tier. Raises OSError where the spool file
    cannot be made, MemoryError where the memory cannot be had.
    """

    def __init__(
        self,
        device: DeviceBlocks,
        host_blocks: int,
        disk_blocks: int = 0,
        spool: Path | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._device = device
        self._capacity = (0, host_blocks, disk_blocks)
        self._free = [list(range(count - 1, -1, -1)) for count in self._capacity]
        # The last place is where bytes pass between device and disk.
        self._memory = device.memory(host_blocks + 1)
        self._disk = DiskFile(disk_blocks, device.block_bytes, spool) if disk_blocks else None
        self._clock = clock or WallClock()
        self._moved: dict[tuple[int, int], tuple[int, int]] = {}
        self._failed = 0

    @property
    def block_bytes(self) -> int:
        """Of every block."""
        return self._device.block_bytes

    @property
    def disk(self) -> DiskFile | None:
        """The file of the disk tier; None where there is none."""
        return self._disk

    def capacity(self, tier: int) -> int:
        """Places of a slower tier."""
        return self._capacity[tier]

    def num_free(self, tier: int) -> int:
        """Free places of a slower tier."""
        return len(self._free[tier])

    def free(self, tier: int, place: int) -> None:
        """The bytes at that place of a slower tier are nobody's."""
        self._free[tier].append(place)

    def move(self, source: int, place: int, target: int, block: int | None = None) -> int:
        """Copy a block's bytes to another tier; their place there. Those here are free then.

        block: of the device, where the bytes go there; the device's own are freed by the caller.
        Raises TierError, with the bytes still here, where they cannot be written or read back;
        IndexError where a slower tier has no free place.
        """
        begin_us = self._clock.now_us()
        goal = self._free[target].pop() if block is None else block
        try:
            self._copy(source, place, target, goal)
        except TierError:
            self._failed += 1
            if target != DEVICE:
                self.free(target, goal)
            raise
        if source != DEVICE:
            self.free(source, place)
        blocks, us = self._moved.get((source, target), (0, 0))
        self._moved[source, target] = blocks + 1, us + self._clock.now_us() - begin_us
        return goal

    def statistics(self) -> TierStatistics:
        """What is where, and what moved since the tiers were made."""
        used = [count - len(free) for count, free in zip(self._capacity, self._free, strict=True)]
        return TierStatistics(
            capacity=(self._capacity[HOST], self._capacity[DISK]),
            used=(used[HOST], used[DISK]),
            moved=tuple(
                Moved(source, target, blocks, blocks * self.block_bytes, us)
                for (source, target), (blocks, us) in sorted(self._moved.items())
            ),
            failed=self._failed,
        )

    def check_integrity(self, places: tuple[set[int], set[int]]) -> None:
        """Raise AssertionError unless the used places of host and disk are those given."""
        for tier, used in zip((HOST, DISK), places, strict=True):
            if sorted([*used, *self._free[tier]]) != list(range(self._capacity[tier])):
                raise AssertionError(
                    f"{TIERS[tier]}: {self._capacity[tier]} places, {len(self._free[tier])} free, "
                    f"{len(used)} in use"
                )

    def close(self) -> None:
        """Give the file back."""
        if self._disk is not None:
            self._disk.close()

    def _copy(self, source: int, place: int, target: int, goal: int) -> None:
        """Host memory is the middle of every way; what only passes takes its last place."""
        at = {source: place, target: goal}.get(HOST, -1)
        passing = self._memory[at]
        if source == DEVICE:
            self._device.save(place, passing)
        elif source == DISK and self._disk is not None:
            self._disk.read(place, passing)
        if target == DEVICE:
            self._device.load(goal, passing)
        elif target == DISK and self._disk is not None:
            self._disk.write(goal, passing)
