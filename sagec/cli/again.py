"""`sagec replay --on ENGINE`: the requests of a recording, served once more, and their tokens."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sagec.cli import serving, writing
from sagec.cli.failure import InputError
from sagec.explain import counted, named
from sagec.passes.topology import topology_of
from sagec.planner import DirectFirstPlanner, member_of
from sagec.replay import Asked, Replay, asked
from sagec.runtime.executor import ExecutorAPI
from sagec.runtime.loop import Finished, Token
from sagec.runtime.recording import Recording, RecordingError


def run(args: argparse.Namespace, recording: Recording) -> int:
    """Serve on engines of this process; 1 where a request that is determined got other tokens.

    Raises RecordingError where prompts or tokens were left out.
    """
    if not recording.header.tokens:
        raise RecordingError(f"{recording.path}: recorded without tokens: nothing to compare with")
    engine = serving.known_engine(args.on)
    every, replay = asked(recording), Replay(recording, engine)
    placed = topology_of(replay.module).instances
    specs = [serving.spec_of(instance, one_process=True) for instance in placed]
    if not specs:
        raise InputError(f"{recording.path}: no instance in its cluster")
    running = serving.started(specs, one_process=True)
    known = [member_of(instance, running[instance.name]) for instance in placed]
    tokens: dict[str, list[int]] = {each.request.id: [] for each in every}
    num_tokens, planner = 0, DirectFirstPlanner(replay.planner)
    requests = [each.request for each in every]
    serve = writing.working(f"serving {counted(len(every), 'request')} again")
    with ExecutorAPI(running, known) as executor, serve:
        for output in executor.serve(requests, replay.strategy, planner):
            if isinstance(output, Token):
                tokens[output.request_id].append(output.token)
            elif isinstance(output, Finished):
                num_tokens += output.report.output_tokens
    if num_tokens and not any(tokens.values()):  # a simulator counts tokens, and knows none
        every = [dataclasses.replace(each, tokens=()) for each in every]
    return _report(args, every, tokens, _recorded_on(recording))


def _recorded_on(recording: Recording) -> str:
    """Names of the engines that the recording was made with."""
    return named(list(dict.fromkeys(one.engine for one in recording.header.instances)))


def _report(
    args: argparse.Namespace,
    every: Sequence[Asked],
    tokens: Mapping[str, Sequence[int]],
    recorded_on: str,
) -> int:
    determined = [each for each in every if each.is_determined and each.tokens]
    other = [each.request.id for each in determined if not _agrees(each, tokens[each.request.id])]
    rest = len(every) - len(determined)
    if args.json:
        writing.print_json(_json(args, determined, other, rest))
        return 1 if other else 0
    same = len(determined) - len(other)
    where = args.on if args.on == recorded_on else f"{args.on}, recorded on {recorded_on}"
    print(f"{args.file}: {counted(len(every), 'request')} served again on {where}")
    if other:
        print(f"other tokens: {named(other)}")
    print(f"{same} of {counted(len(determined), 'request')} got the recorded tokens", end="")
    print(f"; {rest} not compared: sampled without a seed, or without a token" if rest else "")
    return 1 if other else 0


def _agrees(each: Asked, tokens: Sequence[int]) -> bool:
    """Whether the tokens are the recorded ones, as far as both went: one may have been cut off."""
    length = min(len(each.tokens), len(tokens))
    return length > 0 and list(each.tokens[:length]) == list(tokens[:length])


def _json(
    args: argparse.Namespace, determined: Sequence[Asked], other: Sequence[str], rest: int
) -> dict[str, Any]:
    return {
        "file": args.file,
        "engine": args.on,
        "compared": len(determined),
        "identical": len(determined) - len(other),
        "other": list(other),
        "not_compared": rest,
    }
