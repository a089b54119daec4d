"""What passes make of a step, generated and run on two ranks, computes what one rank does."""

import functools
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from xdsl.dialects.builtin import ModuleOp  # noqa: E402

from sagec.compiler import passes_of  # noqa: E402
from sagec.dialects import cluster  # noqa: E402
from sagec.dialects.exec import ExecGraphOp  # noqa: E402
from sagec.lowering.torch_source import program_of  # noqa: E402
from sagec.runtime.engines import InstanceSpec  # noqa: E402
from sagec.runtime.engines.torch.batch import Span, build_batch  # noqa: E402
from sagec.runtime.engines.torch.loading import load_model, read_options  # noqa: E402
from sagec.runtime.engines.torch.native import SHORT_TOKENS  # noqa: E402
from sagec.runtime.engines.torch.program import load_program  # noqa: E402
from sagec.runtime.engines.torch.ranks import Ranks  # noqa: E402
from sagec.runtime.engines.torch.share import Share  # noqa: E402
from sagec.runtime.kv.pool import BlockPool  # noqa: E402
from sagec.universe import sagec_context  # noqa: E402
from tests.checkpoints import VOCAB, checkpoint  # noqa: E402
from tests.torch_programs import graphs_of, program  # noqa: E402

KINDS, BLOCKS, BLOCK_TOKENS = ("qwen3-tied", "qwen3-moe"), 96, 8
COUNTS = st.integers(1, 30) | st.integers(SHORT_TOKENS + 1, SHORT_TOKENS + 5)
SPANS = st.lists(st.tuples(st.integers(0, 40), COUNTS), min_size=1, max_size=6)
SLOW, FAR = {"bytes_per_s": 1e6, "latency_us": 1.0}, {"bytes_per_s": 1e9, "latency_us": 1e4}
"""Links: so slow that it pays to read all weights twice and hide half of the messages; so far that
few messages are better than early ones."""

OVERLAP, FUSE = "overlap-communication", "fuse-communication{bytes=100000}"
WAYS = {  # micro-batches, link, passes, and a pattern that must be in the code then
    "as built": (1, SLOW, "", r"ranks\.all_reduce\("),
    "fused": (2, FAR, f"{OVERLAP},{FUSE}", r"begin_all_reduce\(\[\w+, \w+\]\)"),
    "overlapped": (2, SLOW, OVERLAP, r"begin_all_reduce\(\[added_2\]\)"),
    "cut": (1, SLOW, f"{OVERLAP}{{micro_batches=2}}", r"hidden\[len\(batch_0\.tokens\) :\]"),
    "planned": (2, SLOW, f"{OVERLAP},plan-memory", r"begin_all_reduce\("),
}


def loaded(kind: str, tp: int, rank: int):
    """A rank's model; the tests give it code and KV."""
    folder = checkpoint(kind)
    options = {"tp": str(tp), "program": str(program(folder, tp))}
    spec = InstanceSpec(
        id="i0",
        engine="torch",
        model=str(folder),
        kv_blocks=BLOCKS,
        block_tokens=BLOCK_TOKENS,
        options=options,
    )
    return load_model(spec, read_options(spec), Share(rank, tp))


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def whole(kind: str):
    model = loaded(kind, 1, 0)
    model.program = None
    generator = torch.Generator().manual_seed(1)
    for layer in model.kv:
        layer.normal_(generator=generator)
    return model


@pytest.fixture(scope="module")
def shares(kind: str, tmp_path_factory):
    meeting = tmp_path_factory.mktemp("ranks") / f"meeting-{threading.get_ident()}"
    models = [loaded(kind, 2, rank) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        met = pool.map(lambda rank: Ranks(meeting, rank, 2), range(2))
    for model, ranks in zip(models, met, strict=True):
        model.ranks = ranks
    return models


@functools.cache
def program_after(kind: str, way: str):
    """The file of what the passes make of a hybrid, a prefill and a decode step of two ranks."""
    micro_batches, link, passes, telling = WAYS[way]
    devices = [cluster.DeviceOp.named(name, flops_per_s=2e10, bytes_per_s=1e10)
               for name in ("g0", "g1")]  # fmt: skip
    graphs = graphs_of(checkpoint(kind), 2, micro_batches)
    module = ModuleOp([*devices, cluster.LinkOp.between("g0", "g1", **link), *graphs])
    passes_of(passes).apply(sagec_context(), module)
    module.verify()
    text = program_of([op for op in module.body.block.ops if isinstance(op, ExecGraphOp)])
    assert re.search(telling, text), text
    path = checkpoint(kind) / f"{way.replace(' ', '-')}.py"
    path.write_text(text)
    return path


def spans_of(pool: BlockPool, spans):
    for number, (begin, count) in enumerate(spans):
        slot = pool.open_slot()
        assert pool.grow(slot, pool.blocks_for(begin + count))
        tokens = [(number * 31 + begin + at) % VOCAB for at in range(count)]
        yield Span(slot, begin, tokens, number % 2 == 0)


def step(model, spans):
    pool = BlockPool(BLOCKS, BLOCK_TOKENS)
    kernels = model.kernels
    made = list(spans_of(pool, spans))
    batch = build_batch(made, pool, torch.device("cpu"), kernels.short_tokens, kernels.padded)
    return model.forward(batch)[:, :VOCAB]


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=8, deadline=None)
@given(spans=SPANS)
def test_two_ranks_compute_what_one_does_whatever_passes_did(kind, whole, shares, way: str, spans):
    before = whole.kv
    whole.kv = [layer.clone() for layer in before]
    for rank, model in enumerate(shares):
        model.program = load_program(program_after(kind, way), model.config, tp=2)
        model.kv = [layer.chunk(2, dim=3)[rank].contiguous() for layer in before]
    expected = step(whole, spans)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda model: step(model, spans), shares))
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    together = [torch.cat(halves, dim=3) for halves in zip(*(m.kv for m in shares), strict=True)]
    for ours, theirs in zip(together, whole.kv, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    whole.kv = before
