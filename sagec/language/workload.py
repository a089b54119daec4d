"""The requests of a program as rows: written ones and replayed ones, with their prompts' tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sagec.diagnostics import Diagnostic, there_are
from sagec.dialects.columns import Ints
from sagec.language import settings, syntax
from sagec.language.errors import MOST_ERRORS, Errors
from sagec.language.models import Model, relative_to_source
from sagec.language.parser import said_in
from sagec.language.resolution import Scene
from sagec.language.syntax import Plain, Program, Settings
from sagec.language.traces import read_trace, what_was_skipped

TokenIds = Sequence[int]


class Row(NamedTuple):
    """A request: what it and its statements say of it, by setting.

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


def drawn_tokens(name: str, count: int, vocab: int) -> Ints:
    """`count` token ids in [0, vocab), the same for the same name.

    >>> drawn_tokens("a", 3, 1000).tolist() == drawn_tokens("a", 3, 1000).tolist()
    True
    """
    seed = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")
    return np.random.Generator(np.random.PCG64(seed)).integers(0, vocab, count)


def sample_id(request_id: str, sample: int) -> str:
    """What the output number `sample` of a request with several is called."""
    return f"{request_id}#{sample}"


@functools.lru_cache(maxsize=4)
def workload(scene: Scene) -> Workload:
    """The rows of a scene whose program serves something. Raises Diagnostic."""
    return _Loader(scene).workload()


class _Loader:
    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.program: Program = scene.program
        assert self.program.serve is not None
        self.serve = self.program.serve
        self.errors = Errors(self.program.source)

    def workload(self) -> Workload:
        rows = self.rows()
        self.check_ids(rows)
        models = self.models(rows)
        self.check_places(rows, models)
        self.check_phases(models)
        self.errors.stop_if_any()
        texts = self.texts(rows, models)
        lengths = [
            len(texts[index]) if index in texts else int(str(row.said["tokens"]))
            for index, row in enumerate(rows)
        ]
        self.check_lengths(rows, models, lengths)
        self.errors.stop_if_any()
        return Workload(self.scene, rows, models, lengths, texts)

    def error(self, row: Row, name: str, message: str, hint: str = "") -> None:
        """Point at what a row says of a setting, wherever it says it."""
        self.errors.found.append(self.error_at(row, name, message, hint))

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
        path = relative_to_source(self.program.source.name, str(replay.path.value))
        own: dict[str, Any] = {name: value.value for name, value in replay.settings.items()}
        try:
            skipped: list[Diagnostic] | None = [] if own.get("broken_lines") == "skip" else None
            recorded = read_trace(path, own.get("limit"), skipped)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            parent = Path(self.program.source.name).parent
            hint = f"a CSV or JSON lines file; the path counts from {parent}"
            raise self.program.error(replay.path, f"no trace {path}: {reason}", hint) from None
        if skipped:
            self.program.notes[str(path)] = what_was_skipped(skipped)
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
        """Every request is called otherwise, and every sample of one."""
        seen: set[str] = set()
        for row in rows:
            count = int(str(row.said.get("samples", 1)))
            samples = [sample_id(row.id, sample) for sample in range(count)] if count > 1 else []
            if not seen.isdisjoint((row.id, *samples)):
                self._error_id(row)
            seen.update((row.id, *samples))

    def _error_id(self, row: Row) -> None:
        message = f"a second request '{row.id}'"
        if isinstance(row.statement, syntax.Replay):
            message += ", which the trace is replayed as"
            self.errors.at(row.statement.path, message, "ids are unique")
        else:
            at = dict(said_in(self.program.source, row.statement))["request"]
            self.errors.at(at, message, "ids are unique")

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
            if len(self.errors.found) >= MOST_ERRORS:
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
        instances = list(self.scene.instances.values())
        cluster = self.scene.cluster
        at = self.serve.settings.get("on", cluster.name)
        if not instances:
            message = f"cluster '{cluster.name.text}' has no instances"
            hint = "as in: instance x on ... engine ..."
            self.errors.at(at, message, hint)
            return
        for model in sorted(set(models) - {""}):
            for phase in ("prefill", "decode"):
                if any(i.runs(phase) and i.model == model for i in instances):
                    continue
                hint = f"as in: instance x role {phase} on ... engine ..."
                message = f"cluster '{cluster.name.text}' has no instance to {phase} '{model}'"
                self.errors.at(at, message, hint)

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
