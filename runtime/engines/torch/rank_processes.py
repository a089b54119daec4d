"""The ranks of an instance other than rank 0: child processes, which do what they are told.

Each runs rank_child.py; a socket carries what rank 0 tells it, and its last words. Messages are
pickles: both ends are this program.
"""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from sagec.runtime.engines import EngineError, InstanceSpec
from sagec.runtime.engines.torch.ranks import RankLost, Ranks
from sagec.runtime.engines.torch.share import Share

CLOSE_S = 5.0
"""How long a child may take to end by itself before it is told by a signal."""

LOST = 3
"""Exit code of a rank that ends because another one has."""

READY = b"ready"
"""What a child says when it has loaded its share; anything else that it says is why it ends."""

_CHILD = "sagec.runtime.engines.torch.rank_child"


class _Child:
    """One rank's process and the socket to it."""

    def __init__(self, rank: int, threads: int) -> None:
        self.rank = rank
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", _CHILD, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
        self.connection = Connection(ours.detach())

    def words(self) -> str:
        """What it said last; "" where it said nothing, or nothing but that it is ready."""
        said = b""
        with contextlib.suppress(OSError, EOFError):
            while self.connection.poll():
                said = self.connection.recv_bytes()
        return "" if said == READY else said.decode()

    def ending(self) -> str:
        """How it ended, in words; "" where it lives, or ended because another did."""
        code = self.process.poll()
        if code is None or code == LOST:
            return ""
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = self.words() or f"exited with {code}"
        return f"rank {self.rank} (process {self.process.pid}) {how}"


class RankProcesses:
    """Ranks 1 and on of an instance. They start at once and load side by side with rank 0."""

    def __init__(self, spec: InstanceSpec, size: int, threads: int) -> None:
        self._place, self._size = f"instance {spec.id!r}", size
        self._folder = tempfile.TemporaryDirectory(prefix="sagec-ranks-")
        self._meeting = Path(self._folder.name) / "meeting"
        self._children: list[_Child] = []
        self._obey = False  # whether they wait for word, and end by themselves without it
        for rank in range(1, size):
            child = _Child(rank, threads)
            self._children.append(child)
            with contextlib.suppress(OSError):  # It is gone already; `meet` will say how.
                child.connection.send((spec, Share(rank, size), self._meeting))

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the children, from rank 1 on."""
        return tuple(child.process.pid for child in self._children)

    def meet(self) -> Ranks:
        """Rank 0's connection to all others, once they have loaded their shares.

        Raises EngineError where one does not come up.
        """
        for child in self._children:
            try:
                said = child.connection.recv_bytes()
            except (OSError, EOFError):
                child.process.wait()
                said = f"{self._place}: {child.ending()}".encode()
            if said != READY:
                raise EngineError(said.decode())
        try:
            ranks = Ranks(self._meeting, 0, self._size)
        except RankLost as error:
            raise EngineError(f"{self._place}: {error}") from None
        self._obey = True
        return ranks

    def check(self) -> None:
        """Raise RankLost where a child has ended."""
        for child in self._children:
            if child.process.poll() is not None:
                raise RankLost(child.ending() or f"rank {child.rank} is gone")

    def tell(self, message: Any) -> None:
        """Have all children do something. Raises RankLost or OSError where one is gone."""
        self.check()
        payload = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        for child in self._children:
            child.connection.send_bytes(payload)

    def end(self, error: Exception) -> RuntimeError:
        """End all children at once, for rank 0 will not meet them again; the error to tell.

        error: what rank 0 ran into. Where a child was lost it is told how that ended.
        """
        is_lost = isinstance(error, RankLost | OSError)
        if is_lost:
            self._await_ended()
        endings = [ending for child in self._children if (ending := child.ending())]
        self._obey = False
        self.close()
        if is_lost and endings:
            return RankLost(endings[0])
        return error if isinstance(error, RuntimeError) else RuntimeError(str(error))

    def _await_ended(self) -> None:
        """Wait for those that are about to be gone: their sockets close before they are."""
        ended = wait([child.connection for child in self._children], CLOSE_S)
        for child in self._children:
            if child.connection in ended:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(CLOSE_S)

    def close(self) -> None:
        """End all children: those that wait for word end when the socket closes, or else by a
        signal; others, as those that load, at once."""
        for child in self._children:
            child.connection.close()
            if not self._obey:
                child.process.kill()
        for child in self._children:
            for stop in (child.process.terminate, child.process.kill, None):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(CLOSE_S)
                    break
                if stop is not None:
                    stop()
        self._folder.cleanup()
