"""Models: the shape that a checkpoint's config.json gives, or that the program says."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sagec.dialects.cluster import MODEL_SCALARS
from sagec.dialects.scalars import Scalar
from sagec.language import syntax
from sagec.language.errors import Errors
from sagec.language.syntax import Settings, Word
from sagec.passes import topology
from sagec.runtime.engines import EngineError
from sagec.runtime.engines.torch.config import ModelConfig, read_config

Scalars = dict[str, int | float | str]

_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}

_SCALAR_OF = {
    "memory": "memory_bytes",
    "flops": "flops_per_s",
    "bandwidth": "bytes_per_s",
    "latency": "latency_us",
    "block": "block_tokens",
    "budget": "max_step_tokens",
    "switch_time": "switch_us",
}
"""Settings whose scalar is called otherwise in the IR."""


@dataclass(frozen=True)
class Model:
    """A model with its shape; folder is its checkpoint, where it has one."""

    at: Word
    begin: int
    scalars: Scalars
    folder: Path | None
    end_tokens: tuple[int, ...]

    @property
    def shape(self) -> topology.Model:
        """The shape with all defaults, which knows the bytes of weights and KV."""
        scalars = with_defaults(MODEL_SCALARS, self.scalars)
        return topology.Model(name=self.at.text, **scalars)  # type: ignore[arg-type]


def with_defaults(table: Iterable[Scalar], said: Scalars) -> Scalars:
    """All scalars of a table: what is said, else the default."""
    return {scalar.name: said.get(scalar.name, scalar.default) for scalar in table}


def scalars_of(settings: Settings, leave_out: tuple[str, ...] = ()) -> Scalars:
    """Settings as scalars of the IR."""
    given = {name: value.value for name, value in settings.items() if name not in leave_out}
    return {_SCALAR_OF.get(n, n): v for n, v in given.items() if not isinstance(v, tuple)}


def resolve_model(model: syntax.Model, errors: Errors) -> Model | None:
    """The model of a statement; None where its shape is not known, which the errors then say."""
    scalars = scalars_of(model.settings)
    if "tied" in scalars:
        scalars["tied"] = int(scalars["tied"] == "yes")
    if model.path is None:
        return _described(model, scalars, errors)
    folder = relative_to_source(errors.source.name, str(model.path.value))
    try:
        config = read_config(folder)
    except (EngineError, ValueError) as error:
        _complain(str(error), folder, model.path, errors)
        return None
    read = _scalars_of_config(config) | {"path": str(folder)}
    return Model(model.name, model.begin, read | scalars, folder, config.eos_tokens)


def relative_to_source(source: str, path: str) -> Path:
    """A path that a .sage file names, seen from where we are."""
    return Path(os.path.normpath(Path(source).parent / path))


def _scalars_of_config(config: ModelConfig) -> Scalars:
    experts: Scalars = {}
    if config.experts:
        experts = {"experts": config.experts, "experts_per_token": config.experts_per_token}
    return experts | {
        "layers": config.layers,
        "hidden": config.hidden,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "ffn": config.ffn,
        "vocab": config.vocab,
        "dtype": _DTYPES[config.dtype],
        "max_context": config.max_context_tokens,
        "tied": int(config.tied),
    }


def _complain(error: str, folder: Path, path: syntax.Value, errors: Errors) -> None:
    """A checkpoint cannot be read; `error` is what its reader said: what; what would help."""
    message, _, hint = error.partition("; ")
    if not folder.is_dir():
        parent = Path(errors.source.name).parent
        hint = f"a folder with config.json; the path counts from {parent}"
        message = f"no checkpoint {folder}"
    errors.at(path, " ".join(message.split()), " ".join(hint.split()))


def _described(model: syntax.Model, scalars: Scalars, errors: Errors) -> Model | None:
    """A model whose shape the program says."""
    heads, hidden = scalars.get("heads"), scalars.get("hidden")
    if isinstance(heads, int):
        scalars.setdefault("kv_heads", heads)
        if isinstance(hidden, int) and hidden % heads == 0:
            scalars.setdefault("head_dim", hidden // heads)
    missing = [s.name for s in MODEL_SCALARS if s.required and s.name not in scalars]
    if missing == ["head_dim"]:
        message = f"hidden {hidden} does not divide by heads {heads}"
        hint = "heads that divide it; or say head_dim, the width of a head"
        errors.at(model.settings["heads"], message, hint)
        return None
    if missing:
        message = f"model '{model.name.text}' lacks {', '.join(missing)}"
        errors.at(model.name, message, "a shape needs them all")
        return None
    kv_heads = scalars["kv_heads"]
    assert isinstance(heads, int) and isinstance(kv_heads, int)
    if heads % kv_heads:
        at = model.settings.get("kv_heads", model.name)
        message = f"{heads} heads do not share {kv_heads} KV heads evenly"
        errors.at(at, message, f"what does: {divisors(heads)}")
    return Model(model.name, model.begin, scalars, None, ())


def divisors(number: int) -> str:
    """The numbers that divide `number`, for a hint.

    >>> divisors(8)
    '1, 2, 4, 8'
    """
    found = [str(n) for n in range(1, min(number, 4096) + 1) if number % n == 0]
    return ", ".join(found[:12])
