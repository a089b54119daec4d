"""A generated program: the functions that compute a step instead of `Model`'s own layers.

lowering/torch_source.py writes them. The file says what it was made for, and its first line has a
checksum of the rest; both are compared before anything of it runs.
"""

import ast
import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sagec.runtime.engines import EngineError
from sagec.runtime.engines.torch.batch import Batch
from sagec.runtime.engines.torch.config import ModelConfig

MAGIC = "# sagec torch program 1 sha256 "
PHASES = ("prefill", "decode", "hybrid")
MODULE = "sagec_program"
"""What the functions of a program know as their module."""

REMEDY = "generate it again with: sagec compile --emit torch"

Function = Callable[..., torch.Tensor]
"""(weights, kernels, kv, batch, ranks) -> logits [S, vocab of all ranks]."""


@dataclass(frozen=True)
class Program:
    """The functions of a program; `hybrid` computes what the others are not there for."""

    hybrid: Function
    prefill: Function
    decode: Function

    def function(self, batch: Batch) -> Function:
        """The function for what a batch holds: chunks, short spans or both."""
        if not batch.chunks:
            return self.decode
        return self.hybrid if batch.num_short else self.prefill


def load_program(path: Path, config: ModelConfig, tp: int) -> Program:
    """The program in a file, for a rank of `tp` that has this part of a model.

    Raises EngineError where the file is missing, changed, made for another shape, or has no
    function for some steps.
    """
    text = _checked_text(path)
    _check_shape(path, _shape_in(path, text), config, tp)
    functions = _compiled(str(path), text)
    return _program(path, functions)


def _checked_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise EngineError(f"program {path}: {error.strerror or error}; {REMEDY}") from None
    except UnicodeDecodeError:
        raise EngineError(f"program {path}: it is not UTF-8 text; {REMEDY}") from None
    first, _, body = text.partition("\n")
    if not first.startswith(MAGIC):
        raise EngineError(
            f"program {path}: it begins with {first[:40]!r}, not with {MAGIC.strip()!r}; {REMEDY}"
        )
    if hashlib.sha256(body.encode()).hexdigest() != first.removeprefix(MAGIC):
        raise EngineError(f"program {path}: it is not as it was generated; {REMEDY}")
    return text


def _shape_in(path: Path, text: str) -> dict[str, int]:
    """What the program was made for."""
    for node in ast.parse(text).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="SHAPE")], value=value):
                shape = ast.literal_eval(value)
                assert isinstance(shape, dict)
                return shape
    raise EngineError(f"program {path}: it does not say for what SHAPE it was made; {REMEDY}")


def _check_shape(path: Path, said: dict[str, int], config: ModelConfig, tp: int) -> None:
    """Raise unless the program's shape is that of a rank's part of the model."""
    wanted = {
        "tp": tp,
        "pp": 1,
        "dp": 1,
        "hidden": config.hidden,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "layers": config.layers,
        "ffn": config.ffn,
        "experts": config.experts,
        "experts_per_token": config.experts_per_token,
        "vocab": -(-config.vocab // tp),
    }
    for name, value in wanted.items():
        if said.get(name, 0) != value:
            ranks = f" on each of {tp} ranks" if tp > 1 else ""
            raise EngineError(
                f"program {path}: it is for {name} {said.get(name)}, and the model has "
                f"{value}{ranks}; generate it from a cluster.model like its config.json"
            )


@functools.lru_cache(maxsize=64)
def _compiled(path: str, text: str) -> dict[str, Any]:
    """What the program defines; the same objects for the same text."""
    defined: dict[str, Any] = {"__name__": MODULE, "__file__": path}
    exec(compile(text, path, "exec"), defined)
    return defined


def _program(path: Path, defined: dict[str, Any]) -> Program:
    if (hybrid := defined.get("hybrid")) is None:
        there = ", ".join(phase for phase in PHASES if phase in defined) or "none"
        raise EngineError(
            f"program {path}: it has no function hybrid, which computes any step (there are: "
            f"{there}); {REMEDY}, from a graph with chunks and decodes"
        )
    return Program(hybrid, defined.get("prefill", hybrid), defined.get("decode", hybrid))
