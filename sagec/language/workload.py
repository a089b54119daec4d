"""The requests of a program as rows: written ones and replayed ones, with their prompts' tokens."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sagec.diagnostics import Diagnostic, combined, there_are
from sagec.dialects.columns import Ints
from sagec.language import settings, syntax
from sagec.language.parser import said_in
from sagec.language.resolution import Instance, Model, Scene
from sagec.language.settings import AT_END_OF_TEXT
from sagec.language.syntax import Plain, Program, Settings
from sagec.language.traces import MOONCAKE_BLOCK_TOKENS, read_trace
from sagec.runtime.request import Request, Sampling

TokenIds = Sequence[int]

_MOST_SHARED = 2**20


class Row(NamedTuple):
    """A request: what it and its statement say, by setting; from: the statement.

    blocks: of a replayed request, the ids of its leading blocks.
    """

    id: str
    said: dict[str, Plain]
    statement: syntax.Request | syntax.Replay
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Workload:
    """The rows of a program with the model of each and the length of each prompt.

    texts: the token ids of those prompts that are text, by row.
    """

    scene: Scene
    rows: list[Row]
    models: list[str]
    prompt_tokens: list[int]
    texts: dict[int, TokenIds]

    def column(self, name: str, default: Plain) -> list[Plain]:
        """What each row says of a setting, or the default."""
        return [row.said.get(name, default) for row in self.rows]

    def says(self, name: str) -> bool:
        """Whether any row says something of a setting."""
        return any(name in row.said for row in self.rows)


@functools.lru_cache(maxsize=4)
def workload(scene: Scene) -> Workload:
    """The rows of a scene whose program serves something. Raises Diagnostic."""
    return _Loader(scene).workload()


def requests_of(loaded: Workload) -> list[Request]:
    """The requests as a loop takes them; one with `samples n` is n requests, `id#0` to `id#n-1`."""
    return [request for index in range(len(loaded.rows)) for request in _requests(loaded, index)]


def _requests(loaded: Workload, index: int) -> list[Request]:
    row, model = loaded.rows[index], loaded.scene.models[loaded.models[index]]
    said: dict[str, Any] = dict(row.said)
    samples, seed = said.get("samples", 1), said.get("seed")
    stops = said.get("stop", ())
    first = Request(
        id=row.id,
        prompt=_prompt(loaded, index, model),
        max_output_tokens=said.get("generate"),
        sampling=_sampling(said, seed),
        stop_tokens=model.end_tokens if AT_END_OF_TEXT in stops else (),
        stop_strings=tuple(stop for stop in stops if stop != AT_END_OF_TEXT),
        model=model.at.text,
        arrival_us=said.get("arrives", 0),
        priority=said.get("priority", 0),
        ttft_us=said.get("ttft"),
        tpot_us=said.get("tpot"),
        tenant=said.get("tenant", ""),
        session=said.get("session", ""),
        adapter=said.get("adapter", ""),
    )
    if samples == 1:
        return [first]
    fields = {name: getattr(first, name) for name in first.__struct_fields__}
    return [
        Request(
            **fields
            | {
                "id": f"{row.id}#{sample}",
                "sampling": _sampling(said, None if seed is None else seed + sample),
            }
        )
        for sample in range(samples)
    ]


def _sampling(said: dict[str, Any], seed: int | None) -> Sampling:
    given = {name: said[name] for name in ("temperature", "top_k", "top_p") if name in said}
    return Sampling(**given, seed=seed)


def _prompt(loaded: Workload, index: int, model: Model) -> tuple[int, ...]:
    if (ids := loaded.texts.get(index)) is not None:
        return tuple(ids)
    row, vocab = loaded.rows[index], int(model.scalars["vocab"])
    length = loaded.prompt_tokens[index]
    blocks = row.blocks[: -(-length // MOONCAKE_BLOCK_TOKENS)]
    parts = [drawn_tokens(f"block {block}", MOONCAKE_BLOCK_TOKENS, vocab) for block in blocks]
    known = sum(map(len, parts))
    if known < length:
        parts.append(drawn_tokens(row.id, length - known, vocab))
    drawn = np.concatenate(parts)[:length]
    return tuple(_shared_ints(vocab)[drawn].tolist() if vocab <= _MOST_SHARED else drawn.tolist())


@functools.lru_cache(maxsize=2)
def _shared_ints(vocab: int) -> Any:
    """The numbers [0, vocab) as objects: a token of a long trace costs 8 bytes then, and not 40."""
    return np.arange(vocab).astype(object)


def drawn_tokens(name: str, count: int, vocab: int) -> Ints:
    """`count` token ids in [0, vocab), the same for the same name.

    >>> drawn_tokens("a", 3, 1000).tolist() == drawn_tokens("a", 3, 1000).tolist()
    True
    """
    seed = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")
    return np.random.Generator(np.random.PCG64(seed)).integers(0, vocab, count)


class _Loader:
    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.program: Program = scene.program
        assert self.program.serve is not None
        self.serve = self.program.serve
        self.errors: list[Diagnostic] = []

    def workload(self) -> Workload:
        rows = self.rows()
        self.check_ids(rows)
        models = self.models(rows)
        self.check_places(rows, models)
        self.check_phases(models)
        self.stop_if_wrong()
        texts = self.texts(rows, models)
        lengths = [
            len(texts[index]) if index in texts else int(str(row.said["tokens"]))
            for index, row in enumerate(rows)
        ]
        self.check_lengths(rows, models, lengths)
        self.stop_if_wrong()
        return Workload(self.scene, rows, models, lengths, texts)

    def stop_if_wrong(self) -> None:
        if self.errors:
            raise combined(self.errors[:20])

    def error(self, row: Row, name: str, message: str, hint: str = "") -> None:
        """Point at what a row says of a setting, wherever it says it."""
        self.errors.append(self.error_at(row, name, message, hint))

    def error_at(self, row: Row, name: str, message: str, hint: str = "") -> Diagnostic:
        statement, source = row.statement, self.program.source
        own = (
            dict(said_in(source, statement))
            if isinstance(statement, syntax.Request)
            else {"tokens": statement.path} | statement.settings
        )
        if (value := own.get(name) or self.serve.settings.get(name)) is not None:
            return source.error(value.begin, value.end, message, hint)
        length = len("replay" if isinstance(statement, syntax.Replay) else "request")
        return source.error(statement.begin, statement.begin + length, message, hint)

    # Rows

    def rows(self) -> list[Row]:
        shared = _shared(self.serve.settings)
        rows: list[Row] = []
        for entry in self.serve.entries:
            if isinstance(entry, syntax.Request):
                rows.append(Row(entry.id, {**shared, **entry.settings}, entry))
            else:
                rows += self.replayed(entry, shared)
        if not rows:
            hint = 'as in: serve { request "hello" tokens 16 generate 8 }'
            raise self.program.source.error(
                self.serve.begin, self.serve.end, "nothing to serve", hint
            )
        return rows

    def replayed(self, replay: syntax.Replay, shared: dict[str, Plain]) -> list[Row]:
        path = Path(
            os.path.normpath(Path(self.program.source.name).parent / str(replay.path.value))
        )
        own: dict[str, Any] = {name: value.value for name, value in replay.settings.items()}
        try:
            recorded = read_trace(path, own.get("limit"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            parent = Path(self.program.source.name).parent
            hint = f"a CSV or JSON lines file; the path counts from {parent}"
            raise self.program.error(replay.path, f"no trace {path}: {reason}", hint) from None
        said = shared | _shared(replay.settings)
        rate, clip = own.get("rate", 1.0), own.get("clip", settings.MOST_TOKENS)
        return [
            Row(
                f"{path.stem}-{index}",
                said
                | {
                    "tokens": min(request.prompt_tokens, clip),
                    "generate": request.output_tokens,
                    "arrives": min(round(request.arrival_us / rate), settings.MOST),
                },
                replay,
                request.blocks,
            )
            for index, request in enumerate(recorded)
        ]

    # Names

    def check_ids(self, rows: list[Row]) -> None:
        if len({row.id for row in rows}) == len(rows):
            return
        seen: set[str] = set()
        for row in rows:
            if row.id in seen:
                self.error_id(row)
            seen.add(row.id)

    def error_id(self, row: Row) -> None:
        source = self.program.source
        hint = "ids are unique"
        if isinstance(row.statement, syntax.Replay):
            path = row.statement.path
            message = f"a second request '{row.id}', which the trace is replayed as"
            self.errors.append(source.error(path.begin, path.end, message, hint))
            return
        at = dict(said_in(source, row.statement))["request"]
        self.errors.append(source.error(at.begin, at.end, f"a second request '{row.id}'", hint))

    def models(self, rows: list[Row]) -> list[str]:
        """The model that each row asks for; "" where that is an error."""
        served = sorted({instance.model for instance in self.scene.instances.values()})
        found = []
        for row in rows:
            named = row.said.get("model")
            if named is None and len(served) == 1:
                named = served[0]
            elif named is None and served:
                message = f"request '{row.id}' names no model"
                self.error(row, "model", message, f"there are: {', '.join(served)}")
            elif named is not None and named not in self.scene.models:
                hint = there_are(str(named), self.scene.models)
                self.error(row, "model", f"no model '{named}'", hint)
                named = None
            found.append(str(named) if named is not None else "")
            if len(self.errors) >= 20:
                break
        return found

    def check_places(self, rows: list[Row], models: list[str]) -> None:
        """The instances that requests name exist, and do what they are named for."""
        for name, phase in (("on", "prefill"), ("decode_on", "decode")):
            for row, model in zip(rows, models, strict=False):
                if (said := row.said.get(name)) is not None:
                    self.check_place(row, name, str(said), phase, model)

    def check_place(self, row: Row, name: str, said: str, phase: str, model: str) -> None:
        instances = self.scene.instances
        instance = instances.get(said)
        fits = [i.at.text for i in instances.values() if i.runs(phase) and i.model == model]
        if instance is None:
            self.error(row, name, f"no instance '{said}'", there_are(said, fits or instances))
        elif not instance.runs(phase):
            message = f"instance '{said}' is there to {instance.role}, not to {phase}"
            self.error(row, name, message, f"what does: {', '.join(fits) or 'none'}")
        elif model and instance.model != model:
            message = f"instance '{said}' runs model '{instance.model}', not '{model}'"
            self.error(row, name, message, f"what does: {', '.join(fits) or 'none'}")

    def check_phases(self, models: Iterable[str]) -> None:
        """Each model that a request asks for has instances for both phases."""
        instances: list[Instance] = list(self.scene.instances.values())
        cluster = self.scene.cluster
        at = self.serve.settings.get("on", cluster.name)
        if not instances:
            message = f"cluster '{cluster.name.text}' has no instances"
            hint = "as in: instance x on ... engine ..."
            self.errors.append(self.program.error(at, message, hint))
            return
        for model in sorted(set(models) - {""}):
            for phase in ("prefill", "decode"):
                if any(i.runs(phase) and i.model == model for i in instances):
                    continue
                hint = f"as in: instance x role {phase} on ... engine ..."
                message = f"cluster '{cluster.name.text}' has no instance to {phase} '{model}'"
                self.errors.append(self.program.error(at, message, hint))

    # Prompts

    def texts(self, rows: list[Row], models: list[str]) -> dict[int, TokenIds]:
        """Token ids of the prompts that are text, by row."""
        found: dict[int, TokenIds] = {}
        of_model: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            if "prompt" in row.said:
                of_model.setdefault(models[index], []).append(index)
        for name, indices in of_model.items():
            tokenizer = self.tokenizer(self.scene.models[name], rows[indices[0]])
            encoded = tokenizer.encode_batch_fast([str(rows[i].said["prompt"]) for i in indices])
            for index, encoding in zip(indices, encoded, strict=True):
                found[index] = encoding.ids
                if not encoding.ids:
                    self.error(rows[index], "prompt", "the prompt has no token", "write some text")
        return found

    def tokenizer(self, model: Model, row: Row) -> Any:
        """The tokenizer of a model. Raises Diagnostic at a row that needs it."""
        instead = "give the length instead, as in: tokens 128"
        if model.folder is None:
            message = f"model '{model.at.text}' has no tokenizer, because it has no checkpoint"
            raise self.error_at(row, "prompt", message, instead)
        try:
            from tokenizers import Tokenizer
        except ImportError:
            message = "a prompt as text needs the package 'tokenizers', which is not installed"
            hint = f"pip install 'sagec[torch]', or {instead}"
            raise self.error_at(row, "prompt", message, hint) from None
        path = model.folder / "tokenizer.json"
        if not path.is_file():
            raise self.error_at(row, "prompt", f"no tokenizer {path}", instead)
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            message = f"{path} is no tokenizer: {' '.join(str(error).split())[:120]}"
            raise self.error_at(row, "prompt", message, "fetch it again") from None

    def check_lengths(self, rows: list[Row], models: list[str], lengths: list[int]) -> None:
        """Prompt and output of each request fit into its model's context."""
        prompts = np.array(lengths, np.int64)
        outputs = np.array([row.said.get("generate", 1) for row in rows], np.int64)
        contexts = {name: model.shape.max_context for name, model in self.scene.models.items()}
        most = np.array([contexts[model] for model in models], np.int64)
        bad = np.flatnonzero(prompts + outputs > most)
        if not bad.size:
            return
        index = int(bad[0])
        row = rows[index]
        message = (
            f"request '{row.id}': a prompt of {prompts[index]} tokens and {outputs[index]} to "
            f"generate are more than the {most[index]} of model '{models[index]}'"
        )
        others = f"; so are {bad.size - 1} more" if bad.size > 1 else ""
        name = "tokens" if "tokens" in row.said else "prompt"
        hint = "make one of them shorter"
        left = most[index] - outputs[bad].max()
        if isinstance(row.statement, syntax.Replay) and left > 0:
            hint = f"cut prompts, as in: clip {left}"
        self.error(row, name, message + others, hint)


def _shared(given: Settings) -> dict[str, Plain]:
    """Those settings of `serve` or `replay` that hold for each of its requests."""
    return {name: given[name].value for name in settings.SHARED if name in given}


__all__ = ["Row", "Workload", "drawn_tokens", "requests_of", "workload"]
