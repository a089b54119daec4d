"""Requests of a graph that was written as MLIR: from their prompts' text, or tokens made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xdsl.dialects.builtin import ModuleOp

from sagec.diagnostics import Diagnostic
from sagec.dialects import pd
from sagec.dialects.columns import NamesAttr, quoted
from sagec.language.workload import drawn_tokens
from sagec.passes import flow
from sagec.passes.errors import PassError
from sagec.passes.topology import Model, topology_of
from sagec.runtime.request import Request
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
        for name in ("prompt", "generate", "arrived", "priority", "ttft", "tpot")
    }
    requests = []
    for row, name in enumerate(op.names):
        model = _model(op, names["model"][row], models)
        generate = numbers["generate"][row]
        requests.append(
            Request(
                id=name,
                prompt=_tokens(op, name, text_of[row], numbers["prompt"][row], model),
                max_output_tokens=None if generate >= pd.UNBOUNDED else generate,
                arrival_us=numbers["arrived"][row],
                priority=numbers["priority"][row],
                ttft_us=numbers["ttft"][row] or None,
                tpot_us=numbers["tpot"][row] or None,
                model=names["model"][row],
                tenant=names["tenant"][row],
                session=names["session"][row],
                adapter=names["adapter"][row],
            )
        )
    return requests


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
    tokens: tuple[int, ...] = tuple(_tokenizer(op, model).encode(text).ids)
    if len(tokens) != count:
        raise diagnostic_of(
            PassError(
                f"the text of {quoted(name)} is {len(tokens)} tokens of @{model.name}, and the "
                f"graph says {count}; say prompt {len(tokens)}",
                op,
            )
        )
    return tokens


def _tokenizer(op: pd.RequestsOp, model: Model) -> Any:
    path = Path(model.path) / "tokenizer.json"
    try:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(path))
    except ImportError:
        why = "a prompt as text needs the package 'tokenizers'; pip install 'sagec[torch]'"
    except Exception as error:  # tokenizers raises nothing more special
        why = f"no tokenizer at {path}: {' '.join(str(error).split())[:120]}; say the model's path"
    raise Diagnostic(why.partition("; ")[0], hint=why.partition("; ")[2])
