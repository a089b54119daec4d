"""Generated programs compute what the hand-written layers compute, and no wrong file is run."""

import contextlib
import functools
import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from sagec.cli import main  # noqa: E402
from sagec.lowering.torch_source import MAGIC as WRITTEN_MAGIC  # noqa: E402
from sagec.lowering.torch_source import program_of  # noqa: E402
from sagec.runtime.engines import EngineError  # noqa: E402
from sagec.runtime.engines.torch.batch import Span, build_batch  # noqa: E402
from sagec.runtime.engines.torch.config import read_config  # noqa: E402
from sagec.runtime.engines.torch.lanes import lanes_of  # noqa: E402
from sagec.runtime.engines.torch.native import SHORT_TOKENS  # noqa: E402
from sagec.runtime.engines.torch.program import MAGIC, load_program  # noqa: E402
from sagec.runtime.kv.pool import BlockPool  # noqa: E402
from tests.checkpoints import KINDS, VOCAB, checkpoint  # noqa: E402
from tests.torch_engines import engine  # noqa: E402
from tests.torch_programs import graphs_of, program  # noqa: E402

BLOCKS, BLOCK_TOKENS = 96, 8
COUNTS = st.integers(1, 30) | st.integers(SHORT_TOKENS + 1, SHORT_TOKENS + 5)
SPANS = st.lists(st.tuples(st.integers(0, 40), COUNTS), min_size=1, max_size=6)
STEPS = {
    "one prompt": [(0, 70)],
    "chunks": [(0, 70), (16, 80), (9, 65)],
    "short prompts": [(0, 30), (16, 20)],
    "decodes": [(5, 1), (40, 1), (0, 1)],
    "both": [(0, 70), (7, 1), (3, 12), (31, 1), (8, 2)],
}


@functools.cache
def model_of(kind: str, native: str):
    """A model with a program, and with KV that is not all zeros."""
    folder = checkpoint(kind)
    one = engine("i0", folder, BLOCKS, BLOCK_TOKENS, native=native, program=str(program(folder, 1)))
    model = one.residents.rank.model
    generator = torch.Generator().manual_seed(1)
    for layer in model.kv:
        layer.normal_(generator=generator)
    return model


def batch_of(model, spans: list[tuple[int, int]]):
    """The tokens [begin, begin + count) of as many requests, of which every other one samples."""
    pool = BlockPool(BLOCKS, BLOCK_TOKENS)
    made = []
    for number, (begin, count) in enumerate(spans):
        slot = pool.open_slot()
        assert pool.grow(slot, pool.blocks_for(begin + count))
        tokens = [(number * 31 + begin + at) % VOCAB for at in range(count)]
        made.append(Span(slot, begin, tokens, number % 2 == 0))
    kernels = model.kernels
    return build_batch(made, pool, torch.device("cpu"), kernels.short_tokens, kernels.padded)


def computed(model, batch, code):
    """Logits and KV of a step that is computed by a program, or by hand where there is none."""
    before, model.program = model.kv, code
    model.kv = [layer.clone() for layer in before]
    try:
        return [model.forward(batch), *model.kv]
    finally:
        model.kv = before


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("native", ["auto", "off"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_program_gives_the_bits_of_the_layers_that_it_replaces(kind: str, native: str, step: str):
    model = model_of(kind, native)
    code = load_program(program(checkpoint(kind), 1), model.config, tp=1)
    batch = batch_of(model, STEPS[step])
    by_program, by_hand = computed(model, batch, code), computed(model, batch, None)
    for ours, theirs in zip(by_program, by_hand, strict=True):
        assert torch.equal(ours, theirs)


def test_the_function_is_chosen_by_what_the_batch_holds():
    model = model_of("llama", "auto")
    code = load_program(program(checkpoint("llama"), 1), model.config, tp=1)
    chosen = {step: code.function(batch_of(model, spans)).__name__ for step, spans in STEPS.items()}
    assert chosen == {
        "one prompt": "prefill",
        "chunks": "prefill",
        "short prompts": "decode",
        "decodes": "decode",
        "both": "hybrid",
    }


SAGE = """
model m from "FOLDER"
cluster desk {
  device c0 kind cpu
  instance i0 role both on c0 engine torch kv_blocks 64
}
serve on desk { request "a" tokens 20 generate 4 }
"""


@pytest.mark.parametrize("kind", ["qwen3", "mixtral", "qwen3-moe"])
def test_code_compiled_for_a_checkpoint_fits_it_alone(kind: str, tmp_path: Path):
    file, out = tmp_path / "serve.sage", tmp_path / "steps.py"
    file.write_text(SAGE.replace("FOLDER", str(checkpoint(kind))))
    assert main(["compile", str(file), "--emit", "torch", "-o", str(out)]) == 0
    for other in ("qwen3", "mixtral", "qwen3-moe"):
        config = read_config(checkpoint(other))
        with contextlib.nullcontext() if other == kind else pytest.raises(EngineError):
            assert load_program(out, config, tp=1).hybrid


@settings(max_examples=40, deadline=None)
@given(spans=SPANS, native=st.sampled_from(["auto", "off"]), count=st.integers(2, 3))
def test_lanes_compute_what_the_whole_batch_does(spans, native: str, count: int):
    """Products of other numbers of rows may round in another way."""
    model = model_of("qwen3", native)
    batch = batch_of(model, spans)
    code = load_program(lanes_program("qwen3", count), model.config, tp=1)
    by_lanes, by_hand = computed(model, batch, code), computed(model, batch, None)
    for ours, theirs in zip(by_lanes, by_hand, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@functools.cache
def lanes_program(kind: str, count: int) -> Path:
    path = checkpoint(kind) / f"lanes-{count}.py"
    path.write_text(program_of(graphs_of(checkpoint(kind), 1, count)))
    return path


@given(spans=SPANS, count=st.integers(1, 4))
def test_lanes_hold_each_request_once_and_whole(spans, count: int):
    model = model_of("llama", "off")
    batch = batch_of(model, spans)
    lanes = lanes_of(batch, count)
    assert len(lanes) == count
    lanes = [half for lane in lanes for half in lanes_of(lane, 2)]
    assert torch.equal(torch.cat([lane.tokens for lane in lanes]), batch.tokens)
    assert sum((lane.samplers for lane in lanes), ()) == batch.samplers
    assert sum(lane.num_short for lane in lanes) == batch.num_short
    assert sum(len(lane.chunks) for lane in lanes) == len(batch.chunks)
    owners = [set(lane.slots.tolist()) for lane in lanes]
    assert sum(map(len, owners)) == len(set().union(*owners)) == len(spans)
    rows = [bucket.tokens for lane in lanes for bucket in lane.buckets]
    assert sum(map(len, rows)) == batch.num_short


def changed(text: str, old: str, new: str, signed: bool = True) -> str:
    """A program with another text in it, and a checksum that fits where it is signed."""
    assert old in text
    text = text.replace(old, new)
    body = text.partition("\n")[2]
    return f"{MAGIC}{hashlib.sha256(body.encode()).hexdigest()}\n{body}" if signed else text


WRONG = {
    "another model": (lambda t: changed(t, '"layers": 2', '"layers": 4'), "layers 4.*model has 2"),
    "experts": (
        lambda t: changed(t, '"ffn": 112,', '"ffn": 112, "experts": 4,'),
        "experts 4.*has 0",
    ),
    "another layout": (lambda t: changed(t, '"tp": 1', '"tp": 2'), "tp 2.*model has 1"),
    "no shape": (lambda t: changed(t, "SHAPE =", "OTHER ="), "does not say for what SHAPE"),
    "no hybrid": (lambda t: changed(t, "def hybrid", "def mixed"), "no function hybrid"),
    "edited": (lambda t: changed(t, "added", "summed", signed=False), "not as it was generated"),
    "cut short": (lambda t: t[: len(t) // 2], "not as it was generated"),
    "empty": (lambda t: "", "begins with ''"),
    "something else": (lambda t: "import os\n", "begins with 'import os'"),
    "not text": (lambda t: b"\xff\xfe", "not UTF-8"),
    "no file": (lambda t: None, "No such file"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_program_that_does_not_fit_is_refused_in_one_line(what: str, tmp_path: Path):
    change, said = WRONG[what]
    path, content = tmp_path / "p.py", change(program(checkpoint("llama"), 1).read_text())
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(EngineError, match=said) as error:
        engine("i0", checkpoint("llama"), program=str(path))
    assert str(error.value).startswith(f"instance 'i0': program {path}: ")
    assert "\n" not in str(error.value)


def test_a_program_is_compiled_once():
    model, path = model_of("llama", "auto"), program(checkpoint("llama"), 1)
    one, other = (load_program(path, model.config, tp=1) for _ in range(2))
    assert one.hybrid is other.hybrid


def test_writer_and_reader_agree_on_the_first_line():
    assert WRITTEN_MAGIC == MAGIC
