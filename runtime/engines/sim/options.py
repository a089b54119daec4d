"""What an instance of the simulator can be told."""

import dataclasses

from sagec.runtime.cost import NUMBERS, Fit, StepCost, read_fit
from sagec.runtime.engines import EngineError, InstanceSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """cost: of its steps. link_bytes_per_s, link_latency_us: of KV that leaves it, to another
    instance or to host memory. cache: whether KV of finished requests is kept for those that come.
    eviction: the policy by which it goes. round_us: what planning takes, by which the steps of a
    new plan begin later.
    """

    cost: StepCost
    link_bytes_per_s: float = 2.5e10
    link_latency_us: float = 20.0
    cache: bool = False
    eviction: str = "lru"
    round_us: int = 0


def read_options(spec: InstanceSpec) -> Options:
    """The options of `spec`, all given as text. Raises EngineError for one that is wrong."""
    costs = dict.fromkeys(NUMBERS, 0.0) | {"flops_per_s": 1e12, "bytes_per_s": 1e11}
    costs["overhead_us"] = 100.0
    known = [*NUMBERS, "fit", "link_bytes_per_s", "link_latency_us", "round_us"]
    known += ["prefix_cache", "eviction"]
    others: dict[str, float] = {}
    for name, text in spec.options.items():
        if name not in known:
            listed = ", ".join(known)
            raise EngineError(f"instance {spec.id!r}: sim has no option {name!r}; it has {listed}")
        if name in costs:
            costs[name] = _number(spec, name, text)
        elif name.startswith("link_"):
            others[name] = _number(spec, name, text)
    for name in ("flops_per_s", "bytes_per_s"):
        if not costs[name]:
            raise EngineError(f"instance {spec.id!r}: {name}={spec.options[name]!r}: more than 0")
    if others.get("link_bytes_per_s") == 0:
        raise EngineError(f"instance {spec.id!r}: link_bytes_per_s='0': more than 0")
    cache = spec.options.get("prefix_cache", "off")
    if cache not in ("on", "off"):
        raise EngineError(f"instance {spec.id!r}: prefix_cache={cache!r}: on or off")
    return Options(
        cost=StepCost(**costs, fit=_fit(spec)),
        cache=cache == "on",
        eviction=spec.options.get("eviction", "lru"),
        round_us=round(_number(spec, "round_us", spec.options.get("round_us", "0"))),
        **others,
    )


def _fit(spec: InstanceSpec) -> Fit | None:
    if (text := spec.options.get("fit")) is None:
        return None
    try:
        return read_fit(text)
    except ValueError as error:
        raise EngineError(
            f"instance {spec.id!r}: fit: {error}; a cluster.device with a profile makes one"
        ) from None


def _number(spec: InstanceSpec, name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not 0 <= number < float("inf"):
        raise EngineError(f"instance {spec.id!r}: {name}={text!r}: a number, 0 or more")
    return number
