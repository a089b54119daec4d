"""A side of benchmarks/turbomind_gpu.py: a process of its own that serves what it is told.

It reads JSON, a line each, from standard input: first a `Setup`, then one `Workload` after the
other; and answers each with a line on standard output. Sides:

- stock: lmdeploy's own API over TurboMind as it comes, which is not even looked at;
- patched: the same, with all four patches in place; TurboMind still decides, and says what it did;
- planned: sagec's loop, strategy and compiler over the patched TurboMind, in this process;
- pair: the same over two instances, processes of their own: one prefills, the other decodes.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any, Protocol

import msgspec

from sagec.compiler import Compiler
from sagec.passes.topology import topology_of
from sagec.runtime import process, strategies
from sagec.runtime.conformance import Conformance
from sagec.runtime.engines import (
    Engine,
    EngineError,
    Failed,
    InstanceSpec,
    KVExported,
    KVImported,
    StepReport,
    create,
)
from sagec.runtime.executor import ExecutorAPI
from sagec.runtime.loop import Finished, Instance, Token
from sagec.runtime.request import Request


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What a side is made of. options: the engine's. device: as a .sage file says it."""

    side: str
    model: str
    device: str
    kv_blocks: int
    block_tokens: int
    max_batch: int
    options: dict[str, str]


class Ask(msgspec.Struct, frozen=True, array_like=True):
    """A request: so many tokens after this prompt, this long after the begin."""

    prompt: tuple[int, ...]
    generate: int
    arrival_us: int = 0


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """Requests; chunk and strategy are for the sides that plan."""

    asks: tuple[Ask, ...]
    chunk: int = 512
    strategy: str = "hybrid"


class Move(msgspec.Struct, frozen=True, array_like=True):
    """A hand-over: its bytes, and how long the export, and all until it could decode, took."""

    num_bytes: int
    export_us: int
    whole_us: int


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a workload: for each request its tokens, and when each was there.

    Times count from the begin. Steps that somebody planned: those that computed just that, those
    that did not, and those for which no decision came in time.
    """

    tokens: list[list[int]]
    times_us: list[list[int]]
    obeyed: int = 0
    deviated: int = 0
    at_deadline: int = 0
    moves: list[Move] = []


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """A line back: an answer; or none, when the side is ready; or why there is none."""

    answer: Answer | None = None
    error: str = ""


class Side(Protocol):
    """Serves workloads, one after the other."""

    def serve(self, workload: Workload) -> Answer: ...
    def close(self) -> None: ...


def now_us() -> int:
    """Microseconds of the monotonic clock."""
    return time.monotonic_ns() // 1000


# lmdeploy's own API


class Lmdeploy:
    """Stock, or patched: sessions of an instance of ours, whose steps TurboMind decides."""

    def __init__(self, setup: Setup) -> None:
        from sagec.runtime.engines.turbomind import loading
        from sagec.runtime.engines.turbomind.options import read_options

        spec = spec_of(setup, "i0")
        self._loaded = loading.load(spec, read_options(spec))
        logging.getLogger("lmdeploy").setLevel(logging.WARNING)
        self._instance = Reported() if setup.side == "patched" else None
        self._sessions = itertools.count(self._instance.first_session if self._instance else 1)

    def serve(self, workload: Workload) -> Answer:
        """Ask for all of them as a server of lmdeploy does, streaming."""
        found = asyncio.run(self._serve(workload.asks))
        tokens, times_us = zip(*found, strict=True)
        return Answer(tokens=list(tokens), times_us=list(times_us))

    async def _serve(self, asks: Sequence[Ask]) -> list[tuple[list[int], list[int]]]:
        begin_us = now_us()
        return await asyncio.gather(*(self._ask(ask, begin_us) for ask in asks))

    async def _ask(self, ask: Ask, begin_us: int) -> tuple[list[int], list[int]]:
        from lmdeploy.messages import GenerationConfig

        await asyncio.sleep(max(0, begin_us + ask.arrival_us - now_us()) / 1e6)
        stream = self._loaded.turbomind.create_instance().async_stream_infer(
            next(self._sessions),
            ask.prompt,
            sequence_start=True,
            sequence_end=True,
            gen_config=GenerationConfig(
                max_new_tokens=ask.generate - 1,  # TurboMind samples one more
                top_k=1,
                ignore_eos=True,
            ),
            stream_output=True,
        )
        tokens: list[int] = []
        times: list[int] = []
        async for output in stream:
            tokens += output.token_ids
            times += [now_us() - begin_us] * len(output.token_ids)
        if len(tokens) != ask.generate:
            raise EngineError(f"{len(tokens)} tokens came of {ask.generate} that were asked for")
        return tokens, times

    def close(self) -> None:
        """End the engine's threads, then the instance."""
        self._loaded.close()
        if self._instance is not None:
            self._instance.close()


class Reported:
    """An open instance of the patched library; TurboMind decides, and a thread reads the log."""

    def __init__(self) -> None:
        from sagec.runtime.engines.turbomind import abi, patching

        number = 1
        self.first_session = (number << abi.INSTANCE_SHIFT) + 1
        try:
            self._instance = patching.ensure_patched().open(number, decider=abi.STOCK)
        except patching.PatchError as error:
            raise EngineError(str(error)) from None
        self._closed = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while not self._closed.is_set():
            self._instance.read(timeout_us=100_000)

    def close(self) -> None:
        """Stop reading, and close the instance."""
        self._closed.set()
        self._reader.join()
        self._instance.close()


# sagec

FILE = """
model m from "{model}"
cluster c {{
  device g0 {device}
  {instances}
}}
serve on c mode {mode} chunk {chunk} horizon 64 {{ request "any" tokens 1 generate 2 }}
"""

ONE = "instance i0 role both on g0"
TWO = ("instance p0 role prefill on g0", "instance d0 role decode on g0")
CACHE = " engine turbomind kv_blocks {kv_blocks} block {block_tokens} max_batch {max_batch}"


class Sagec:
    """One instance in this process, or a pair, each a process of its own."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._names = ("p0", "d0") if setup.side == "pair" else ("i0",)
        self._engines = self._started()

    def _started(self) -> dict[str, Engine]:
        channel = "local" if len(self._names) == 1 else "shared-memory"
        specs = [spec_of(self._setup, name, channel=channel) for name in self._names]
        if len(specs) == 1:
            return {specs[0].id: create(specs[0])}
        return dict(process.start(specs))

    def serve(self, workload: Workload) -> Answer:
        """Serve them through loop, strategy and compiler."""
        compiler = Compiler()
        module = compiler.parse(file_of(self._setup, workload.chunk), "benchmark.sage").module
        placed = topology_of(module).instances
        members = [
            Instance(
                id=p.name,
                role=p.role,
                engine=p.engine,
                capability=self._engines[p.name].capability(),
                model=p.model.name,
                cost=p.cost,
            )
            for p in placed
        ]
        heard = Heard(workload)
        executor = ExecutorAPI(self._engines, members, watch=[heard.hear])
        strategy, planner = strategies.create(workload.strategy), compiler.planner(module)
        heard.begin_us = now_us()
        for output in executor.serve(heard.requests, strategy, planner):
            heard.take(output)
        return heard.answer

    def close(self) -> None:
        """End the engines."""
        for engine in self._engines.values():
            engine.close()


def file_of(setup: Setup, chunk: int) -> str:
    """The .sage file that a side serves; its requests come later."""
    common = CACHE.format(**msgspec.structs.asdict(setup)) + f" budget {chunk + setup.max_batch}"
    pair = setup.side == "pair"
    return FILE.format(
        model=setup.model,
        device=setup.device,
        instances="\n  ".join(line + common for line in (TWO if pair else (ONE,))),
        mode="strict" if pair else "hybrid",
        chunk=chunk,
    )


class Heard:
    """What a run said: tokens to clients, and what the engines did."""

    def __init__(self, workload: Workload) -> None:
        self.requests = [
            Request(
                id=f"r{i}",
                prompt=ask.prompt,
                max_output_tokens=ask.generate,
                arrival_us=ask.arrival_us,
            )
            for i, ask in enumerate(workload.asks)
        ]
        self.begin_us = 0
        self._tokens: dict[str, list[int]] = {request.id: [] for request in self.requests}
        self._times: dict[str, list[int]] = {request.id: [] for request in self.requests}
        self._export_us: dict[str, int] = {}
        self._moves: list[Move] = []
        self._steps: list[StepReport] = []

    def take(self, output: object) -> None:
        """A token, or an end, which must be a good one."""
        if isinstance(output, Token):
            self._tokens[output.request_id].append(output.token)
            self._times[output.request_id].append(now_us() - self.begin_us)
        elif not isinstance(output, Finished) or output.detail:
            raise EngineError(f"a request was not served: {output}")

    def hear(self, said: object) -> None:
        """Note steps and hand-overs."""
        if isinstance(said, StepReport):
            self._steps.append(said)
        elif isinstance(said, KVExported):
            handle = said.handle
            self._export_us[handle.request.id] = said.end_us - handle.begin_us
        elif isinstance(said, KVImported):
            export_us = self._export_us[said.request_id]
            self._moves.append(Move(said.num_bytes, export_us, said.end_us - said.begin_us))
        elif isinstance(said, Failed):
            raise EngineError(said.error)

    @property
    def answer(self) -> Answer:
        """What came of it all."""
        found = Conformance.of(self._steps)
        return Answer(
            tokens=list(self._tokens.values()),
            times_us=list(self._times.values()),
            obeyed=found.obeyed,
            deviated=found.deviated,
            at_deadline=found.at_deadline,
            moves=self._moves,
        )


def spec_of(setup: Setup, name: str, **more: str) -> InstanceSpec:
    """An instance of this setup."""
    return InstanceSpec(
        id=name,
        engine="turbomind",
        model=setup.model,
        kv_blocks=setup.kv_blocks,
        block_tokens=setup.block_tokens,
        options={**setup.options, "max_batch": str(setup.max_batch), **more},
    )


SIDES: dict[str, type[Lmdeploy] | type[Sagec]] = {
    "stock": Lmdeploy,
    "patched": Lmdeploy,
    "planned": Sagec,
    "pair": Sagec,
}


def main() -> None:
    """Answer lines until there are no more; a line that says why not is the last."""
    lines = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed is not an answer

    def say(**said: Any) -> None:
        lines.write(msgspec.json.encode(Said(**said)) + b"\n")
        lines.flush()

    setup = msgspec.json.decode(sys.stdin.readline(), type=Setup)
    try:
        made: Side = SIDES[setup.side](setup)
        with closing(made) as side:
            say()
            for line in sys.stdin:
                say(answer=side.serve(msgspec.json.decode(line, type=Workload)))
    except EngineError as error:
        say(error=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
