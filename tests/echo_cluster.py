"""Clusters of echo engines in one process on a virtual clock, and what serving on them gave."""

import dataclasses

from sagec.runtime.clock import VirtualClock
from sagec.runtime.engines import Event, Failed, InstanceSpec
from sagec.runtime.engines.echo import Echo
from sagec.runtime.executor import ExecutorAPI
from sagec.runtime.loop import Finished, Instance, Planned, Token
from sagec.runtime.plan import check
from sagec.runtime.request import Request
from sagec.runtime.state import State
from sagec.runtime.strategies import create
from sagec.runtime.timeline import Timeline
from tests.direct_planner import DirectPlanner

ONE = {"x0": "both"}
SPLIT = {"p0": "prefill", "d0": "decode"}
WIDE = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}


def spec(name: str, kv_blocks: int = 40, block_tokens: int = 16, **options: str) -> InstanceSpec:
    return InstanceSpec(
        id=name,
        engine="echo",
        model="",
        kv_blocks=kv_blocks,
        block_tokens=block_tokens,
        options=options,
    )


def requests(count: int = 12, generate: int | None = 20, every_us: int = 700) -> list[Request]:
    return [
        Request(
            id=f"r{i}",
            prompt=tuple(range(i, i + 7 + i * 13 % 90)),
            max_output_tokens=generate,
            arrival_us=i * every_us,
        )
        for i in range(count)
    ]


def members(engines: dict[str, Echo], roles: dict[str, str]) -> list[Instance]:
    return [
        Instance(id=name, role=role, engine="echo", capability=engines[name].capability())
        for name, role in roles.items()
    ]


@dataclasses.dataclass
class Served:
    """What came of a run."""

    tokens: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    ends: dict[str, Finished] = dataclasses.field(default_factory=dict)
    events: list[Event] = dataclasses.field(default_factory=list)
    rounds: list[Planned] = dataclasses.field(default_factory=list)
    timeline: Timeline = dataclasses.field(default_factory=Timeline)
    clock: VirtualClock = dataclasses.field(default_factory=VirtualClock)

    @property
    def failures(self) -> list[Failed]:
        return [event for event in self.events if isinstance(event, Failed)]

    @property
    def states(self) -> list[State]:
        return [planned.state for planned in self.rounds]

    def take(self, outputs) -> "Served":
        """Note outputs; a token's index must be the number of those before it."""
        for output in outputs:
            if isinstance(output, Token):
                tokens = self.tokens.setdefault(output.request_id, [])
                assert output.index == len(tokens)
                tokens.append(output.token)
            else:
                assert output.request_id not in self.ends
                self.ends[output.request_id] = output
        return self

    def hear(self, said: object) -> None:
        if isinstance(said, Event):
            self.events.append(said)
        if isinstance(said, Planned):
            for plan in said.plans:
                check(plan)
            self.rounds.append(said)


def echo_executor(
    roles: dict[str, str], served: Served, kv_blocks: int = 40, **options: str
) -> ExecutorAPI:
    options = {"step_us": "1000", "token_us": "10", "bytes_per_s": "10000000", **options}
    engines = {name: Echo(spec(name, kv_blocks, **options), served.clock) for name in roles}
    return ExecutorAPI(
        engines,
        members(engines, roles),
        served.clock,
        watch=[served.hear, served.timeline.hear],
    )


def serve(roles, asked, planner=None, strategy="fifo", kv_blocks: int = 40, **options) -> Served:
    """Serve on a virtual clock; afterwards no engine holds anything."""
    served = Served()
    executor = echo_executor(roles, served, kv_blocks, **options)
    planner = planner or DirectPlanner()
    served.take(executor.serve(asked, create(strategy), planner))
    executor.check_integrity()
    assert {name: e.kv_blocks_used() for name, e in executor.engines.items()} == dict.fromkeys(
        roles, 0
    )
    return served
