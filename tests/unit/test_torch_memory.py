"""A step holds as much memory as plan-memory says of its graph."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from sagec.lowering.execution_graph_builder import (  # noqa: E402
    ExecutionGraphBuilder,
    Hardware,
    Parallel,
    StepTokens,
)
from sagec.passes.plan_memory import plan_memory  # noqa: E402
from sagec.runtime.compiled import Unbuilt  # noqa: E402
from sagec.runtime.engines.torch import native  # noqa: E402
from sagec.runtime.engines.torch.batch import Span, build_batch  # noqa: E402
from sagec.runtime.engines.torch.linear import Linear  # noqa: E402
from sagec.runtime.engines.torch.live_memory import peak_bytes  # noqa: E402
from sagec.runtime.kv.pool import BlockPool  # noqa: E402
from sagec.runtime.roofline import Link  # noqa: E402
from tests.checkpoints import KINDS, checkpoint  # noqa: E402
from tests.torch_engines import engine  # noqa: E402
from tests.torch_programs import BYTES_PER_S, CPU, model_of, program  # noqa: E402

try:
    native.load_library(torch.float32)
except Unbuilt as error:
    pytest.skip(f"no C kernels here, whose memory is planned: {error}", allow_module_level=True)

BLOCKS, BLOCK_TOKENS = 400, 16
WIDE = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8,
        "num_key_value_heads": 4, "max_position_embeddings": 1024, "vocab_size": 8192}  # fmt: skip
SHORT_FFN = {**WIDE, "intermediate_size": 128}
MODELS = {"llama": None, "qwen3": None, "wide": ("Llama", WIDE), "narrow-ffn": ("Llama", SHORT_FFN)}
STEPS = {
    "prefill": StepTokens(((0, 95), (0, 64)), (True, True)),
    "long prompt": StepTokens(((0, 250),), (True,)),
    "later chunk": StepTokens(((100, 250),), (True,)),
    "decode": StepTokens((), (), tuple(range(100, 124))),
    "mixed": StepTokens(((0, 70), (60, 150)), (True, False), (50,) * 20),
}


@functools.cache
def loaded(kind: str):
    folder = checkpoint(kind)
    one = engine("i0", folder, BLOCKS, BLOCK_TOKENS, program=str(program(folder, 1)))
    return one.residents.model


def batch_of(model, step: StepTokens):
    pool, spans = BlockPool(BLOCKS, BLOCK_TOKENS), []
    decodes = ((context, context + 1) for context in step.contexts)
    samples = (*step.samples, *(True for _ in step.contexts))
    for (begin, end), samples_here in zip((*step.chunks, *decodes), samples, strict=True):
        slot = pool.open_slot()
        assert pool.grow(slot, pool.blocks_for(end))
        tokens = [token % 97 for token in range(begin, end)]
        spans.append(Span(slot, begin, tokens, samples_here))
    kernels = model.kernels
    return build_batch(spans, pool, torch.device("cpu"), kernels.short_tokens, kernels.padded)


def planned_bytes(folder: Path, step: StepTokens) -> int:
    parallel = Parallel()
    hardware = Hardware.uniform(parallel, CPU, Link(BYTES_PER_S, 200.0))
    builder = ExecutionGraphBuilder(model_of(folder), parallel, hardware)
    return plan_memory(builder.build(step, name="step").op).largest.peak_bytes


def measured_bytes(kind: str, step: StepTokens) -> int:
    model = loaded(kind)
    batch = batch_of(model, step)
    model.forward(batch)  # what is made once for a process is made now
    return peak_bytes(lambda: model.forward(batch))[1]


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_step_holds_what_is_planned_for_it(kind: str, name: str, monkeypatch):
    if (shape := MODELS[kind]) is not None:
        monkeypatch.setitem(KINDS, kind, shape)
    measured = measured_bytes(kind, STEPS[name])
    assert measured == pytest.approx(planned_bytes(checkpoint(kind), STEPS[name]), rel=0.1)


def test_experts_hold_what_is_planned_where_all_tokens_go_to_the_same(monkeypatch):
    """Whom the router prefers no plan can know, so that it counts with the worst."""
    step, planned = STEPS["prefill"], planned_bytes(checkpoint("mixtral"), STEPS["prefill"])
    spread = measured_bytes("mixtral", step)
    model, biased = loaded("mixtral"), Linear(torch.zeros(4, 64), torch.arange(4.0))
    layers = tuple(
        replace(layer, ffn=replace(layer.ffn, router=biased)) for layer in model.weights.layers
    )
    monkeypatch.setattr(model, "weights", replace(model.weights, layers=layers))
    assert spread < measured_bytes("mixtral", step)
    assert measured_bytes("mixtral", step) == pytest.approx(planned, rel=0.1)


def test_memory_is_counted_while_it_is_held_and_not_before():
    before = torch.empty(10**5)
    result, peak = peak_bytes(lambda: (before * 2).sum())
    assert result.numel() == 1
    assert before.nbytes <= peak < 1.1 * before.nbytes
