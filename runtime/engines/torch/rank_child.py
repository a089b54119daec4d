"""The process of a rank other than 0: `python -m sagec.runtime.engines.torch.rank_child FD`.

It loads its share of the model, meets the others, and does what rank 0 tells it through the socket
until that closes, for the instance ends or its process has.
"""

import contextlib
import pickle
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from sagec.runtime.engines import EngineError, InstanceSpec
from sagec.runtime.engines.torch.loading import load_model, read_options
from sagec.runtime.engines.torch.rank import Rank
from sagec.runtime.engines.torch.rank_processes import LOST, READY
from sagec.runtime.engines.torch.ranks import RankLost, Ranks
from sagec.runtime.engines.torch.share import Share


def serve(connection: Connection) -> int:
    """Obey until the socket closes; the process's exit code."""
    spec, share, meeting = connection.recv()
    try:
        rank = _loaded(spec, share, meeting, connection)
        while True:
            rank.obey(pickle.loads(connection.recv_bytes()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0
    except RankLost:
        return LOST
    except EngineError as error:
        words = str(error)
    except (RuntimeError, MemoryError) as error:  # what torch raises, out of memory too
        words = f"{type(error).__name__}: {' '.join(str(error).split())}"
    with contextlib.suppress(OSError):
        connection.send_bytes(words.encode())
    return 1


def _loaded(spec: InstanceSpec, share: Share, meeting: Path, connection: Connection) -> Rank:
    """Load the share, say so, and meet the others."""
    model = load_model(spec, read_options(spec), share)
    connection.send_bytes(READY)
    model.ranks = Ranks(meeting, share.rank, share.size)
    return Rank(model)


def main() -> int:
    """Entry of the child. Its parent decides when it ends, not the terminal's Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Connection(int(sys.argv[1])) as connection:
        return serve(connection)


if __name__ == "__main__":
    sys.exit(main())
