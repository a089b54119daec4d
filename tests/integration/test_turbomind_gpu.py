"""The benchmark for a GPU: its figures, and the whole of it with toy maths on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sagec.compiler import Compiler
from tests.turbomind_here import needs_turbomind

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "turbomind_gpu.py"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/turbomind_gpu.py, which is no part of a package."""
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as for a script that lies there
    import turbomind_gpu

    return turbomind_gpu


def answer(gpu: ModuleType, tokens: list[list[int]], every_us: int = 1000):
    times = [[(i + 1) * every_us for i, _ in enumerate(of_one)] for of_one in tokens]
    return gpu.Answer(tokens=tokens, times_us=times)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_parity_counts_tokens_before_the_first_that_differs(gpu: ModuleType) -> None:
    stock = answer(gpu, [[1, 2, 3, 4], [5, 6, 7, 8]])
    found = gpu.parity("planned", answer(gpu, [[1, 2, 3, 4], [5, 0, 7, 8]]), stock)
    assert (found.requests, found.same, found.until) == (2, 1, 5 / 8)


def test_tokens_that_are_missing_are_not_the_same(gpu: ModuleType) -> None:
    found = gpu.parity("planned", answer(gpu, [[1, 2]]), answer(gpu, [[1, 2, 3, 4]]))
    assert (found.same, found.until) == (0, 0.5)


def test_a_ratio_is_to_stock_in_the_same_turn(gpu: ModuleType) -> None:
    tokens = [[1] * 10]
    stock = [answer(gpu, tokens, 1000), answer(gpu, tokens, 2000), answer(gpu, tokens, 1000)]
    twice = [answer(gpu, tokens, 500), answer(gpu, tokens, 1000), answer(gpu, tokens, 1000)]
    first, second = gpu.speeds({"stock": stock, "patched": twice})
    assert (first.ratio, first.tokens_per_s) == (1, 1000)
    assert (second.ratio, second.least_ratio, second.turns) == (2, 1, 3)


def test_latency_is_of_long_prompts_and_of_those_that_decode(gpu: ModuleType) -> None:
    asks = [gpu.Ask((1,), 3), gpu.Ask((2,) * 9, 1, arrival_us=4000)]
    served = gpu.Answer(tokens=[[1, 2, 3], [4]], times_us=[[1000, 3000, 9000], [10000]])
    found = gpu.latency("stock", [served], asks, num_short=1)
    assert (found.ttft_p50_ms, found.tpot_p50_ms, found.stall_p95_ms) == (6.0, 4.0, 6.0)


def test_a_hand_overs_rate_is_of_all_bytes(gpu: ModuleType) -> None:
    from turbomind_sides import Move

    moves = [Move(3_000_000, 1000, 4000), Move(1_000_000, 1000, 4000)]
    pair = gpu.Answer(tokens=[[1], [2]], times_us=[[1], [1]], moves=moves)
    found = gpu.hand_over(pair, answer(gpu, [[1], [3]]))
    assert (found.export_gb_per_s, found.whole_gb_per_s) == (2.0, 0.5)
    assert (found.megabytes, found.same, found.requests) == (4.0, 1, 2)


def test_the_model_is_the_same_every_time(gpu: ModuleType, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        gpu.make_model(folder, gpu.TOY.shape)
    first, second = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert first == second
    config = json.loads((folders[0] / "config.json").read_text())
    assert config["hidden_size"] == config["num_attention_heads"] * config["head_dim"]


@pytest.mark.parametrize("card", ["NVIDIA H200", "NVIDIA L40S", "NVIDIA GeForce RTX 4090"])
@pytest.mark.parametrize("side", ["planned", "pair"])
def test_what_it_would_serve_on_a_gpu_compiles(
    gpu: ModuleType, tmp_path: Path, card: str, side: str
) -> None:
    from turbomind_sides import file_of

    (tmp_path / "config.json").write_text(json.dumps(gpu.config_of(gpu.GPU.shape)))
    setup = gpu.setups_of(tmp_path, gpu.GPU, "toy")[side]
    setup = gpu.msgspec.structs.replace(setup, device=gpu.device_named(card, 24 << 30))
    for chunk in gpu.GPU.chunks:
        compiler = Compiler()
        module = compiler.parse(file_of(setup, chunk), "gpu.sage").module
        compiler.optimize(module)
        assert len(compiler.lower(module)) == (2 if side == "pair" else 1)


def test_without_a_gpu_it_says_what_can_be_done() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = run()
    assert done.returncode == 1
    assert done.stderr == (
        "turbomind_gpu.py: no CUDA GPU here; `--maths toy` proves the script on a CPU\n"
    )


@needs_turbomind
def test_sides_give_the_same_tokens(gpu: ModuleType, tmp_path: Path) -> None:
    gpu.make_model(tmp_path, gpu.TOY.shape)
    setups = gpu.setups_of(tmp_path, gpu.TOY, "toy")
    asks = gpu.drawn((4, 40, 200, 6), gpu.TOY.shape.vocab, seed=5)
    answers = []
    for name in ("patched", "planned"):
        side = gpu.SideProcess(setups[name])
        answers.append(side.serve(asks, chunk=64))
        side.close()
    patched, planned = answers
    assert [len(tokens) for tokens in patched.tokens] == [6] * 4
    assert patched.tokens == planned.tokens
    assert planned.obeyed > 0 == planned.deviated + planned.at_deadline


@needs_turbomind
def test_a_side_that_cannot_be_made_says_why(gpu: ModuleType, tmp_path: Path) -> None:
    setup = gpu.setups_of(tmp_path / "nowhere", gpu.TOY, "toy")["stock"]
    with pytest.raises(gpu.SideError, match=r"^stock: instance 'i0': .*config\.json: No such file"):
        gpu.SideProcess(setup)


def test_without_a_hand_over_the_other_figures_are_there(gpu: ModuleType) -> None:
    short, late = gpu.mixed(gpu.TOY)
    burst, load = answer(gpu, [[1, 2]]), answer(gpu, [[1, 2]] * len(short + late))
    names = ("stock", "patched", "planned")
    why = gpu.SideError("pair: /dev/shm: no segment of 9 bytes for KV")
    runs = gpu.Runs(
        bursts={name: [burst] for name in names},
        loads={"stock": [load], "chunk 64": [load]},
        again=load,
        alone=burst,
        handed=why,
    )
    figures = gpu.figures_of(runs, gpu.TOY)
    assert [side.side for side in figures.conformance] == ["chunk 64", "all at once"]
    text = gpu.markdown({**gpu.tables.machine(), "maths": "model"}, figures)
    assert f"one card\n\n{why}\n\n## Conformance" in text


@needs_turbomind
def test_a_pair_that_cannot_be_made_is_told(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = gpu.setups_of(tmp_path / "nowhere", gpu.TOY, "toy")["pair"]
    why = gpu.handed_over(setup, [], 64)
    assert isinstance(why, gpu.SideError)
    assert f"turbomind_gpu.py: {why}" in capsys.readouterr().err


@needs_turbomind
@pytest.mark.slow
def test_all_of_it_runs_with_toy_maths(tmp_path: Path) -> None:
    done = run("--maths", "toy", "--turns", 1, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "turbomind_gpu.json").read_text())
    assert all(side["same"] == side["requests"] for side in found["parity"])
    assert [side["side"] for side in found["speed"]] == ["stock", "patched", "planned"]
    assert all(side["as_planned"] == 1 and side["steps"] for side in found["conformance"])
    moved = found["hand_over"]
    assert moved["moves"] == moved["same"] == moved["requests"] > 0
    assert "Toy maths" in (tmp_path / "turbomind_gpu.md").read_text()
