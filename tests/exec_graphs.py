"""Random steps for hypothesis: execution graphs that are legal, with a cluster around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Attribute, Operation, SSAValue

from sagec.dialects import cluster
from sagec.dialects import exec as ex
from sagec.dialects.columns import Ints
from sagec.dialects.scalars import Value
from sagec.runtime.roofline import Device, Link

Draw = Callable[[st.SearchStrategy[Any]], Any]

_DEVICE = Device(flops_per_s=1e9, bytes_per_s=1e9, launch_us=1.0)
_LINK = Link(bytes_per_s=1e8, latency_us=2.0)


@dataclass(frozen=True)
class Lane:
    """Rows that go through the layers together: chunks [begin, end) of prompts, then decodes, of
    which each has some tokens of context. stages: the devices of each pipeline stage."""

    prefills: tuple[tuple[int, int], ...]
    decodes: tuple[int, ...]
    stages: tuple[tuple[str, ...], ...]

    @property
    def num_prefill_rows(self) -> int:
        return sum(end - begin for begin, end in self.prefills)

    @property
    def num_rows(self) -> int:
        return self.num_prefill_rows + len(self.decodes)


@dataclass(frozen=True)
class Step:
    """A step to make a graph of. Sizes are of the whole model; tp ranks share them out.

    interleaved: whether the lanes stand in the text sublayer by sublayer, or one after another.
    moved_kv: whether the KV of the context comes from device @far by exec.kv_migrate.
    """

    lanes: tuple[Lane, ...]
    layers: int = 2
    tp: int = 1
    hidden: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 4
    width: int = 16
    vocab: int = 16
    experts: int = 0
    tier: str = "device"
    moved_kv: bool = False
    interleaved: bool = False
    phase: str = "hybrid"
    device: Device = _DEVICE
    link: Link = _LINK
    host_bytes_per_s: float = 1e8

    @property
    def devices(self) -> tuple[str, ...]:
        """All devices that its lanes name."""
        named = (device for lane in self.lanes for stage in lane.stages for device in stage)
        return tuple(dict.fromkeys(named))

    def module(self) -> ModuleOp:
        """The cluster and the graph, verified."""
        module = ModuleOp([*self._cluster(), self.graph()])
        module.verify()
        return module

    def graph(self) -> ex.ExecGraphOp:
        """The graph alone."""
        return _Writer(self).graph()

    def _cluster(self) -> Iterator[Operation]:
        yield cluster.ModelOp.named(
            "m", layers=self.layers, hidden=self.hidden, heads=self.heads, kv_heads=self.kv_heads,
            head_dim=self.head_dim, ffn=self.width, vocab=self.vocab, experts=self.experts,
            experts_per_token=min(2, self.experts),
        )  # fmt: skip
        devices = (*self.devices, "far") if self.moved_kv else self.devices
        speeds = {"flops_per_s": self.device.flops_per_s, "bytes_per_s": self.device.bytes_per_s}
        for device in devices:
            yield cluster.DeviceOp.named(device, **speeds)
        for device in devices[1:]:
            yield cluster.LinkOp.between(
                devices[0], device, bytes_per_s=self.link.bytes_per_s,
                latency_us=self.link.latency_us,
            )  # fmt: skip


class _Writer:
    """Writes the ops of a step in the order of the text."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.ops: list[Operation] = []
        self.channels = 0
        self.heads = {
            "heads": step.heads // step.tp,
            "kv_heads": step.kv_heads // step.tp,
            "head_dim": step.head_dim,
        }

    def graph(self) -> ex.ExecGraphOp:
        step, sampled = self.step, list[SSAValue]()
        lanes = [self.lane(lane, sampled) for lane in step.lanes]
        while lanes:
            if step.interleaved:
                lanes = [lane for lane in lanes if next(lane, "over") != "over"]
            else:
                for _ in lanes.pop(0):
                    pass
        ends = [*self.ops, ex.ExecYieldOp.create(operands=sampled)]
        pp = len(step.lanes[0].stages)
        return ex.ExecGraphOp.named(
            "step", ends, phase=step.phase, model="m", tp=step.tp, pp=pp, dp=len(step.lanes)
        )

    def add(
        self,
        kind: type[ex.OperatorOp],
        operands: Sequence[SSAValue],
        results: Sequence[ex.TensorType],
        *,
        flops: float = 0.0,
        weights: float = 0.0,
        columns: dict[str, Ints] | None = None,
        **scalars: Value | None,
    ) -> Any:
        """An operator that computes, with its cost: it moves its tensors and its weights once."""
        moved = weights + sum(ex.tensor_of(value).num_bytes for value in operands)
        moved += sum(result.data.num_bytes for result in results)
        costs = {
            "flops": flops, "bytes": moved, "time_us": self.step.device.operator_us(flops, moved)
        }  # fmt: skip
        return self.put(kind.of(operands, results, columns=columns, **(costs | scalars)))

    def put(self, op: ex.OperatorOp) -> Any:
        self.ops.append(op)
        return op.results[0] if len(op.results) == 1 else op.results

    def lane(self, lane: Lane, sampled: list[SSAValue]) -> Iterator[None]:
        """The ops of a lane; gives way after each sublayer."""
        step, stages = self.step, lane.stages
        first = stages[0][0]
        tokens = self.add(ex.InputOp, [], [ex.TensorType.of([lane.num_rows], "i32", first)])
        stream = self.add(ex.EmbeddingOp, [tokens], [self.rows(lane, first)])
        added = None
        for layer in range(step.layers):
            stage = layer * len(stages) // step.layers
            if stage != (layer - 1) * len(stages) // step.layers and layer:
                stream, added = (self.sent(value, stages[stage][0]) for value in (stream, added))
            yield
            stream, part = self.attention(lane, stages[stage], layer, stream, added)
            added = self.reduced(part, stages[stage], layer)
            yield
            device = stages[stage][0]
            normed, stream = self.norm(stream, added, layer)
            ffn = {"experts": step.experts // step.tp, "experts_per_token": 2}
            width = step.width if step.experts else step.width // step.tp
            part = self.add(
                ex.FFNOp, [normed], [self.rows(lane, device)], layer=layer, width=width,
                flops=6.0 * lane.num_rows * step.hidden * width,
                weights=12.0 * step.hidden * width, **(ffn if step.experts else {}),
            )  # fmt: skip
            added = self.reduced(part, stages[stage], layer)
        yield
        sampled.append(self.sample(lane, stages[-1], stream, added))

    def rows(self, lane: Lane, device: str, width: int = 0) -> ex.TensorType:
        return ex.TensorType.of([lane.num_rows, width or self.step.hidden], "f32", device)

    def norm(
        self, stream: SSAValue, added: SSAValue | None, layer: int | None
    ) -> tuple[SSAValue, SSAValue]:
        operands = [stream] if added is None else [stream, added]
        kind = stream.type
        assert isinstance(kind, ex.TensorType)
        normed, total = self.add(ex.NormOp, operands, [kind, kind], layer=layer)
        return normed, total

    def attention(
        self,
        lane: Lane,
        group: tuple[str, ...],
        layer: int,
        stream: SSAValue,
        added: SSAValue | None,
    ) -> tuple[SSAValue, SSAValue]:
        """The residual stream, and what attention adds to it on each rank."""
        step, device = self.step, group[0]
        normed, stream = self.norm(stream, added, layer)
        width = (self.heads["heads"] + 2 * self.heads["kv_heads"]) * step.head_dim
        qkv = self.add(
            ex.QKVOp, [normed], [self.rows(lane, device, width)], layer=layer,
            flops=2.0 * lane.num_rows * step.hidden * width, weights=4.0 * step.hidden * width,
            **self.heads,
        )  # fmt: skip
        parts = []
        if lane.prefills:
            begin, end = np.array(lane.prefills, np.int64).T
            columns = {"begin": np.array(begin), "end": np.array(end)}
            parts.append(self.attend(ex.PrefillAttentionOp, columns, qkv, layer, 0))
        if lane.decodes:
            columns = {"context": np.array(lane.decodes, np.int64)}
            first = lane.num_prefill_rows
            parts.append(self.attend(ex.DecodeAttentionOp, columns, qkv, layer, first))
        part = self.add(
            ex.ProjectionOp, parts, [self.rows(lane, device)], layer=layer,
            weights=4.0 * step.hidden * self.heads["heads"] * step.head_dim,
        )  # fmt: skip
        return stream, part

    def attend(
        self,
        kind: type[ex.AttentionOp],
        columns: dict[str, Ints],
        qkv: SSAValue,
        layer: int,
        first: int,
    ) -> SSAValue:
        """What some of the requests attend to; their new KV goes into the cache."""
        device, dim = ex.tensor_of(qkv).device, self.step.head_dim
        kv_heads = self.heads["kv_heads"]
        context, *ends = columns.values()
        new = ends[0] - context if ends else np.ones_like(context)
        kv = self.context(int(context.sum()), device, layer)
        rows = int(new.sum())
        attended, new_kv = self.add(
            kind, [qkv, kv],
            [ex.TensorType.of([rows, self.heads["heads"] * dim], "f32", device),
             ex.TensorType.of([rows, 2, kv_heads, dim], "f32", device)],
            columns=columns, layer=layer, first=first, **self.heads,
            flops=4.0 * float((new * (context + new)).sum()) * self.heads["heads"] * dim,
        )  # fmt: skip
        self.add(ex.KVStoreOp, [new_kv], [], layer=layer)
        return attended  # type: ignore[no-any-return]

    def context(self, tokens: int, device: str, layer: int) -> SSAValue:
        """KV of the tokens before those of the step."""
        step, shape = self.step, [tokens, 2, self.heads["kv_heads"], self.step.head_dim]
        home = "far" if step.moved_kv else device
        num_bytes = ex.Tensor(tuple(shape), "f32", home).num_bytes
        us = 1e6 * num_bytes / step.host_bytes_per_s if step.tier != "device" else 0.0
        kv = self.put(
            ex.KVLoadOp.of([], [ex.TensorType.of(shape, "f32", home)], layer=layer,
                           tier=step.tier, time_us=us, bytes=num_bytes)
        )  # fmt: skip
        if step.moved_kv:
            kv = self.put(
                ex.KVMigrateOp.of([kv], [ex.TensorType.of(shape, "f32", device)], layer=layer,
                                  time_us=step.link.send_us(num_bytes), bytes=num_bytes)
            )  # fmt: skip
        return kv  # type: ignore[no-any-return]

    def collective(
        self, op: type[ex.OperatorOp], part: SSAValue, us: float, result: ex.TensorType,
        group: tuple[str, ...], **scalars: Value | None,
    ) -> SSAValue:  # fmt: skip
        more: dict[str, Attribute] = {"ranks": ex.ranks_of(group)}
        num_bytes = ex.tensor_of(part).num_bytes
        made = op.of([part], [result], more=more, time_us=us, bytes=num_bytes, **scalars)
        return self.put(made)  # type: ignore[no-any-return]

    def reduced(self, part: SSAValue, group: tuple[str, ...], layer: int) -> SSAValue:
        """The sum over the ranks."""
        if len(group) < 2:
            return part
        us = self.step.link.all_reduce_us(ex.tensor_of(part).num_bytes, len(group))
        assert isinstance(part.type, ex.TensorType)
        return self.collective(ex.AllReduceOp, part, us, part.type, group, layer=layer)

    def sent(self, value: SSAValue, device: str) -> SSAValue:
        """The value on another device."""
        tensor, channel = ex.tensor_of(value), self.channels
        self.channels += 1
        us = self.step.link.send_us(tensor.num_bytes)
        peer: dict[str, Attribute] = {"peer": ex.ranks_of([device]).data[0]}
        self.put(ex.SendOp.of([value], [], more=peer, channel=channel, time_us=us))
        there = ex.TensorType.of(tensor.shape, tensor.dtype, device)
        back: dict[str, Attribute] = {"peer": ex.ranks_of([tensor.device]).data[0]}
        return self.put(ex.RecvOp.of([], [there], more=back, channel=channel))  # type: ignore[no-any-return]

    def sample(
        self, lane: Lane, group: tuple[str, ...], stream: SSAValue, added: SSAValue | None
    ) -> SSAValue:
        """The token after the last row of each request."""
        step, device = self.step, group[0]
        normed, _ = self.norm(stream, added, None)
        ends = np.cumsum([end - begin for begin, end in lane.prefills] + [1] * len(lane.decodes))
        vocab = step.vocab // step.tp
        logits = self.add(
            ex.LMHeadOp, [normed], [ex.TensorType.of([len(ends), vocab], "f32", device)],
            columns={"rows": np.asarray(ends - 1, np.int64)},
            flops=2.0 * len(ends) * vocab * step.hidden, weights=4.0 * vocab * step.hidden,
        )  # fmt: skip
        if len(group) > 1:
            whole = ex.TensorType.of([len(ends), step.vocab], "f32", device)
            us = step.link.all_gather_us(whole.data.num_bytes, len(group))
            logits = self.collective(ex.AllGatherOp, logits, us, whole, group, axis=1)
        tokens = ex.TensorType.of([len(ends)], "i32", device)
        return self.add(ex.SampleOp, [logits], [tokens])  # type: ignore[no-any-return]


_CHUNK = st.tuples(st.integers(0, 9), st.integers(1, 6)).map(lambda c: (c[0], c[0] + c[1]))


@st.composite
def steps(
    draw: Draw,
    *,
    tiers: Sequence[str] = ("device", "host", "disk"),
    max_lanes: int = 2,
    max_stages: int = 2,
    tps: Sequence[int] = (1, 2),
) -> Step:
    """Steps of all kinds: prompts, decodes or both; tensor and pipeline parallel; lanes of the same
    devices (micro-batches) or of devices of their own (replicas); KV near or far; experts."""
    tp, pp = draw(st.sampled_from(tps)), draw(st.integers(1, max_stages))
    count = draw(st.integers(1, max_lanes))
    own = draw(st.booleans())
    phase = draw(st.sampled_from(ex.PHASES))
    lanes = []
    for lane in range(count):
        base = lane * tp * pp if own else 0
        stages = tuple(tuple(f"g{base + s * tp + r}" for r in range(tp)) for s in range(pp))
        prefills = draw(st.lists(_CHUNK, min_size=1, max_size=3)) if phase != "decode" else []
        decodes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=5))
        lanes.append(Lane(tuple(prefills), tuple(decodes if phase != "prefill" else ()), stages))
    return Step(
        lanes=tuple(lanes),
        layers=draw(st.integers(pp, 3)),
        tp=tp,
        experts=draw(st.sampled_from([0, 0, 4])),
        tier=draw(st.sampled_from(tiers)),
        moved_kv=draw(st.booleans()) and draw(st.booleans()),
        interleaved=draw(st.booleans()),
        phase=phase,
        link=Link(draw(st.sampled_from([1e6, 1e8, 1e10])), draw(st.sampled_from([0.5, 20.0]))),
        host_bytes_per_s=draw(st.sampled_from([1e7, 1e9])),
    )
