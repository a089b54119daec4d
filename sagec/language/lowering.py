"""Program to module: the cluster as ops, all requests as one wave."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from xdsl.dialects.builtin import FileLineColLoc, IntAttr, IntegerAttr, ModuleOp, StringAttr, i64
from xdsl.ir import Attribute, Block, Operation, Region

from sagec.dialects import cluster, pd
from sagec.dialects.columns import ColumnAttr, NamesAttr, WordsAttr
from sagec.dialects.scalars import properties_of
from sagec.language.instances import Instance
from sagec.language.models import Scalars
from sagec.language.resolution import GRAPH, Scene, resolve
from sagec.language.syntax import Program
from sagec.language.workload import Workload, workload
from sagec.lowering.targets import ability_of

DEFAULT_STRATEGY = "fifo"
DEFAULT_MODE = "hybrid"

_INT_COLUMNS = {
    "generate": pd.UNBOUNDED,
    "priority": 0,
    "ttft": 0,
    "tpot": 0,
    "samples": 1,
    "top_k": 0,
    "chunk": 0,
}
_WORD_COLUMNS = ("tenant", "session", "adapter", "on", "decode_on")


def lower_program(program: Program) -> ModuleOp:
    """The module of a program: its cluster, and where it serves something, one graph of it.

    Raises Diagnostic, with all errors that can be found at once.
    """
    scene = resolve(program)
    ops = list(_cluster_ops(scene))
    if program.serve is not None:
        ops.append(_graph(workload(scene)))
    return ModuleOp(ops)


def _at(program: Program, begin: int, op: Operation) -> Operation:
    """The op, with the place in the .sage text that it comes from."""
    line, column = program.source.position(begin)
    name = StringAttr(program.source.name)
    op.location = FileLineColLoc(name, IntAttr(line), IntAttr(column))
    return op


def _cluster_ops(scene: Scene) -> Iterator[Operation]:
    program = scene.program
    for name, model in scene.models.items():
        yield _at(program, model.begin, cluster.ModelOp.named(name, like=None, **model.scalars))
    for name, device in scene.devices.items():
        scalars = {} if device.like else device.scalars
        yield _at(program, device.begin, cluster.DeviceOp.named(name, like=device.like, **scalars))
    for name, begin in scene.switches.items():
        switch = cluster.SwitchOp.create(properties={"sym_name": StringAttr(name)})
        yield _at(program, begin, switch)
    for link in scene.links:
        op = cluster.LinkOp.between(link.source, link.target, **link.scalars)
        yield _at(program, link.begin, op)
    for name, instance in scene.instances.items():
        placed = cluster.InstanceOp.of(
            name,
            list(instance.devices),
            instance.engine,
            instance.role,
            instance.model,
            **_scalars_of(instance),
        )
        yield _at(program, instance.statement.begin, placed)


def _scalars_of(instance: Instance) -> Scalars:
    """What the program says, and what its engine cannot do otherwise."""
    ability = ability_of(instance.engine)
    if ability is None or not ability.partial_prefills:
        return instance.scalars
    return {"max_partial_prefills": ability.partial_prefills} | instance.scalars


def _graph(loaded: Workload) -> Operation:
    """`pd.graph @serve`: requests, their prefill, their decode."""
    program = loaded.scene.program
    assert program.serve is not None
    said = {name: value.value for name, value in program.serve.settings.items()}
    begin = program.serve.begin
    requests = pd.RequestsOp.of(_columns(loaded))
    chunk = said.get("chunk")
    bound: dict[str, Attribute] = (
        {"chunk": IntegerAttr(chunk, i64)} if isinstance(chunk, int) else {}
    )
    prefill = pd.PrefillOp.of(requests.wave, bound)
    decode = pd.DecodeOp.of(prefill.kv)
    for value, name in ((requests.wave, "asked"), (prefill.kv, "kv"), (decode.end, "end")):
        value.name_hint = name
    end = pd.YieldOp.create(operands=[decode.end])
    body = [_at(program, begin, op) for op in (requests, prefill, decode, end)]
    scalars = {
        "policy": str(said.get("with", DEFAULT_STRATEGY)),
        "mode": str(said.get("mode", DEFAULT_MODE)),
        "horizon": said.get("horizon"),
    }
    given = {name: value for name, value in scalars.items() if not isinstance(value, tuple)}
    properties: dict[str, Attribute] = {"sym_name": StringAttr(GRAPH)}
    graph = pd.GraphOp.create(
        properties=properties | properties_of(given, pd.GraphOp.SCALARS),
        regions=[Region(Block(body))],
    )
    return _at(program, begin, graph)


def _columns(loaded: Workload) -> dict[str, Attribute]:
    """The table of the requests: a column for each field that some request says."""
    columns: dict[str, Attribute] = {
        "ids": NamesAttr.of(row.id for row in loaded.rows),
        "prompt": ColumnAttr.of(np.array(loaded.prompt_tokens, np.int64)),
    }
    if loaded.says("arrives"):
        columns["arrived"] = ColumnAttr.of(np.array(loaded.column("arrives", 0), np.int64))
    for name, default in _INT_COLUMNS.items():
        if loaded.says(name):
            columns[name] = ColumnAttr.of(np.array(loaded.column(name, default), np.int64))
    if len(set(loaded.models)) > 1 or loaded.says("model"):
        columns["model"] = WordsAttr.from_rows(loaded.models)
    for name in _WORD_COLUMNS:
        if loaded.says(name):
            columns[name] = WordsAttr.from_rows(map(str, loaded.column(name, "")))
    if loaded.texts:
        columns["text"] = NamesAttr.of(map(str, loaded.column("prompt", "")))
    return columns
