"""Requests of a graph that was written as MLIR: from their prompts' text, or tokens made up."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from xdsl.dialects.builtin import ModuleOp

from sagec.diagnostics import Diagnostic
from sagec.dialects import pd
from sagec.dialects.columns import NamesAttr, quoted
from sagec.language.workload import drawn_tokens, sample_id
from sagec.passes import flow
from sagec.passes.errors import PassError
from sagec.passes.topology import Model, topology_of
from sagec.runtime.request import Request, Sampling
from sagec.source import diagnostic_of


def requests_of(module: ModuleOp) -> list[Request]:
    """The requests of all pd.requests of the module, in order.

    A row with `text` has the tokens that the tokenizer of its model makes of it; another has as
    many tokens as it says, the same for the same id. Raises Diagnostic where the tokens of a text
    are not as many as the graph says.
    """
    models = topology_of(module).models
    ops = [op for g in flow.graphs(module) for op in flow.ops_in(g)]
    return [
        request for op in ops if isinstance(op, pd.RequestsOp) for request in _requests(op, models)
    ]


def _requests(op: pd.RequestsOp, models: dict[str, Model]) -> list[Request]:
    texts = op.properties.get("text")
    text_of = texts.data if isinstance(texts, NamesAttr) else ("",) * len(op.names)
    names = {name: op.words(name) for name in ("model", "tenant", "session", "adapter")}
    numbers = {
        name: op.column(name).tolist()
        for name in (
            "prompt",
            "generate",
            "arrived",
            "priority",
            "ttft",
            "tpot",
            "samples",
            "top_k",
        )
    }
    requests: list[Request] = []
    for row, name in enumerate(op.names):
        model = _model(op, names["model"][row], models)
        generate = numbers["generate"][row]
        prompt = _tokens(op, name, text_of[row], numbers["prompt"][row], model)
        requests.extend(
            Request(
                id=one,
                prompt=prompt,
                max_output_tokens=None if generate >= pd.UNBOUNDED else generate,
                sampling=Sampling(top_k=numbers["top_k"][row]),
                arrival_us=numbers["arrived"][row],
                priority=numbers["priority"][row],
                ttft_us=numbers["ttft"][row] or None,
                tpot_us=numbers["tpot"][row] or None,
                model=names["model"][row],
                tenant=names["tenant"][row],
                session=names["session"][row],
                adapter=names["adapter"][row],
            )
            for one in _sample_ids(name, numbers["samples"][row])
        )
    return requests


def _sample_ids(name: str, samples: int) -> list[str]:
    """A request with several outputs is as many requests."""
    return [name] if samples == 1 else [sample_id(name, sample) for sample in range(samples)]


def _model(op: pd.RequestsOp, name: str, models: dict[str, Model]) -> Model:
    if name in models:
        return models[name]
    if not name and len(models) == 1:
        return next(iter(models.values()))
    there = ", ".join(f"@{known}" for known in models) or "none"
    said = f"no model @{name}" if name else "a request names no model"
    raise diagnostic_of(PassError(f"{said}; there are: {there}", op))


def _tokens(op: pd.RequestsOp, name: str, text: str, count: int, model: Model) -> tuple[int, ...]:
    if not text:
        return tuple(drawn_tokens(name, count, model.vocab).tolist())
    tokens: tuple[int, ...] = tuple(_tokenizer(model.path).encode(text).ids)
    if len(tokens) != count:
        raise diagnostic_of(
            PassError(
                f"the text of {quoted(name)} is {len(tokens)} tokens of @{model.name}, and the "
                f"graph says {count}; say prompt {len(tokens)}",
                op,
            )
        )
    return tokens


@functools.lru_cache(maxsize=8)
def _tokenizer(folder: str) -> Any:
    path = Path(folder) / "tokenizer.json"
    try:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(path))
    except ImportError:
        why = "a prompt as text needs the package 'tokenizers'; pip install 'sagec[torch]'"
    except Exception as error:  # tokenizers raises nothing more special
        why = f"no tokenizer at {path}: {' '.join(str(error).split())[:120]}; say the model's path"
    raise Diagnostic(why.partition("; ")[0], hint=why.partition("; ")[2])
