"""`sagec run`: from a file to engines, requests, text, a table and a picture."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from sagec import programs
from sagec.cli import figures, observing, writing
from sagec.cli.failure import InputError, UsageError, unknown
from sagec.cli.stream import Stream, stream_for
from sagec.cli.text import Transcript, decoder_of
from sagec.diagnostics import Diagnostic
from sagec.passes.topology import Instance as Placed
from sagec.passes.topology import topology_of
from sagec.planner import member_of, put_on
from sagec.runtime import engines, process
from sagec.runtime.clock import WallClock
from sagec.runtime.compiled import cache_folder
from sagec.runtime.conformance import Conformance
from sagec.runtime.engines import Engine, EngineError, InstanceSpec
from sagec.runtime.executor import ExecutorAPI
from sagec.runtime.loop import Finished, Instance, Output, Planned, Token
from sagec.runtime.recording import Recorder
from sagec.runtime.report import RequestReport, Summary
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.strategies import Strategy, StrategyError
from sagec.runtime.timeline import Timeline

if TYPE_CHECKING:
    from sagec.compiler import Unit
    from sagec.planner import Planner

CHANNELS = {True: "local", False: "shared-memory"}
"""How KV moves, by whether all instances are in one process."""

DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}

QUANT_POLICIES = {"int4": "4", "int8": "8"}
"""TurboMind's names of types of KV; other than these it is the model's."""

LEAST_SESSIONS = 256
"""TurboMind's batch has a place for each request that it knows, whether a step computes it or not:
those that it has no place for wait until one of them ends."""

WELL = (FinishReason.STOP, FinishReason.LENGTH)


def run(args: argparse.Namespace) -> int:
    """Serve the file's requests; 1 where one of them failed or was rejected."""
    from sagec.compiler import Compiler

    for path in (args.timeline, args.trace, args.record, args.spans):
        writing.check_writable(path)
    compiler = Compiler()
    unit = compiler.read(args.file)
    if args.engine is not None:
        put_on(unit.module, known_engine(args.engine))
    placed = topology_of(unit.module).instances
    requests = chosen(unit, args.limit)
    strategy = strategy_for(unit, args.strategy)
    specs = [spec_of(instance, args.one_process) for instance in placed]
    if not specs:
        raise InputError(f"{unit.name}: no instance to serve on; say where in a cluster")
    served = _Served(requests, {i.model.name: i.model.path for i in placed}, args.json)
    timeline = Timeline([spec.id for spec in specs])
    planner = compiler.planner(unit.module, args.horizon, args.planner)
    running = started(specs, args.one_process)
    known = [member_of(instance, running[instance.name]) for instance in placed]
    make = {spec.id: functools.partial(_made, spec, args.one_process) for spec in specs}
    watch = [timeline.hear, served.hear]
    with ExitStack() as stack:
        executor = stack.enter_context(
            ExecutorAPI(running, known, watch=watch, restart=lambda name: make[name]())
        )
        check_layouts(known)
        recorder = None
        if args.record:
            recorder = stack.enter_context(_recorder(args, strategy, planner, known))
        for watcher in observing.watchers(args, known, recorder, stack):
            executor.watch(watcher)
        served.follow(executor.serve(requests, strategy, planner))
    if recorder is not None and recorder.lost_rounds:
        print(f"{args.record}: {recorder.lost_rounds} rounds are not in it", file=sys.stderr)
    return _report(args, served, timeline, f"{unit.name}, {strategy.name}")


def strategy_for(unit: Unit, text: str | None) -> Strategy:
    """The file's strategy, or the one of the command line. Raises UsageError for a wrong one."""
    if text is None:
        return unit.make_strategy()
    try:
        return unit.make_strategy(text)
    except Diagnostic as error:
        raise UsageError(f"--strategy: {error.line()}") from None
    except StrategyError as error:
        raise UsageError(f"--strategy: {error}") from None


def chosen(unit: Unit, limit: int | None, *, counted: bool = False) -> list[Request]:
    """The first requests of the file; what their reader should know goes to stderr.

    Raises InputError where there are none.
    """
    requests = unit.requests(counted=counted)[:limit]
    for note in unit.notes:
        print(note, file=sys.stderr)
    if not requests:
        raise InputError(f'{unit.name}: no request to serve; add one: request "hello" ...')
    return requests


def known_engine(name: str) -> str:
    """The name. Raises UsageError where there is no such engine."""
    if name not in engines.known():
        raise UsageError(unknown("engine", name, engines.known()))
    return name


def spec_of(instance: Placed, one_process: bool) -> InstanceSpec:
    """What it takes to start an instance of the file. Raises InputError where it cannot be."""
    name = instance.engine
    if name not in engines.known():
        raise InputError(f"instance @{instance.name}: {unknown('engine', name, engines.known())}")
    options, said = dict[str, str](), said_options(instance)
    if name == "torch":
        options = torch_options(instance) | {"channel": CHANNELS[one_process]}
        if "program" not in said:
            options["program"] = generated(instance)
    if name == "turbomind":
        options = turbomind_options(instance) | {"channel": CHANNELS[one_process]}
    if name == "sim" and instance.devices:
        options = instance.cost.to_options()
    options |= said
    return InstanceSpec(
        id=instance.name,
        engine=name,
        model=instance.model.path,
        kv_blocks=instance.kv_blocks,
        block_tokens=instance.block_tokens,
        options=options,
    )


def torch_options(instance: Placed) -> dict[str, str]:
    """What the torch engine is told of an instance."""
    device = instance.devices[0].kind if instance.devices else "cpu"
    return {
        "device": "cpu" if device == "cpu" else "cuda",
        "dtype": DTYPES.get(instance.dtype, instance.dtype),
        "tp": str(instance.tp),
    }


def generated(instance: Placed) -> str:
    """The file of the code that computes the instance's steps.

    Where none can be kept, hand-written layers do, which one rank has: "off". Raises InputError.
    """
    program = programs.program_for(instance)
    try:
        return str(programs.kept(program))
    except OSError as error:
        place = f"{error.filename or cache_folder()}: {error.strerror or error}"
        why = f"instance @{instance.name}: no generated code: {place}"
        if instance.tp > 1:
            raise InputError(f"{why}; SAGEC_CACHE names another folder") from None
        print(
            f"{why}; hand-written layers compute its steps (SAGEC_CACHE names another folder)",
            file=sys.stderr,
        )
        return "off"


def turbomind_options(instance: Placed) -> dict[str, str]:
    """What TurboMind is told of an instance; where there is no GPU, it computes a toy model."""
    is_toy = all(device.kind == "cpu" for device in instance.devices)
    return {
        "maths": "toy" if is_toy else "model",
        "tp": str(instance.tp),
        "dtype": "auto" if is_toy else DTYPES.get(instance.dtype, instance.dtype),
        "quant_policy": QUANT_POLICIES.get(instance.kv_dtype, "0"),
        "max_batch": str(max(instance.max_batch, LEAST_SESSIONS)),
        "step_tokens": str(instance.max_step_tokens),
    }


def said_options(instance: Placed) -> dict[str, str]:
    """What the file says to the instance's engine alone. Raises InputError where it is no such."""
    options = {}
    for word in instance.options.split():
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            where = f"instance @{instance.name}: options {instance.options!r}"
            raise InputError(f'{where}: {word!r} is no option, as in "eviction=arc host_blocks=64"')
        options[name] = value
    return options


def started(specs: Sequence[InstanceSpec], one_process: bool) -> Mapping[str, Engine]:
    """The engines by instance, ready. Raises EngineError, with none of them left running."""
    where = "this process" if one_process else f"{len(specs)} processes"
    names = ", ".join(f"{spec.id} ({spec.engine})" for spec in specs)
    with writing.working(f"starting {names} in {where}"), ExitStack() as stack:
        if not one_process:
            return process.start(specs)
        made = {}
        for spec in specs:
            made[spec.id] = _made(spec, one_process)
            stack.callback(made[spec.id].close)
        stack.pop_all()
        return made


def _made(spec: InstanceSpec, one_process: bool) -> Engine:
    return engines.create(spec) if one_process else process.ProcessEngine(spec)


def check_layouts(known: Sequence[Instance]) -> None:
    """Raise EngineError where nobody who decodes a model can take the KV of who prefills it."""
    for source in known:
        layouts = {
            each.id: each.capability.kv_layout
            for each in known
            if each.role != "prefill" and each.model == source.model
        }
        if source.role != "prefill" or not layouts:
            continue
        if source.capability.kv_layout not in layouts.values():
            others = ", ".join(repr(name) for name in layouts)
            raise EngineError(
                f"instance {source.id!r}: KV of another layout than that of {others}; both need "
                "one engine, model, precision, block_tokens and tp"
            )


def _recorder(
    args: argparse.Namespace,
    strategy: Strategy,
    planner: Planner,
    instances: Sequence[Instance],
) -> Recorder:
    from sagec.replay import header_of

    parts = {"prompts": not args.no_prompts, "tokens": not args.no_tokens}
    return Recorder(args.record, header_of(strategy, planner, instances, **parts), WallClock())


class _Served:
    """What clients got: a transcript a request, and the records of those that ended."""

    def __init__(self, requests: Sequence[Request], paths: Mapping[str, str], silent: bool) -> None:
        """paths: the folder of each model, the one that requests mean by default first."""
        decoders = {name: decoder_of(path) for name, path in paths.items()}
        default = next(iter(decoders.values()))
        decoder = {request.id: decoders.get(request.model, default) for request in requests}
        self.requests = requests
        self.transcripts = {
            request.id: Transcript(decoder[request.id], request.stop_strings)
            for request in requests
        }
        self.tokens: dict[str, list[int]] = {request.id: [] for request in requests}
        self.reports: list[RequestReport] = []
        self.details: dict[str, str] = {}
        self.rounds = 0
        prompts = {request.id: decoder[request.id].prompt(request.prompt) for request in requests}
        self._stream: Stream = stream_for(prompts, silent=silent)

    def hear(self, said: object) -> None:
        """Count the rounds."""
        self.rounds += isinstance(said, Planned)

    def follow(self, outputs: Iterable[Output]) -> None:
        """Show what comes until all requests have ended."""
        with self._stream as stream:
            for output in outputs:
                transcript = self.transcripts[output.request_id]
                if isinstance(output, Token):
                    self.tokens[output.request_id].append(output.token)
                    stream.text(output.request_id, transcript.push(output.token))
                elif isinstance(output, Finished):
                    stream.text(output.request_id, transcript.end())
                    self.reports.append(output.report)
                    self._end(stream, output.request_id, output.reason, output.detail)
                else:
                    self._end(stream, output.request_id, FinishReason.REJECTED, output.detail)

    def _end(self, stream: Stream, request_id: str, reason: FinishReason, detail: str) -> None:
        if reason not in WELL:
            self.details[request_id] = detail
        told = str(reason) if reason in WELL else f"{reason}: {detail}"
        stream.end(request_id, told)

    def summary(self, timeline: Timeline) -> Summary:
        """The records in the order of the file, and their sum."""
        place = {request.id: i for i, request in enumerate(self.requests)}
        return Summary.of(
            sorted(self.reports, key=lambda report: place[report.request_id]),
            steps=len(timeline.steps),
            rounds=self.rounds,
            num_moves=len(timeline.moves),
            kv_moved_bytes=timeline.kv_moved_bytes,
            conformance=Conformance.of(timeline.steps),
        )


def _report(args: argparse.Namespace, served: _Served, timeline: Timeline, title: str) -> int:
    summary = served.summary(timeline)
    if args.timeline:
        writing.write_text(args.timeline, timeline.to_svg(title))
    if args.trace:
        writing.write_text(args.trace, timeline.to_trace())
    if args.json:
        writing.print_json(_json(args, served, summary, timeline))
    else:
        writing.console(width=100).print(figures.table(summary, timeline))
        print(figures.sentence(summary))
        if summary.output_tokens and not any(served.tokens.values()):
            print("no texts: a simulator counts tokens and does not know them")
        for path, what in (
            (args.timeline, "timeline"),
            (args.trace, "trace (ui.perfetto.dev)"),
            (args.record, "recording"),
            (args.spans, "spans"),
        ):
            if path:
                print(f"{what}: {path}")
    return 1 if served.details else 0


def _json(
    args: argparse.Namespace, served: _Served, summary: Summary, timeline: Timeline
) -> dict[str, Any]:
    return {
        "requests": [
            {
                **row,
                "detail": served.details.get(row["request"], ""),
                "tokens": served.tokens[row["request"]],
                "text": served.transcripts[row["request"]].text,
            }
            for row in figures.rows(summary, timeline)
        ],
        "total": figures.total(summary),
        "timeline": args.timeline,
        "trace": args.trace,
        "record": args.record,
    }
