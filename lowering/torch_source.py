"""From exec graphs to a Python program that the torch engine runs instead of hand-written layers.

A program has a function for each phase that its graphs have: `prefill` for steps of long chunks
only, `decode` for steps of short spans only, `hybrid` for any step. They take what is not in the
graph (weights, kernels, KV, the batch, the other ranks) and give logits. Token counts are the
batch's, so one program does for all steps of an instance.

The first line has a checksum of the rest, and SHAPE is what the program was made for: whoever loads
it compares both (runtime/engines/torch/program.py).
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.utils.target import Target

from sagec.dialects import exec as ex
from sagec.dialects.rows import symbol
from sagec.lowering.torch_statements import ABSENT, Line, Statements
from sagec.passes.errors import PassError

MAGIC = "# sagec torch program 1 sha256 "
"""What a program begins with; the digest of what follows the line comes behind it."""


_LAYOUT = ("tp", "pp", "dp")


def source_of(graph: ex.ExecGraphOp) -> str:
    """The program of one graph: its phase's function. Raises PassError, as `program_of`."""
    return program_of([graph])


def program_of(graphs: Sequence[ex.ExecGraphOp]) -> str:
    """The program of graphs of one model, layout and instance; one function a phase.

    Raises PassError for what the torch engine cannot run, for graphs of different shapes, and for
    two of one phase that do not compute the same.
    """
    shapes = [shape_of(graph) for graph in graphs]
    for graph, shape in zip(graphs, shapes, strict=True):
        for name in shapes[0].keys() | shape.keys():
            if (here := shape.get(name)) != (there := shapes[0].get(name)):
                raise PassError(f"{_called(graph)} has {name} {here}, {_called(graphs[0])} {there};"
                                " a program has one shape", graph)  # fmt: skip
    functions: dict[str, tuple[ex.ExecGraphOp, _Function]] = {}
    for graph in graphs:
        made = _Function.of(graph)
        first, known = functions.setdefault(made.phase, (graph, made))
        if known.code != made.code:
            raise PassError(
                f"{_called(first)} and {_called(graph)} are both of phase {made.phase} and compute "
                "differently; a program has one function a phase", graph,
            )  # fmt: skip
    return _module(graphs[0], shapes[0], [made for _, made in functions.values()])


def shape_of(graph: ex.ExecGraphOp) -> dict[str, int]:
    """What a graph says of its model and layout; sizes of one rank where ranks share them out."""
    shape = {name: _number(graph, name) for name in _LAYOUT}
    for op in graph.operators:
        if isinstance(op, ex.EmbeddingOp):
            shape["hidden"] = ex.tensor_of(op.hidden).shape[1]
        elif isinstance(op, ex.QKVOp):
            shape |= {name: op.number(name) for name in ("heads", "kv_heads", "head_dim")}
            shape["layers"] = max(shape.get("layers", 0), (op.layer_number or 0) + 1)
        elif isinstance(op, ex.FFNOp):
            shape["ffn"] = op.number("width")
            if op.number("experts"):
                shape |= {name: op.number(name) for name in ("experts", "experts_per_token")}
        elif isinstance(op, ex.LMHeadOp):
            shape["vocab"] = ex.tensor_of(op.logits).shape[1]
    return shape


@dataclass(frozen=True)
class _Function:
    """The function of a phase. code: without comments."""

    phase: str
    text: str
    code: str

    @classmethod
    def of(cls, graph: ex.ExecGraphOp) -> _Function:
        """Raises PassError."""
        phase = str(graph.scalar("phase"))
        for name, why in (("pp", "pipeline stages"), ("dp", "replicas")):
            if (count := _number(graph, name)) > 1:
                raise PassError(f"{_called(graph)} has {name} {count}; the torch engine has no "
                                f"{why}: {name} 1", graph)  # fmt: skip
        statements = Statements(graph)
        body = list(_folded(statements.written()))
        logits = statements.logits
        whole = logits[0] if len(logits) == 1 else f"torch.cat([{', '.join(logits)}])"
        lines = [*statements.rows.opening(), *body, f"return {whole}"]
        code = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
        head = [f"def {phase}(weights, kernels, kv, batch, ranks):", f'    """{_told(graph)}"""']
        text = "\n".join([*head, *(f"    {line}" for line in lines)])
        return cls(phase, text, code)


def _folded(lines: Sequence[Line]) -> Iterator[str]:
    """The lines with their comments; layers that follow each other and read alike become a loop."""
    runs = [(layer, list(part)) for layer, part in itertools.groupby(lines, lambda x: x.layer)]
    num_layers = 1 + max((layer for layer, _ in runs if layer is not None), default=-1)
    at = 0
    while at < len(runs):
        layer, part = runs[at]
        end = at + 1
        if layer is None:
            yield from _printed(part)
        else:
            part, opening = _opened(part, runs[end][1] if end < len(runs) else [])
            following = itertools.count(layer + 1)
            while (
                end < len(runs) and runs[end][0] == next(following) and _alike(part, runs[end][1])
            ):
                end += 1
            yield from opening
            yield from _looped(part, range(layer, layer + end - at), num_layers)
        at = end


def _looped(part: Sequence[Line], layers: range, num_layers: int) -> Iterator[str]:
    """The lines of one layer, for all of some layers."""
    if len(layers) == 1:
        yield f"layer, cache = weights.layers[{layers[0]}], kv[{layers[0]}]"
        yield from _printed(part)
        return
    rows = "" if len(layers) == num_layers else f"[{layers.start}:{layers.stop}]"
    yield f"for layer, cache in zip(weights.layers{rows}, kv{rows}, strict=True):"
    yield from (f"    {line}" for line in _printed(part))


def _opened(part: list[Line], following: list[Line]) -> tuple[list[Line], list[str]]:
    """A layer whose absent operands are variables, which it deletes, as in the layer behind it,
    where the two differ in nothing else; and the lines that make the variables."""
    named, names = list(part), dict[str, None]()
    for at, later in enumerate(following):
        if at < len(named) and named[at].absent:
            pattern = re.escape(named[at].code).replace(re.escape(f", {ABSENT},"), r", (\w+),")
            if match := re.fullmatch(pattern, later.code):
                named[at] = replace(named[at], code=later.code)
                names[match[1]] = None
        elif later.code in {f"del {name}" for name in names} and not _alike(
            named[at : at + 1], [later]
        ):
            named.insert(at, later)
    if names and _alike(named, following):
        return named, [f"{name} = {ABSENT}" for name in names]
    return part, []


def _alike(one: Sequence[Line], other: Sequence[Line]) -> bool:
    return [line.code for line in one] == [line.code for line in other]


def _printed(lines: Sequence[Line]) -> Iterator[str]:
    for line in lines:
        if line.note:
            yield f"# {line.note}"
        yield line.code


def _told(graph: ex.ExecGraphOp) -> str:
    """A function's docstring."""
    tokens = sum(ex.tensor_of(op.results[0]).shape[0] for op in graph.operators
                 if isinstance(op, ex.InputOp))  # fmt: skip
    return (
        f"Logits [S, vocab] of a step; from exec.graph {symbol(graph.symbol)} of {tokens} tokens."
    )


def _module(graph: ex.ExecGraphOp, shape: dict[str, int], functions: Sequence[_Function]) -> str:
    texts = [function.text for function in functions]
    doc = [
        f'"""Steps of model {graph.scalar("model")}, generated from exec graphs; not to be edited.',
        "",
        "T: tokens of a step. S: those of them that sample. Times are estimates for the graph's T.",
        '"""',
    ]
    imports = ["import torch.nn.functional as F"]
    if any("torch." in text for text in texts):
        imports.insert(0, "import torch")
    if any("lanes_of" in text for text in texts):
        imports += ["", "from sagec.runtime.engines.torch.lanes import lanes_of"]
    said = ["SHAPE = {", *(f'    "{name}": {value},' for name, value in shape.items()), "}"]
    parts = ["\n".join([*doc, "", *imports]), "\n".join(said), *texts]
    body = "\n\n\n".join(parts).replace("\n\n\nSHAPE", "\n\nSHAPE", 1) + "\n"
    return f"{MAGIC}{hashlib.sha256(body.encode()).hexdigest()}\n{body}"


def _number(graph: ex.ExecGraphOp, name: str) -> int:
    value = graph.scalar(name)
    assert isinstance(value, int)
    return value


def _called(graph: ex.ExecGraphOp) -> str:
    return f"exec.graph {symbol(graph.symbol)}"


@dataclass(frozen=True)
class TorchTarget(Target):
    """Writes the program of each model and layout that a module has exec graphs of."""

    name = "torch"

    def emit(self, ctx: Context, module: ModuleOp, output: IO[str]) -> None:
        """Raises PassError."""
        output.write("\n".join(programs_of(module)))


def programs_of(module: ModuleOp) -> list[str]:
    """A program for each model and layout that the module has exec graphs of.

    Steps that sample nothing are left out where others of their phase sample: a function that gives
    logits does for them too. Raises PassError where the module has no graph.
    """
    graphs = [op for op in module.walk() if isinstance(op, ex.ExecGraphOp)]
    if not graphs:
        raise PassError("the module has no exec.graph; run convert-pd-to-exec first", module)
    groups: dict[tuple[object, ...], list[ex.ExecGraphOp]] = {}
    for graph in graphs:
        key = (graph.scalar("model"), *(_number(graph, name) for name in _LAYOUT))
        groups.setdefault(key, []).append(graph)
    return [program_of(list(_sampling(group))) for group in groups.values()]


def _sampling(graphs: Sequence[ex.ExecGraphOp]) -> Iterator[ex.ExecGraphOp]:
    """The graphs without those that sample nothing and have others of their phase."""
    sampling = {graph: any(isinstance(op, ex.SampleOp) for op in graph.operators)
                for graph in graphs}  # fmt: skip
    phases = {graph.scalar("phase") for graph, samples in sampling.items() if samples}
    for graph, samples in sampling.items():
        if samples or graph.scalar("phase") not in phases:
            yield graph
