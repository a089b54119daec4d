"""The simulated instances of one run: under one clock, over shared links, with their failures."""

from collections.abc import Sequence

from sagec.runtime.clock import Clock
from sagec.runtime.engines import Engine, EngineError, InstanceSpec
from sagec.runtime.engines.sim.engine import SimEngine
from sagec.runtime.engines.sim.network import Network
from sagec.runtime.engines.sim.outages import Outage, check


class SimCluster:
    """`engines` and `restart` are what an `ExecutorAPI` takes under these names."""

    def __init__(
        self,
        specs: Sequence[InstanceSpec],
        clock: Clock,
        network: Network | None = None,
        outages: Sequence[Outage] = (),
    ) -> None:
        """network: without, each pair of instances has a line of its own.

        Raises EngineError where an option is wrong, OutageError where the schedule is.
        """
        check(outages, [spec.id for spec in specs])
        self.specs = tuple(specs)
        self.clock, self.outages = clock, tuple(outages)
        self.network = network or Network()
        self.engines: dict[str, Engine] = {
            spec.id: SimEngine(spec, clock, self.network, self.outages) for spec in specs
        }

    def restart(self, name: str) -> SimEngine:
        """The instance again after it failed, which comes up when its schedule says.

        Raises EngineError where that is never.
        """
        now_us = self.clock.now_us()
        past = [o for o in self.outages if o.instance == name and o.fail_at_us <= now_us]
        back_us = max(past, key=lambda outage: outage.fail_at_us).back_at_us
        if back_us is None:
            raise EngineError(f"instance {name!r} never comes back, as its schedule says")
        spec = next(spec for spec in self.specs if spec.id == name)
        return SimEngine(spec, self.clock, self.network, self.outages, back_us)
