"""The kernels in C: equal to those in torch, and done without where they cannot be built."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from sagec.runtime.compiled import Unbuilt  # noqa: E402
from sagec.runtime.engines import EngineError  # noqa: E402
from sagec.runtime.engines.torch import native  # noqa: E402
from sagec.runtime.engines.torch.batch import Span, build_batch  # noqa: E402
from sagec.runtime.engines.torch.checkpoint import LayerWeights  # noqa: E402
from sagec.runtime.engines.torch.config import ModelConfig, Rope  # noqa: E402
from sagec.runtime.engines.torch.ffn import FFN  # noqa: E402
from sagec.runtime.engines.torch.kernels import TorchKernels, attention  # noqa: E402
from sagec.runtime.engines.torch.linear import Linear  # noqa: E402
from sagec.runtime.engines.torch.rope import rope_table  # noqa: E402
from sagec.runtime.kv.pool import BlockPool  # noqa: E402
from tests.checkpoints import checkpoint  # noqa: E402
from tests.torch_engines import engine  # noqa: E402

try:
    native.load_library(torch.float32)
except Unbuilt as error:
    pytest.skip(f"no C kernels here: {error}", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
SHAPES = [(1, 1, 8), (4, 2, 64), (8, 2, 64), (14, 2, 64), (4, 2, 128), (8, 2, 128), (8, 1, 128)]
SHAPES += [(6, 2, 24), (3, 3, 32)]


def config_of(heads: int, kv_heads: int, head_dim: int) -> ModelConfig:
    return ModelConfig(
        architecture="qwen3",
        vocab=10,
        hidden=heads * head_dim,
        ffn=16,
        layers=1,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_context_tokens=512,
        norm_eps=1e-6,
        rope=Rope(kind="default", theta=1e4),
        qkv_bias=False,
        output_bias=False,
        ffn_bias=False,
        qk_norm=True,
        tied=True,
        dtype="float32",
    )


def layer_of(config: ModelConfig, dtype, *, normed: bool) -> LayerWeights:
    nothing = torch.ones(1, 1, dtype=dtype)
    linear = Linear(nothing, None)
    norm = torch.linspace(0.5, 1.5, config.head_dim).to(dtype) if normed else None
    return LayerWeights(nothing, linear, norm, norm, linear, nothing, FFN(linear, linear))


def random(*shape: int, dtype, seed: int = 0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


COUNTS = st.integers(1, 12) | st.integers(native.SHORT_TOKENS - 2, native.SHORT_TOKENS + 2)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    spans=st.lists(st.tuples(st.integers(0, 60), COUNTS), min_size=1, max_size=5),
    block_tokens=st.sampled_from([1, 5, 16]),
    normed=st.booleans(),
)
def test_attention_in_c_is_that_of_torch(dtype, shape, spans, block_tokens: int, normed: bool):
    config = config_of(*shape)
    heads, kv_heads, head_dim = shape
    pool = BlockPool(640, block_tokens)
    rope = rope_table(config.rope, head_dim, 512, dtype)
    plain = TorchKernels(config, rope)
    made = []
    for begin, count in spans:
        slot = pool.open_slot()
        assert pool.grow(slot, pool.blocks_for(begin + count))
        made.append(Span(slot, begin, [0] * count, True))
    before = random(640, block_tokens, 2, kv_heads, head_dim, dtype=dtype)
    layer = layer_of(config, dtype, normed=normed)
    results = []
    for kernels in (plain, native.NativeKernels(config, rope, block_tokens, plain)):
        batch = build_batch(made, pool, torch.device("cpu"), kernels.short_tokens, kernels.padded)
        tokens = len(batch.tokens)
        order = torch.argsort(torch.from_numpy(batch.slots).long(), stable=True)
        qkv = torch.empty(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
        qkv[order] = random(*qkv.shape, dtype=dtype, seed=1)
        kv = before.clone()
        kernels.begin_step(batch)
        out = attention(kernels, qkv, kv, batch, layer)
        results.append((out[order].float(), kv.float()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=CLOSE[dtype], atol=CLOSE[dtype])


@pytest.mark.parametrize(
    ("begin", "count", "is_short"),
    [(9000, 1, True), (4095, 2, False), (4094, 2, True), (0, 64, True), (0, 65, False)],
)
def test_a_span_is_short_where_it_attends_to_little(begin: int, count: int, is_short: bool):
    pool = BlockPool(600, 16)
    slot = pool.open_slot()
    assert pool.grow(slot, pool.blocks_for(begin + count))
    span = Span(slot, begin, [0] * count, True)
    batch = build_batch([span], pool, torch.device("cpu"), native.SHORT_TOKENS, False)
    assert (batch.num_short, len(batch.chunks)) == ((count, 0) if is_short else (0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_gates_in_c_are_those_of_torch(dtype):
    config = config_of(4, 2, 64)
    rope = rope_table(config.rope, 64, 16, dtype)
    plain = TorchKernels(config, rope)
    fast = native.NativeKernels(config, rope, 16, plain)
    x, added = (random(7, 256, dtype=dtype, seed=seed) for seed in (1, 2))
    weight = torch.linspace(0.1, 2, 256).to(dtype)
    for extra in (None, added):
        left, right = x.clone(), x.clone()
        close = {"rtol": CLOSE[dtype], "atol": CLOSE[dtype]}
        torch.testing.assert_close(
            fast.add_norm(left, extra, weight), plain.add_norm(right, extra, weight), **close
        )
        torch.testing.assert_close(left, right, **close)
    gates = random(7, 300, dtype=dtype) * 30
    gates[0, :4] = torch.tensor([-1e4, 1e4, 0.0, -88.0]).to(dtype)
    ours, theirs = (kernels.silu_multiply(gates.clone()) for kernels in (fast, plain))
    torch.testing.assert_close(ours, theirs, **close)


def rebuild(monkeypatch: pytest.MonkeyPatch, folder: Path, compiler: str) -> None:
    """Begin with an empty cache and another compiler."""
    monkeypatch.delenv("SAGEC_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setenv("CC", compiler)
    native.load_library.cache_clear()


@pytest.fixture(autouse=True)
def forget_builds():
    yield
    native.load_library.cache_clear()


def test_a_build_is_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rebuild(monkeypatch, tmp_path, "cc")
    native.load_library(torch.float32)
    assert len(list((tmp_path / "sagec").glob("*.so"))) == 1
    rebuild(monkeypatch, tmp_path, "no-such-compiler")
    native.load_library(torch.float32)


def test_without_a_compiler_the_engine_computes_in_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rebuild(monkeypatch, tmp_path, "no-such-compiler")
    made = engine("i0", checkpoint("llama"))
    assert isinstance(made.residents.model.kernels, TorchKernels)
    with pytest.raises(EngineError, match="native on: no C compiler"):
        engine("i0", checkpoint("llama"), native="on")


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'error: out of cheese' >&2\nexit 1\n")
    broken.chmod(0o755)
    rebuild(monkeypatch, tmp_path, str(broken))
    with pytest.raises(EngineError, match=r"native on: .* failed: error: out of cheese"):
        engine("i0", checkpoint("llama"), native="on")
    assert not list((tmp_path / "sagec").glob("*.so"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "sagec").write_text("a file where a folder should be")
    rebuild(monkeypatch, tmp_path, "cc")
    with pytest.raises(
        EngineError, match=r"native on: .*sagec cannot keep what is built: it is no folder"
    ):
        engine("i0", checkpoint("llama"), native="on")
