"""Collectives of ranks, who holds what of a model, and ranks that do not come up or go away."""

import contextlib
import hashlib
import os
import re
import resource
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from sagec.runtime.engines import EngineError, Failed, InstanceSpec  # noqa: E402
from sagec.runtime.engines.torch import ranks as module  # noqa: E402
from sagec.runtime.engines.torch.checkpoint import load_weights  # noqa: E402
from sagec.runtime.engines.torch.config import read_config  # noqa: E402
from sagec.runtime.engines.torch.kernels import TorchKernels, feed_forward  # noqa: E402
from sagec.runtime.engines.torch.program import MAGIC  # noqa: E402
from sagec.runtime.engines.torch.rank_processes import RankProcesses  # noqa: E402
from sagec.runtime.engines.torch.ranks import RankLost, Ranks  # noqa: E402
from sagec.runtime.engines.torch.share import Share  # noqa: E402
from tests.checkpoints import VOCAB, checkpoint  # noqa: E402
from tests.torch_engines import engine, plan, request  # noqa: E402
from tests.torch_programs import program  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=4)


def on_all(ranks, do):
    """What each rank gives, all of them at work at the same time."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(do, ranks))


def met(folder: Path, size: int) -> list[Ranks]:
    meeting = folder / f"meeting-{size}-{threading.get_ident()}"
    return on_all(range(size), lambda rank: Ranks(meeting, rank, size))


@pytest.fixture(scope="module", params=[2, 3, 4])
def ranks(request, tmp_path_factory):
    return met(tmp_path_factory.mktemp("ranks"), request.param)


def integers(shape, seed: int, dtype):
    """Small whole numbers, whose sums no type rounds."""
    made = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 8, shape, generator=made).to(dtype)


@settings(max_examples=20, deadline=None)
@given(shapes=SHAPES, dtype=st.sampled_from(DTYPES), turned=st.booleans())
def test_an_all_reduce_of_several_tensors_leaves_each_ranks_sum_in_place(
    ranks, shapes, dtype, turned
):
    """turned: tensors that are not contiguous, as slices of a step's tensors may be."""

    def make(rank: int):
        made = [integers(shape, seed + 10 * rank, dtype) for seed, shape in enumerate(shapes)]
        return [m.transpose(0, -1).contiguous().transpose(0, -1) if turned else m for m in made]

    expected = [sum(parts) for parts in zip(*(make(rank.rank) for rank in ranks), strict=True)]
    given_to = {rank.rank: make(rank.rank) for rank in ranks}
    before = [rank.statistics() for rank in ranks]
    on_all(ranks, lambda rank: rank.all_reduce(given_to[rank.rank]))
    for rank, old in zip(ranks, before, strict=True):
        for tensor, total in zip(given_to[rank.rank], expected, strict=True):
            assert torch.equal(tensor, total)
        new = rank.statistics()
        assert (new.messages - old.messages, new.tensors - old.tensors) == (1, len(shapes))
        assert new.sent_bytes - old.sent_bytes == sum(tensor.nbytes for tensor in expected)
        assert new.waited_us > old.waited_us


def test_two_all_reduces_may_be_under_way_while_others_are_computed(ranks):
    def do(rank):
        first, second = (integers((4, 4), seed, torch.float32) for seed in (1, 2))
        works = [rank.begin_all_reduce([first]), rank.begin_all_reduce([second, second.clone()])]
        beside = first.new_ones(3).sum()
        for work in works:
            work.wait()
        return first, second, beside

    for first, second, beside in on_all(ranks, do):
        assert torch.equal(first, len(ranks) * integers((4, 4), 1, torch.float32))
        assert torch.equal(second, len(ranks) * integers((4, 4), 2, torch.float32))
        assert beside == 3


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_gather_and_a_scatter_are_along_the_axis_that_is_asked_for(ranks, axis: int):
    size = len(ranks)
    parts = [integers((2, 3, 4), rank, torch.float32) for rank in range(size)]
    for whole in on_all(ranks, lambda rank: rank.all_gather(parts[rank.rank], axis)):
        assert torch.equal(whole, torch.cat(parts, dim=axis))
    wide = [torch.cat([part] * size, dim=axis) for part in parts]
    for rank, share in enumerate(
        on_all(ranks, lambda rank: rank.reduce_scatter(wide[rank.rank], axis))
    ):
        assert torch.equal(share, sum(wide).chunk(size, dim=axis)[rank])


def test_what_a_rank_sends_another_receives(ranks):
    sent = integers((3, 5), 0, torch.bfloat16)

    def do(rank):
        if rank.rank == 0:
            for to in range(1, rank.size):
                rank.send(sent.T * to, to)
            return None
        return rank.recv(sent.T, 0)

    for rank, received in enumerate(on_all(ranks, do)):
        assert rank == 0 or torch.equal(received, sent.T * rank)


@pytest.mark.parametrize("kind", ["llama-biased", "llama-tied", "qwen3"])
def test_the_shares_of_all_ranks_make_the_model(kind: str, size: int = 2):
    config = read_config(checkpoint(kind))
    shares = [Share(rank, size) for rank in range(size)]
    assert not shares[0].faults(config)
    device = torch.device("cpu")
    whole = load_weights(checkpoint(kind), config, torch.float32, device, Share(0, 1))
    parts = [load_weights(checkpoint(kind), config, torch.float32, device, s) for s in shares]
    assert {part.identity for part in parts} == {whole.identity}
    x = torch.randn(3, config.hidden)
    close, heads = torch.testing.assert_close, (config.heads, config.kv_heads, config.kv_heads)
    close(torch.cat([part.lm_head(x) for part in parts], dim=-1)[:, :VOCAB], whole.lm_head(x))
    for number, layer in enumerate(whole.layers):
        layers = [part.layers[number] for part in parts]
        widths = [count * config.head_dim // size for count in heads]
        close(together([each.qkv(x).split(widths, dim=-1) for each in layers]), layer.qkv(x))
        gates = together([each.ffn.gate_up(x).chunk(2, dim=-1) for each in layers])
        close(gates, layer.ffn.gate_up(x))
        inner = torch.randn(3, config.heads * config.head_dim)
        cuts = zip(layers, inner.chunk(size, dim=-1), strict=True)
        close(sum(each.output(cut) for each, cut in cuts), layer.output(inner))
        inner = torch.randn(3, config.ffn)
        cuts = zip(layers, inner.chunk(size, dim=-1), strict=True)
        close(sum(each.ffn.down(cut) for each, cut in cuts), layer.ffn.down(inner))


def test_experts_that_do_not_split_are_refused():
    config = msgspec.structs.replace(read_config(checkpoint("mixtral")), experts=3)
    assert Share(0, 2).faults(config) == ["3 experts do not split over tp 2; what does: 1, 3"]


def test_the_experts_of_all_ranks_make_the_layer(kind: str = "qwen3-moe", size: int = 2):
    config = read_config(checkpoint(kind))
    device, x = torch.device("cpu"), torch.randn(9, config.hidden)
    whole, *parts = (
        load_weights(checkpoint(kind), config, torch.float32, device, share)
        for share in (Share(0, 1), *(Share(rank, size) for rank in range(size)))
    )
    kernels = TorchKernels(config, torch.zeros(1, config.head_dim))
    for number, layer in enumerate(whole.layers):
        held = [part.layers[number].ffn for part in parts]
        assert [(one.first, len(one.held)) for one in held] == [(0, 4), (4, 4)]
        sums = sum(feed_forward(kernels, x, one) for one in held)
        torch.testing.assert_close(sums, feed_forward(kernels, x, layer.ffn))


def together(parts):
    """Several tensors of each rank, e.g. queries, keys, values, as one rank has them."""
    return torch.cat([part for of_all in zip(*parts, strict=True) for part in of_all], dim=-1)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("llama", {"tp": "2", "program": "off"}, "tp 2 without a program"),
        ("llama", {"tp": "3"}, "4 heads do not split over tp 3; what does: 1, 2, 4"),
        ("llama", {"tp": "4"}, "2 KV heads do not split over tp 4; what does: 1, 2"),
        ("llama-one-kv-head", {"tp": "2"}, "1 KV heads do not split over tp 2; what does: 1"),
        ("llama", {"tp": "0"}, "tp 0; 1 at least"),
        ("llama", {"tp": "2", "device": "cuda"}, "tp 2 on 'cuda'; ranks compute on cpu"),
    ],
)
def test_a_model_that_does_not_split_is_refused_before_a_process_starts(kind, options, said):
    with pytest.raises(EngineError, match=said):
        engine("i0", checkpoint(kind), **{"program": "unread", **options})


def test_a_rank_that_cannot_load_its_share_says_why(tmp_path: Path):
    spec = InstanceSpec(
        id="i0", engine="torch", model=str(tmp_path), kv_blocks=4, block_tokens=8, options={}
    )
    others = RankProcesses(spec, 2, threads=1)
    try:
        with pytest.raises(EngineError, match=r"config\.json") as refused:
            others.meet()
        assert "\n" not in str(refused.value)
    finally:
        others.close()


def test_a_rank_that_is_killed_while_it_loads_is_named():
    spec = InstanceSpec(
        id="i0", engine="torch", model="nowhere", kv_blocks=4, block_tokens=8, options={}
    )
    others = RankProcesses(spec, 2, threads=1)
    try:
        os.kill(others.pids[0], signal.SIGKILL)
        with pytest.raises(EngineError, match=r"'i0': rank 1 \(process \d+\) was killed by SIG"):
            others.meet()
    finally:
        others.close()


def test_a_rank_that_runs_out_of_memory_says_so_and_rank_0_with_it():
    one = engine("i0", checkpoint("llama"), tp="2", program=str(program(checkpoint("llama"), 2)))
    (pid,) = one.residents.rank.others.pids
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    room = pages * resource.getpagesize() + (32 << 20)
    resource.prlimit(pid, resource.RLIMIT_AS, (room, room))
    with pytest.raises(RankLost, match=rf"^rank 1 \(process {pid}\) RuntimeError: .*memory"):
        one.residents.rank.read_kv(torch.zeros(40_000, dtype=torch.int64))
    one.close()


def wrong_program(folder: Path, tp: int, wrong_rank: int, wrong: str) -> Path:
    """A program of `tp` ranks of which one does something wrong first in a step."""
    _, _, text = program(checkpoint("llama"), tp).read_text().partition("\n")
    begins = "    kernels.begin_step(batch)\n"
    assert begins in text
    guard = f"    if (ranks.rank if ranks else 0) == {wrong_rank}:\n        {wrong}\n"
    text = text.replace(begins, guard + begins)
    path = folder / f"wrong-{tp}-{wrong_rank}.py"
    path.write_text(f"{MAGIC}{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
    return path


@pytest.mark.parametrize(
    ("tp", "wrong_rank", "wrong", "said"),
    [
        (1, 0, "weights.lm_hed", "AttributeError: "),
        (2, 0, "batch.tokens[10**6]", "IndexError: index 1000000 is out of bounds"),
        (2, 1, "kv[10**6]", "IndexError: list index out of range"),
        (2, 1, "int('x')", "ValueError: invalid literal"),
    ],
)
def test_a_wrong_program_on_a_rank_fails_the_instance_in_one_line(
    tp: int, wrong_rank: int, wrong: str, said: str, tmp_path: Path
):
    path = wrong_program(tmp_path, tp, wrong_rank, wrong)
    one = engine("i0", checkpoint("llama"), tp=str(tp), program=str(path))
    with contextlib.closing(one):
        one.submit(plan("i0", {"r": 3}, chunks=[(0, "r", 0, 3)]), [request("r", (1, 2, 3))])
        (failed,) = one.poll()
        assert isinstance(failed, Failed)
        assert failed.request_id is None
        lost = r"RankLost: rank 1 \(process \d+\) " if wrong_rank else ""
        assert re.match(rf"{lost}StepFailed: {re.escape(str(path))}:\d+: {said}", failed.error)
        assert "\n" not in failed.error
        assert one.poll() == []


def test_ranks_that_never_meet_are_an_error_and_no_wait_for_ever(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(module, "MOST_WAIT", timedelta(seconds=0.5))
    with pytest.raises(RankLost, match="rank 0 does not find the others"):
        Ranks(tmp_path / "meeting", 0, 2)
