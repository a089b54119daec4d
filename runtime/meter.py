"""What serving used, as series over time: queues, KV, arithmetic and messages of each instance."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from sagec.runtime.engines import KVExported, KVImported, StepReport
from sagec.runtime.loop import Finished, Planned
from sagec.runtime.timeline import Move

Floats = npt.NDArray[np.float64]


@dataclasses.dataclass
class InstanceUse:
    """What one instance did.

    busy_us: in steps. sampled_tokens: of outputs. pairs: of a token with one before it, that
    attention looked at. ends_us, kv_blocks: blocks held after each report, as time went on.
    """

    busy_us: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    decode_tokens: int = 0
    sampled_tokens: int = 0
    reused_tokens: int = 0
    pairs: float = 0.0
    sent_bytes: int = 0
    ends_us: list[int] = dataclasses.field(default_factory=list)
    kv_blocks: list[int] = dataclasses.field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens that it computed."""
        return self.prompt_tokens + self.decode_tokens

    @property
    def kv_hit_rate(self) -> float:
        """Of the tokens of prompts, those that a cache had; 0.0 where there were none."""
        asked = self.reused_tokens + self.prompt_tokens
        return self.reused_tokens / asked if asked else 0.0


class Meter:
    """Hears a run, and adds up what it used.

    rounds_us, waiting, running: requests that waited and ran at each round.
    """

    def __init__(self, instances: Sequence[str]) -> None:
        self.instances = {name: InstanceUse() for name in instances}
        self.moves: list[Move] = []
        self.rounds_us: list[int] = []
        self.waiting: list[int] = []
        self.running: list[int] = []
        self._computed: dict[str, int] = {}  # of a request, tokens with KV
        self._hear_by_type: dict[type, Callable[..., None]] = {
            StepReport: self._stepped,
            Planned: self._planned,
            Finished: self._finished,
            KVExported: self._exported,
            KVImported: self._imported,
        }

    def hear(self, said: object) -> None:
        """Take note; most of what is said leaves no mark."""
        if take := self._hear_by_type.get(type(said)):
            take(said)

    def _finished(self, said: Finished) -> None:
        self._computed.pop(said.request_id, None)

    def _planned(self, said: Planned) -> None:
        self.rounds_us.append(said.state.now_us)
        self.waiting.append(len(said.state.waiting))
        self.running.append(len(said.state.running))

    def _stepped(self, report: StepReport) -> None:
        use = self.instances[report.instance]
        use.steps += report.steps
        use.busy_us += report.end_us - report.begin_us
        use.ends_us.append(report.end_us)
        use.kv_blocks.append(report.kv_blocks_used)
        for request_id, begin, end in report.chunks:
            self._computed[request_id] = end
            use.prompt_tokens += end - begin
            use.pairs += (end - begin) * (begin + end + 1) / 2
        use.sampled_tokens += len(report.tokens) + sum(count for _, _, count in report.advanced)
        for _, tokens in report.reused:
            use.reused_tokens += tokens
        use.decode_tokens += len(report.decodes) * report.steps
        for request_id in report.decodes:
            before = self._computed.get(request_id, 0)
            use.pairs += report.steps * (2 * before + report.steps + 1) / 2
            self._computed[request_id] = before + report.steps

    def _exported(self, said: KVExported) -> None:
        self.instances[said.handle.source].sent_bytes += said.handle.num_bytes

    def _imported(self, said: KVImported) -> None:
        self.moves.append(Move.of(said))


def mean_over(
    times_us: Sequence[int], values: Sequence[float], begin_us: int, end_us: int, bins: int
) -> Floats:
    """A value that stays until it is said anew, as its mean over each of `bins` spans, [bins].

    Before it is first said it is 0.

    >>> mean_over([0, 5], [2.0, 4.0], begin_us=0, end_us=10, bins=2).tolist()
    [2.0, 4.0]
    """
    edges = np.linspace(begin_us, end_us, bins + 1)
    times = np.concatenate(([-np.inf], np.asarray(times_us, np.float64)))
    known = np.concatenate(([0.0], np.asarray(values, np.float64)))
    order = np.argsort(times, kind="stable")
    times, known = times[order], known[order]
    # the integral up to a time is linear between the times at which the value changes
    corners = np.unique(np.concatenate((edges, times[(times > begin_us) & (times < end_us)])))
    held = known[np.searchsorted(times, corners, side="right") - 1]
    integral = np.concatenate(([0.0], np.cumsum(held[:-1] * np.diff(corners))))
    at_edges = np.interp(edges, corners, integral)
    width = (end_us - begin_us) / bins
    return np.diff(at_edges) / width if width else np.zeros(bins)


def share_over(spans: Sequence[tuple[int, int]], begin_us: int, end_us: int, bins: int) -> Floats:
    """How many of the spans [begin, end) are under way, as the mean over each of `bins`, [bins].

    >>> share_over([(0, 5), (0, 10)], begin_us=0, end_us=10, bins=2).tolist()
    [2.0, 1.0]
    """
    changes = sorted([(begin, 1) for begin, _ in spans] + [(end, -1) for _, end in spans])
    counts = np.cumsum([change for _, change in changes]).tolist()
    return mean_over([time for time, _ in changes], counts, begin_us, end_us, bins)
