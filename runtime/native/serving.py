"""Requests served in the library: what is covered, and its columns as what a loop would say."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sagec.runtime.direct.cluster import Abilities, Cluster
from sagec.runtime.direct.planner import DirectPlanner
from sagec.runtime.engines import InstanceSpec
from sagec.runtime.engines.sim.network import Network
from sagec.runtime.engines.sim.options import Options, read_options
from sagec.runtime.loop import Finished, Instance, Planner, refusal_of
from sagec.runtime.meter import InstanceUse, Meter
from sagec.runtime.native import problem
from sagec.runtime.native.library import NotCovered, Run, load
from sagec.runtime.native.rounds import Rounds
from sagec.runtime.report import RequestReport
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.state import UNBOUNDED
from sagec.runtime.strategies import Strategy
from sagec.runtime.strategies._room import too_long
from sagec.runtime.strategies.fifo import Fifo
from sagec.runtime.timeline import Move

MODES = ("strict", "time-share", "hybrid")
"""By the numbers that the library has for them."""

_SERVED, _REFUSED, _TOO_LONG = range(3)
"""Endings, by the numbers that the library has for them."""

_NEVER = -(2**63)
"""The library's time of what never was."""


@dataclass(frozen=True)
class Served:
    """What came of a run: what the executor would have yielded, and a meter that heard all of it.

    end_us: when it was over. wall_s: how long it took to simulate, without compiling.
    """

    ended: list[Finished]
    meter: Meter
    end_us: int
    wall_s: float


def serve(
    requests: Sequence[Request],
    strategy: Strategy,
    planner: Planner,
    direct: DirectPlanner | None,
    specs: Sequence[InstanceSpec],
    members: Sequence[Instance],
    network: Network,
) -> Served:
    """Serve the requests on simulated instances, which come up at 0.

    planner: of the rounds that `direct` does not cover; None: it covers none. specs: of the
    instances as `SimCluster` takes them; members: what a loop is told of these. Raises NotCovered,
    Unbuilt, CoreError, what the planner raises, and EngineError for an option that is wrong.
    """
    options = [read_options(spec) for spec in specs]
    direct = _covered_planner(strategy, direct)
    _check_instances(direct.cluster, specs, members, options)
    load()
    begin_s = time.perf_counter()
    in_order = sorted(requests, key=lambda request: request.arrival_us)
    refused = _refused(in_order, members)
    names = [spec.id for spec in specs]
    cached_block = _cached_block(specs, options)
    blocks = problem.Blocks(in_order, cached_block) if cached_block else None
    columns = {
        **problem.engine_columns(specs, options),
        **problem.planned_columns(direct.cluster),
        **problem.network_columns(network, names),
        **problem.request_columns(in_order, refused),
        **(blocks.columns if blocks else problem.no_blocks(in_order)),
        "mode": problem.ints([MODES.index(direct.mode)]),
        "chunk": problem.ints([direct.chunk]),
        "horizon": problem.ints([direct.horizon]),
    }
    with Run(columns) as run:
        rounds = Rounds(run, in_order, strategy, planner, members)
        run.ask(rounds.plan, blocks.of if blocks else None)
        run.serve()
        ended = _ended(run, in_order, refused, names, _rooms(members))
        meter, end_us = _meter(run, in_order, names), int(run.ints("now_us")[0])
        return Served(ended, meter, end_us, time.perf_counter() - begin_s)


def _covered_planner(strategy: Strategy, direct: DirectPlanner | None) -> DirectPlanner:
    """Raises NotCovered where somebody decides or plans in another way."""
    if type(strategy) is not Fifo:
        raise NotCovered(f"strategy {strategy.name!r}; fifo is")
    if direct is None or direct.mode not in MODES:
        raise NotCovered("rounds that are not planned directly")
    return direct


def _check_instances(
    cluster: Cluster,
    specs: Sequence[InstanceSpec],
    members: Sequence[Instance],
    options: Sequence[Options],
) -> None:
    """Raise NotCovered for a cluster that is not of the usual kind."""
    names = tuple(spec.id for spec in specs)
    if not cluster.only_model or len({member.model for member in members}) > 1:
        raise NotCovered("several models")
    if cluster.names != names or tuple(member.id for member in members) != names:
        raise NotCovered("plans for other instances than there are")
    for placed, spec in zip(cluster.instances, specs, strict=True):
        if (placed.kv_blocks, placed.block_tokens) != (spec.kv_blocks, spec.block_tokens):
            raise NotCovered("plans for instances of another size")
        if not _is_plain(cluster.abilities.get(placed.name)):
            raise NotCovered(f"plans after the rules of engine {placed.engine!r}")
    if other := {one.eviction for one in options if one.cache} - {"lru"}:
        raise NotCovered(f"eviction {min(other)!r}; lru is")


def _is_plain(ability: Abilities | None) -> bool:
    """Whether the engine takes all that the planner makes for requests without adapters."""
    return (
        ability is not None
        and ability.chunks_prompts
        and not ability.partial_prefills
        and ability.holds_empty_steps
        and (ability.keeps_prefixes or ability.swaps)
    )


def _refused(requests: Sequence[Request], members: Sequence[Instance]) -> dict[str, str]:
    """Requests that cannot be served as they ask, and why. Raises NotCovered for those that ask
    for what is unusual."""
    if len({request.id for request in requests}) < len(requests):
        raise NotCovered("requests of the same id")
    models = {member.model for member in members}
    refused = {}
    for request in requests:
        if request.adapter or request.timeout_us is not None:
            raise NotCovered("adapters" if request.adapter else "timeouts")
        if request.max_output_tokens is not None and request.max_output_tokens >= UNBOUNDED:
            raise NotCovered("an output of 2^31 tokens or more")
        if why := refusal_of(request, request.model or members[0].model, models):
            refused[request.id] = why
    return refused


def _cached_block(specs: Sequence[InstanceSpec], options: Sequence[Options]) -> int | None:
    """Tokens of a block where prefixes are cached; None: they are not."""
    pairs = zip(specs, options, strict=True)
    sizes = {spec.block_tokens for spec, one in pairs if one.cache}
    if len(sizes) > 1:
        raise NotCovered("prefix caches with blocks of several sizes")
    return sizes.pop() if sizes else None


def _rooms(members: Sequence[Instance]) -> int:
    """Tokens that a request may have at most: the largest instance of each role holds them."""
    rooms = {"prefill": 0, "decode": 0}
    for member in members:
        capability = member.capability
        for role in rooms:
            if member.role in (role, "both"):
                tokens = capability.kv_blocks * capability.block_tokens
                rooms[role] = max(rooms[role], tokens)
    return min(rooms.values())


def _ended(
    run: Run,
    requests: Sequence[Request],
    refused: Mapping[str, str],
    names: Sequence[str],
    room_tokens: int,
) -> list[Finished]:
    """A `Finished` for each request, in the order of their ends."""
    columns = (
        *("request", "ending", "prompt_tokens", "remaining_tokens", "output_tokens", "end_us"),
        *("admitted_us", "first_token_us", "last_token_us", "preemptions", "reused_tokens"),
    )
    begins = run.ints("ran_on.at").tolist()
    ran_on = [names[at] for at in run.ints("ran_on").tolist()]
    places = [tuple(ran_on[a:b]) for a, b in itertools.pairwise(begins)]
    ended = []
    rows = zip(*(run.ints(name).tolist() for name in columns), places, strict=True)
    for number, ending, prompt, left, output, end, admitted, first, last, times, reused, on in rows:
        request, detail = requests[number], ""
        if ending == _REFUSED:
            detail = refused[request.id]
        elif ending == _TOO_LONG:
            detail = too_long(prompt, left, room_tokens)
        reason = FinishReason.LENGTH if ending == _SERVED else FinishReason.REJECTED
        report = RequestReport(
            request_id=request.id,
            reason=reason,
            prompt_tokens=len(request.prompt),
            output_tokens=output,
            arrival_us=request.arrival_us,
            end_us=end,
            admitted_us=None if admitted == _NEVER else admitted,
            first_token_us=None if first == _NEVER else first,
            last_token_us=None if last == _NEVER else last,
            preemptions=times,
            instances=on,
            reused_tokens=reused,
        )
        ended.append(Finished(request.id, reason, detail, report))
    return ended


_USES = (
    *("busy_us", "steps", "prompt_tokens", "decode_tokens", "sampled_tokens", "reused_tokens"),
    "sent_bytes",
)


def _meter(run: Run, requests: Sequence[Request], names: Sequence[str]) -> Meter:
    """A meter as if it had heard the run."""
    meter = Meter(names)
    meter.rounds_us = run.ints("rounds.us").tolist()
    meter.waiting = run.ints("rounds.waiting").tolist()
    meter.running = run.ints("rounds.running").tolist()
    uses = {name: run.ints(f"uses.{name}").tolist() for name in _USES}
    pairs = run.floats("uses.pairs").tolist()
    reporter, ends_us = run.ints("reports.instance"), run.ints("reports.end_us")
    kv_blocks = run.ints("reports.kv_blocks")
    for at, name in enumerate(names):
        meter.instances[name] = InstanceUse(
            **{use: column[at] for use, column in uses.items()},
            pairs=pairs[at],
            ends_us=ends_us[reporter == at].tolist(),
            kv_blocks=kv_blocks[reporter == at].tolist(),
        )
    meter.moves = _moves(run, requests, names)
    return meter


def _moves(run: Run, requests: Sequence[Request], names: Sequence[str]) -> list[Move]:
    """KV that went between instances, in the order in which it came there."""
    columns = ("request", "source", "target", "bytes", "begin_us", "end_us")
    rows = zip(*(run.ints(f"moves.{name}").tolist() for name in columns), strict=True)
    return [
        Move(
            request_id=requests[request].id,
            source=names[source],
            target=names[target],
            num_bytes=num_bytes,
            begin_us=begin_us,
            end_us=end_us,
        )
        for request, source, target, num_bytes, begin_us, end_us in rows
    ]
