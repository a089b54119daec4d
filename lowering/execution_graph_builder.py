"""From a model, a parallel layout and a step's tokens to the operators that compute it.

Every operator says what one rank does. flops: two a weight that a token passes, four a head's
element a pair of tokens that attend; norms, samples and collectives as their methods say. bytes:
the weights it reads, and each tensor that it takes or makes, once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from xdsl.dialects.builtin import SymbolRefAttr
from xdsl.ir import Attribute, Operation, SSAValue

from sagec.dialects import exec as ex
from sagec.dialects.rows import symbol
from sagec.dialects.scalars import Value
from sagec.passes.execution_graph import ExecutionGraph
from sagec.passes.topology import Model
from sagec.runtime import roofline
from sagec.runtime.cost import experts_read

Chunk = tuple[int, int]
"""The tokens [begin, end) of a prompt."""

Shape = tuple[tuple[int, ...], str]
"""A tensor's dimensions, and the type of its elements."""

_NOTHING: Mapping[str, Value] = {}


@dataclass(frozen=True)
class Parallel:
    """How a model is spread: tp ranks share each layer, pp stages share the layers, dp replicas
    share the requests.

    devices: those of replica 0, stage 0 first, rank by rank; then its next stage; then the next
    replica. Without them they are called g0, g1, ... Raises ValueError where their number is wrong.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    devices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if min(self.tp, self.pp, self.dp) < 1:
            raise ValueError(f"tp={self.tp} pp={self.pp} dp={self.dp}; each is 1 or more")
        ranks = self.tp * self.pp * self.dp
        if not self.devices:
            object.__setattr__(self, "devices", tuple(f"g{rank}" for rank in range(ranks)))
        if len(self.devices) != ranks:
            raise ValueError(
                f"tp={self.tp} pp={self.pp} dp={self.dp} is {ranks} ranks, on "
                f"{len(self.devices)} devices; each rank has its own"
            )

    def ranks(self, replica: int, stage: int) -> tuple[str, ...]:
        """The devices that share the layers of a stage of a replica.

        >>> Parallel(tp=2, pp=2).ranks(replica=0, stage=1)
        ('g2', 'g3')
        """
        begin = (replica * self.pp + stage) * self.tp
        return self.devices[begin : begin + self.tp]

    def replicas(self, stage: int) -> tuple[str, ...]:
        """The first device of a stage in each replica."""
        return tuple(self.ranks(replica, stage)[0] for replica in range(self.dp))

    def layers_of(self, stage: int, layers: int) -> range:
        """The layers of a stage, as many as each other or one more.

        >>> Parallel(pp=2).layers_of(1, layers=5)
        range(2, 5)
        """
        return range(stage * layers // self.pp, (stage + 1) * layers // self.pp)


def misfit(model: Model, parallel: Parallel) -> str | None:
    """Why a layout does not fit a model's shape, and what would; None where it does.

    KV heads split over tp, or repeat where there are more ranks than heads. Experts are whole, so
    tp * dp divides their number. The vocabulary is padded.
    """
    if model.layers < parallel.pp:
        return f"{model.layers} layers do not fill pp={parallel.pp} stages; at most {model.layers}"
    if model.experts and not 1 <= model.experts_per_token <= model.experts:
        return (
            f"{model.experts_per_token} experts_per_token of {model.experts} experts; from 1 to "
            f"{model.experts}"
        )
    if (why := _indivisible(model, parallel.tp, parallel.dp)) is None:
        return None
    fits = [tp for tp in range(1, model.heads + 1) if not _indivisible(model, tp, parallel.dp)]
    return f"{why}; what does: tp = {', '.join(map(str, fits)) or 'none'}"


def _indivisible(model: Model, tp: int, dp: int) -> str | None:
    if model.heads % tp:
        return f"{model.heads} heads do not split over tp={tp}"
    if model.kv_heads % tp and tp % model.kv_heads:
        return f"{model.kv_heads} kv_heads neither split over tp={tp} nor repeat"
    if model.experts and model.experts % (tp * dp):
        return f"{model.experts} experts do not split over tp={tp} x dp={dp}"
    if not model.experts and model.ffn % tp:
        return f"ffn {model.ffn} does not split over tp={tp}"
    return None


@dataclass(frozen=True)
class Hardware:
    """What computes, by device, and what carries messages from one device to another."""

    devices: Mapping[str, roofline.Device]
    link_between: Callable[[str, str], roofline.Link]

    @classmethod
    def uniform(cls, parallel: Parallel, device: roofline.Device, link: roofline.Link) -> Hardware:
        """All devices of a layout alike, and all links."""
        return cls(dict.fromkeys(parallel.devices, device), lambda source, target: link)

    def operator_us(self, ranks: Sequence[str], flops: float, num_bytes: float) -> float:
        """The time until the slowest rank is done."""
        return max(self.devices[rank].operator_us(flops, num_bytes) for rank in ranks)

    def ring(self, ranks: Sequence[str]) -> roofline.Link:
        """The slowest bandwidth and the longest latency of a ring of these devices."""
        return roofline.ring_of(ranks, self.link_between)


@dataclass(frozen=True)
class Tier:
    """Memory beside the device, `host` or `disk`, and what connects each rank with it."""

    name: str
    link: roofline.Link


@dataclass(frozen=True)
class StepTokens:
    """What a step computes: chunks of prompts, of which some sample, and a token a context.

    padding: tokens of nobody, so that replicas which exchange them have as many as each other;
    they decode without a context, and sample nothing.
    """

    chunks: tuple[Chunk, ...] = ()
    samples: tuple[bool, ...] = ()
    contexts: tuple[int, ...] = ()
    padding: int = 0

    @property
    def phase(self) -> str:
        """prefill, decode or hybrid."""
        if not self.contexts:
            return "prefill"
        return "hybrid" if self.chunks else "decode"

    @property
    def prompt_tokens(self) -> int:
        """The tokens of the chunks."""
        return sum(end - begin for begin, end in self.chunks)

    @property
    def tokens(self) -> int:
        """All tokens: rows of the residual stream."""
        return self.prompt_tokens + len(self.contexts) + self.padding

    @property
    def sampled_rows(self) -> list[int]:
        """The rows whose next token is sampled: the last of each chunk that ends its prompt, and
        each decode.

        >>> StepTokens(((0, 4), (3, 5)), (False, True), contexts=(9,)).sampled_rows
        [5, 6]
        """
        ends = np.cumsum([end - begin for begin, end in self.chunks], dtype=np.int64).tolist()
        rows = [end - 1 for end, samples in zip(ends, self.samples, strict=True) if samples]
        first = self.prompt_tokens
        return rows + list(range(first, first + len(self.contexts)))

    def dealt(self, count: int) -> list[StepTokens]:
        """Its requests in so many parts: each goes to the part that has fewest tokens yet."""
        if count == 1:
            return [self]
        tokens = [0] * count
        prompts: list[list[tuple[Chunk, bool]]] = [[] for _ in tokens]
        contexts: list[list[int]] = [[] for _ in tokens]
        for chunk, samples in zip(self.chunks, self.samples, strict=True):
            at = tokens.index(min(tokens))
            prompts[at].append((chunk, samples))
            tokens[at] += chunk[1] - chunk[0]
        for context in self.contexts:
            at = tokens.index(min(tokens))
            contexts[at].append(context)
            tokens[at] += 1
        return [
            StepTokens(tuple(c for c, _ in part), tuple(s for _, s in part), tuple(decodes))
            for part, decodes in zip(prompts, contexts, strict=True)
        ]


@dataclass(frozen=True)
class Share:
    """What one rank has of a model: its heads, its part of the ffn or its experts, its vocabulary.

    vocab: of one rank, rounded up: logits beyond the model's vocabulary mean nothing. Methods give
    (flops, bytes of weights).
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    experts: int
    all_experts: int
    experts_per_token: int
    weight_size: float
    dtype: str
    kv_dtype: str

    @classmethod
    def of(cls, model: Model, parallel: Parallel, dtype: str, kv_dtype: str) -> Share:
        """The share of a rank. Where tp is more than kv_heads, ranks hold the same KV head."""
        tp = parallel.tp
        computes = model.dtype if dtype == "auto" else dtype
        return cls(
            hidden=model.hidden,
            heads=model.heads // tp,
            kv_heads=max(1, model.kv_heads // tp),
            head_dim=model.head_dim,
            ffn=model.ffn if model.experts else model.ffn // tp,
            vocab=-(-model.vocab // tp),
            experts=model.experts // (tp * parallel.dp),
            all_experts=model.experts,
            experts_per_token=model.experts_per_token,
            weight_size=ex.BYTES_OF[model.dtype],
            dtype="bf16" if computes == "fp8" else computes,
            kv_dtype=model.dtype if kv_dtype == "auto" else kv_dtype,
        )

    @property
    def head_scalars(self) -> dict[str, Value]:
        """What ops are told of its heads."""
        return {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}

    @property
    def qkv_width(self) -> int:
        """Columns of queries, keys and values."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def matmul(self, rows: int, width: int, into: int) -> tuple[float, float]:
        """[rows, width] by a weight [width, into]: 2 * rows * width * into."""
        return 2.0 * rows * width * into, self.weight_size * width * into

    def dense_ffn(self, tokens: int) -> tuple[float, float]:
        """Gate, up and down: three weights [hidden, ffn of a rank]."""
        return self.matmul(tokens, self.hidden, 3 * self.ffn)

    def expert_ffn(self, tokens: int) -> tuple[float, float]:
        """The router, [hidden, all experts], and this rank's experts.

        A token goes to k of E experts, so to k * e / E of the e of this rank in the mean. Of these
        those are read that one of the tokens goes to.
        """
        flops, weights = self.matmul(tokens, self.hidden, self.all_experts)
        one_flops, one_weights = self.dense_ffn(1)
        read = self.experts * experts_read(self.all_experts, self.experts_per_token, tokens)
        flops += one_flops * tokens * self.experts_per_token * self.experts / self.all_experts
        return flops, weights + one_weights * read

    def attention_flops(self, chunks: Sequence[Chunk]) -> float:
        """4 * heads * head_dim a pair; a token attends to those before it and to itself.

        A chunk [begin, end) has (end * (end + 1) - begin * (begin + 1)) / 2 pairs.
        """
        pairs = sum(end * (end + 1) - begin * (begin + 1) for begin, end in chunks) // 2
        return 4.0 * self.heads * self.head_dim * pairs


class ExecutionGraphBuilder:
    """The operators of steps of one model on one layout.

    A dense model's replicas (dp) compute their requests beside each other and exchange nothing.

    Experts stay whole and are spread over all tp * dp ranks of a stage: an expert's matrices are
    small already, and a replica need not hold them all. So the replicas gather their tokens before
    the experts and scatter the sums behind them; for that their tokens are padded to be as many.

    micro_batches: parts of each replica's requests that follow each other through the stages.
    kv_tier: where the KV cache lies if not on the devices; then each layer's KV comes from there,
    and goes there.
    Raises ValueError for a model that does not fit the layout; see `misfit`.
    """

    def __init__(
        self,
        model: Model,
        parallel: Parallel,
        hardware: Hardware,
        *,
        dtype: str = "auto",
        kv_dtype: str = "auto",
        micro_batches: int = 1,
        kv_tier: Tier | None = None,
    ) -> None:
        if (why := misfit(model, parallel)) is not None:
            raise ValueError(f"model {symbol(model.name)}: {why}")
        if micro_batches < 1:
            raise ValueError(f"micro_batches={micro_batches}; 1 or more")
        for device in parallel.devices:
            if device not in hardware.devices:
                raise ValueError(f"nothing is known of device {symbol(device)}")
        self.model = model
        self.parallel = parallel
        self.hardware = hardware
        self.share = Share.of(model, parallel, dtype, kv_dtype)
        self.micro_batches = micro_batches
        self.kv_tier = kv_tier

    def build_prefill_graph(
        self,
        chunks: Sequence[Chunk],
        samples: Sequence[bool] | None = None,
        *,
        name: str = "prefill",
        instance: str | None = None,
    ) -> ExecutionGraph:
        """A step of chunks of prompts, the tokens [begin, end) of each. samples: whether the chunk
        ends its prompt; all do where nobody says."""
        return self.build(_tokens("prefill", chunks, samples, ()), name=name, instance=instance)

    def build_decode_graph(
        self, contexts: Sequence[int], *, name: str = "decode", instance: str | None = None
    ) -> ExecutionGraph:
        """A step of one token of each request, which has so many tokens of KV before it."""
        return self.build(_tokens("decode", (), None, contexts), name=name, instance=instance)

    def build_hybrid_graph(
        self,
        chunks: Sequence[Chunk],
        contexts: Sequence[int],
        samples: Sequence[bool] | None = None,
        *,
        name: str = "hybrid",
        instance: str | None = None,
    ) -> ExecutionGraph:
        """A step of both: the rows of the chunks come first."""
        tokens = _tokens("hybrid", chunks, samples, contexts)
        return self.build(tokens, name=name, instance=instance)

    def build(self, step: StepTokens, *, name: str, instance: str | None = None) -> ExecutionGraph:
        """The graph `@name` of a step of any phase. instance: the one that it runs on."""
        ops: list[Operation] = []
        channels = itertools.count()
        lanes = []
        for parts in self._micro_batches(step):
            beside = [_Lane(self, replica, part, ops, channels) for replica, part in parts]
            for _ in itertools.zip_longest(*(lane.write() for lane in beside)):
                pass  # each lane writes what is before the next exchange with the others
            lanes += beside
        sampled = [token for lane in lanes for token in lane.sampled]
        ops.append(ex.ExecYieldOp.create(operands=sampled))
        layout = self.parallel
        graph = ex.ExecGraphOp.named(
            name, ops, phase=step.phase, model=self.model.name, instance=instance,
            tp=layout.tp, pp=layout.pp, dp=layout.dp,
        )  # fmt: skip
        return ExecutionGraph(graph)

    def _micro_batches(self, step: StepTokens) -> list[list[tuple[int, StepTokens]]]:
        """Of each micro-batch, what the replicas compute that have any tokens in it."""
        dealt = [part.dealt(self.micro_batches) for part in step.dealt(self.parallel.dp)]
        found = []
        for parts in zip(*dealt, strict=True):
            most = max(part.tokens for part in parts) if self.model.experts else 0
            padded = [replace(part, padding=max(0, most - part.tokens)) for part in parts]
            found.append([(at, part) for at, part in enumerate(padded) if part.tokens])
        return found


def _tokens(
    phase: str, chunks: Sequence[Chunk], samples: Sequence[bool] | None, contexts: Sequence[int]
) -> StepTokens:
    """The step's tokens. Raises ValueError for chunks and contexts that no step has."""
    samples = [True] * len(chunks) if samples is None else samples
    if len(samples) != len(chunks):
        raise ValueError(f"{len(chunks)} chunks and {len(samples)} samples; one each")
    for begin, end in chunks:
        if not 0 <= begin < end:
            raise ValueError(f"chunk [{begin}, {end}) is empty; begin is before end")
    if contexts and min(contexts) < 0:
        raise ValueError(f"context {min(contexts)}; 0 or more tokens")
    if (phase != "decode" and not chunks) or (phase != "prefill" and not contexts):
        raise ValueError(
            f"a {phase} step of {len(chunks)} chunks and {len(contexts)} decodes; prefill has "
            "chunks, decode has decodes, hybrid has both"
        )
    return StepTokens(tuple(chunks), tuple(samples), tuple(contexts))


@dataclass
class _Lane:
    """Writes the ops of what a replica computes in a micro-batch, stage by stage.

    ops: where it writes them. sampled: the tokens that it samples.
    """

    builder: ExecutionGraphBuilder
    replica: int
    step: StepTokens
    ops: list[Operation]
    channels: Iterator[int]
    stage: int = 0
    sampled: Sequence[SSAValue] = ()

    def write(self) -> Iterator[None]:
        """Write all; stops before each exchange with other replicas, so that theirs comes next."""
        tokens = self.step.tokens
        (ids,) = self._add(ex.InputOp, (), [((tokens,), "i32")])
        rows = self.share.weight_size * tokens * self.share.hidden
        (hidden,) = self._compute(ex.EmbeddingOp, (ids,), [self._stream()], more_bytes=rows)
        stream: tuple[SSAValue, ...] = (hidden,)
        for stage in range(self.builder.parallel.pp):
            if stage:
                stream = self._hand_over(stream, stage)
            for layer in self.builder.parallel.layers_of(stage, self.builder.model.layers):
                stream = yield from self._layer(layer, stream)
        self.sampled = self._sample(stream)

    @property
    def share(self) -> Share:
        return self.builder.share

    @property
    def ranks(self) -> tuple[str, ...]:
        """The devices of the stage."""
        return self.builder.parallel.ranks(self.replica, self.stage)

    def _stream(self) -> Shape:
        """The shape of the residual stream."""
        return (self.step.tokens, self.share.hidden), self.share.dtype

    def _layer(
        self, layer: int, stream: tuple[SSAValue, ...]
    ) -> Generator[None, None, tuple[SSAValue, ...]]:
        """A layer: of the stream, and what the layer before adds to it, the same again."""
        normed, hidden = self._norm(stream, layer)
        added = self._attention(normed, layer)
        normed, hidden = self._norm((hidden, added), layer)
        added = yield from self._ffn(normed, layer)
        return hidden, added

    def _norm(self, stream: tuple[SSAValue, ...], layer: int | None) -> list[SSAValue]:
        """4 operations an element, and one to add; without, the sum is the stream as it was."""
        (tokens, hidden), _ = self._stream()
        adds = len(stream) - 1
        flops = (4.0 + adds) * tokens * hidden
        more_bytes = self.share.weight_size * hidden
        if not adds:
            more_bytes -= ex.tensor_of(stream[0]).num_bytes
        shapes = [self._stream(), self._stream()]
        return self._compute(ex.NormOp, stream, shapes, layer=layer, flops=flops,
                             more_bytes=more_bytes)  # fmt: skip

    def _attention(self, normed: SSAValue, layer: int) -> SSAValue:
        share, step = self.share, self.step
        flops, weights = share.matmul(step.tokens, share.hidden, share.qkv_width)
        shape = ((step.tokens, share.qkv_width), share.dtype)
        (qkv,) = self._compute(ex.QKVOp, (normed,), [shape], layer=layer, flops=flops,
                               more_bytes=weights, scalars=share.head_scalars)  # fmt: skip
        attended = []
        if step.chunks:
            begin, end = zip(*step.chunks, strict=True)
            attended.append(self._attend(ex.PrefillAttentionOp, qkv, step.chunks, 0, layer,
                                         {"begin": begin, "end": end}))  # fmt: skip
        if contexts := (*step.contexts, *(0,) * step.padding):
            chunks = [(context, context + 1) for context in contexts]
            attended.append(self._attend(ex.DecodeAttentionOp, qkv, chunks, step.prompt_tokens,
                                         layer, {"context": contexts}))  # fmt: skip
        flops, weights = share.matmul(step.tokens, share.heads * share.head_dim, share.hidden)
        (added,) = self._compute(ex.ProjectionOp, attended, [self._stream()], layer=layer,
                                 flops=flops, more_bytes=weights)  # fmt: skip
        return self._all_reduce(added, layer)

    def _attend(
        self,
        kind: type[ex.AttentionOp],
        qkv: SSAValue,
        chunks: Sequence[Chunk],
        first: int,
        layer: int,
        columns: Mapping[str, Sequence[int]],
    ) -> SSAValue:
        """Load KV from the cache, attend, store the new KV: what is attended."""
        share = self.share
        rows = sum(end - begin for begin, end in chunks)
        context = sum(begin for begin, _ in chunks)
        of_kv = (2, share.kv_heads, share.head_dim)
        kv = self._load(((context, *of_kv), share.kv_dtype), layer)
        shapes = [
            ((rows, share.heads * share.head_dim), share.dtype),
            ((rows, *of_kv), share.kv_dtype),
        ]
        others = (self.step.tokens - rows) * share.qkv_width * ex.BYTES_OF[share.dtype]
        scalars = share.head_scalars | ({"first": first} if first else {})
        attended, new = self._compute(
            kind, (qkv, kv), shapes, layer=layer, flops=share.attention_flops(chunks),
            more_bytes=-others, columns=columns, scalars=scalars,
        )  # fmt: skip
        self._store(new, layer)
        return attended

    def _load(self, shape: Shape, layer: int) -> SSAValue:
        """KV of a layer: where it lies on the device, it costs nothing."""
        tier = self.builder.kv_tier
        if tier is None:
            (kv,) = self._add(ex.KVLoadOp, (), [shape], layer=layer)
            return kv
        size = ex.Tensor(*shape, "").num_bytes
        (kv,) = self._add(ex.KVLoadOp, (), [shape], layer=layer, us=tier.link.send_us(size),
                          num_bytes=size, scalars={"tier": tier.name})  # fmt: skip
        return kv

    def _store(self, new: SSAValue, layer: int) -> None:
        """New KV of a layer: read, and written to the cache."""
        tier, size = self.builder.kv_tier, ex.tensor_of(new).num_bytes
        if tier is None:
            self._compute(ex.KVStoreOp, (new,), [], layer=layer, more_bytes=size)
        else:
            self._add(ex.KVStoreOp, (new,), [], layer=layer, us=tier.link.send_us(size),
                      num_bytes=size, scalars={"tier": tier.name})  # fmt: skip

    def _ffn(self, normed: SSAValue, layer: int) -> Generator[None, None, SSAValue]:
        share = self.share
        if share.experts:
            added = yield from self._experts(normed, layer)
            return self._all_reduce(added, layer)
        flops, weights = share.dense_ffn(self.step.tokens)
        (added,) = self._compute(ex.FFNOp, (normed,), [self._stream()], layer=layer, flops=flops,
                                 more_bytes=weights, scalars={"width": share.ffn})  # fmt: skip
        return self._all_reduce(added, layer)

    def _experts(self, normed: SSAValue, layer: int) -> Generator[None, None, SSAValue]:
        """The experts of this rank, of the tokens of all replicas."""
        share, replicas = self.share, self.builder.parallel.replicas(self.stage)
        spread = len(replicas) > 1
        if spread:
            yield
            normed = self._collective(ex.AllGatherOp, normed, replicas, layer)
        tensor = ex.tensor_of(normed)
        flops, weights = share.expert_ffn(tensor.shape[0])
        scalars = {"width": share.ffn, "experts": share.experts,
                   "experts_per_token": share.experts_per_token}  # fmt: skip
        (added,) = self._compute(ex.FFNOp, (normed,), [(tensor.shape, tensor.dtype)], layer=layer,
                                 flops=flops, more_bytes=weights, scalars=scalars)  # fmt: skip
        if spread:
            yield
            added = self._collective(ex.ReduceScatterOp, added, replicas, layer)
        return added

    def _all_reduce(self, added: SSAValue, layer: int) -> SSAValue:
        if len(self.ranks) == 1:
            return added
        return self._collective(ex.AllReduceOp, added, self.ranks, layer)

    def _collective(
        self,
        kind: type[ex.CollectiveOp],
        value: SSAValue,
        ranks: tuple[str, ...],
        layer: int | None,
        axis: int = 0,
    ) -> SSAValue:
        """A collective along a ring. bytes: what a rank sends: a share of all that there is, at
        each of ranks - 1 hops, and twice as much to reduce and gather."""
        tensor, count = ex.tensor_of(value), len(ranks)
        ring, rounds, size = self.builder.hardware.ring(ranks), 1, tensor.shape[axis]
        match kind:
            case ex.AllReduceOp:
                rounds = 2
            case ex.AllGatherOp:
                size *= count
            case _:
                size //= count
        shape = (*tensor.shape[:axis], size, *tensor.shape[axis + 1 :])
        whole = max(tensor.num_bytes, ex.Tensor(shape, tensor.dtype, "").num_bytes)
        (result,) = self._add(
            kind, (value,), [(shape, tensor.dtype)], layer=layer,
            us=rounds * ring.all_gather_us(whole, count),
            num_bytes=rounds * whole * (count - 1) / count,
            more={"ranks": ex.ranks_of(ranks)},
            scalars={} if kind is ex.AllReduceOp else {"axis": axis},
        )  # fmt: skip
        return result

    def _hand_over(self, stream: tuple[SSAValue, ...], stage: int) -> tuple[SSAValue, ...]:
        """The stream and what is to be added, to the next stage: each rank to its like."""
        before, here = self.ranks[0], self.builder.parallel.ranks(self.replica, stage)[0]
        link = self.builder.hardware.link_between(before, here)
        ends = [(value, {"channel": next(self.channels)}) for value in stream]
        for value, channel in ends:
            size = ex.tensor_of(value).num_bytes
            self._add(ex.SendOp, (value,), [], us=link.send_us(size), num_bytes=size,
                      more={"peer": SymbolRefAttr(here)}, scalars=channel)  # fmt: skip
        self.stage = stage
        received: list[SSAValue] = []
        for value, channel in ends:
            tensor = ex.tensor_of(value)
            received += self._add(
                ex.RecvOp, (), [(tensor.shape, tensor.dtype)], num_bytes=tensor.num_bytes,
                more={"peer": SymbolRefAttr(before)}, scalars=channel,
            )  # fmt: skip
        return tuple(received)

    def _sample(self, stream: tuple[SSAValue, ...]) -> list[SSAValue]:
        """The last norm, logits of the rows that sample, and their next tokens: an operation a
        logit."""
        share, rows = self.share, self.step.sampled_rows
        if not rows:
            return []
        normed, _ = self._norm(stream, None)
        flops, weights = share.matmul(len(rows), share.hidden, share.vocab)
        others = (self.step.tokens - len(rows)) * share.hidden * ex.BYTES_OF[share.dtype]
        shape = ((len(rows), share.vocab), share.dtype)
        (logits,) = self._compute(ex.LMHeadOp, (normed,), [shape], flops=flops,
                                  more_bytes=weights - others, columns={"rows": rows})  # fmt: skip
        if len(self.ranks) > 1:
            logits = self._collective(ex.AllGatherOp, logits, self.ranks, None, axis=1)
        flops = float(math.prod(ex.tensor_of(logits).shape))
        return self._compute(ex.SampleOp, (logits,), [((len(rows),), "i32")], flops=flops)

    def _compute(
        self,
        kind: type[ex.OperatorOp],
        operands: Sequence[SSAValue],
        shapes: Sequence[Shape],
        *,
        layer: int | None = None,
        flops: float = 0.0,
        more_bytes: float = 0.0,
        columns: Mapping[str, Sequence[int]] | None = None,
        scalars: Mapping[str, Value] = _NOTHING,
    ) -> list[SSAValue]:
        """An operator that computes. more_bytes: what it moves beside its operands and results, as
        weights; less than 0 where it does not take all of an operand."""
        made = [ex.Tensor(shape, dtype, "").num_bytes for shape, dtype in shapes]
        moved = more_bytes + sum(made) + sum(ex.tensor_of(value).num_bytes for value in operands)
        us = self.builder.hardware.operator_us(self.ranks, flops, moved)
        return self._add(kind, operands, shapes, us=us, layer=layer, flops=flops, num_bytes=moved,
                         columns=columns, scalars=scalars)  # fmt: skip

    def _add(
        self,
        kind: type[ex.OperatorOp],
        operands: Sequence[SSAValue],
        shapes: Sequence[Shape],
        *,
        us: float = 0.0,
        layer: int | None = None,
        flops: float = 0.0,
        num_bytes: float = 0.0,
        columns: Mapping[str, Sequence[int]] | None = None,
        more: dict[str, Attribute] | None = None,
        scalars: Mapping[str, Value] = _NOTHING,
    ) -> list[SSAValue]:
        """An op on the first rank of the stage; what costs nothing says nothing of it."""
        costs = {"time_us": round(us, 3) or None, "flops": round(flops) or None,
                 "bytes": round(num_bytes) or None}  # fmt: skip
        op = kind.of(
            operands,
            [ex.TensorType.of(shape, dtype, self.ranks[0]) for shape, dtype in shapes],
            columns={name: np.array(column, np.int64) for name, column in (columns or {}).items()},
            more=more,
            layer=layer,
            **costs,
            **scalars,
        )
        self.ops.append(op)
        return list(op.results)
