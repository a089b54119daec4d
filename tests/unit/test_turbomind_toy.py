"""TurboMind over the toy model, unpatched: what it says is what the reference says."""

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sagec.runtime.engines import EngineError, InstanceSpec
from sagec.runtime.engines.turbomind.loading import load, misread_rope
from sagec.runtime.engines.turbomind.options import read_options
from sagec.runtime.engines.turbomind.toy.reference import generate, next_token
from tests.stock_turbomind import BFLOAT16, FLOAT16, FLOAT32, INT32
from tests.turbomind_child import ROOT, Child
from tests.turbomind_here import needs_turbomind


class Stock:
    """Calls of tests/stock_turbomind.py, in one process for all of them."""

    def __init__(self, child: Child) -> None:
        self._child = child

    def __call__(self, function: str, **arguments: Any) -> Any:
        return self._child.call("tests.stock_turbomind", function, **arguments)


@pytest.fixture(scope="module")
def stock() -> Iterator[Stock]:
    child = Child()
    yield Stock(child)
    child.close()


@pytest.fixture
def fresh() -> Iterator[Stock]:
    """As `stock`, in a process that has run nothing."""
    child = Child()
    yield Stock(child)
    child.close()


def spec(**fields: Any) -> InstanceSpec:
    made = {"kv_blocks": 8, "block_tokens": 16, "model": "", "options": {"maths": "toy"}}
    return InstanceSpec(id="i", engine="turbomind", **(made | fields))


# ---- the reference -----------------------------------------------------------------------------


def test_every_token_and_its_place_decide_the_next_one() -> None:
    tokens = list(range(200))
    swapped = [*tokens[:50], tokens[51], tokens[50], *tokens[52:]]
    changed = [[*tokens[:at], 999, *tokens[at + 1 :]] for at in (0, 63, 64, 199)]
    assert len({next_token(each, 10**6) for each in (tokens, swapped, *changed)}) == 6


def test_the_reference_ends_before_a_stop_token() -> None:
    whole = generate([1, 2], 9, 1000)
    assert len(whole) == 9
    assert generate([1, 2], 9, 1000, stop=[whole[4]]) == whole[:4]


# ---- tokens ------------------------------------------------------------------------------------


@needs_turbomind
@pytest.mark.parametrize(
    "prompts, count, settings",
    [
        pytest.param([700, 1, 300, 17], 9, {"step_tokens": 64}, id="long-prompts-in-chunks"),
        pytest.param([5 + 3 * i for i in range(120)], 7, {"max_batch": 16}, id="many-requests"),
        pytest.param([40 + 9 * i for i in range(6)], 60, {"kv_blocks": 12}, id="little-memory"),
        pytest.param([130, 64, 65], 9, {"block_tokens": 64}, id="blocks-of-64"),
        pytest.param([13, 64, 65], 9, {"block_tokens": 4}, id="blocks-of-4"),
        pytest.param([90, 91, 92], 9, {"prefix_cache": "on"}, id="prefix-cache"),
        pytest.param([90, 250], 9, {"quant_policy": 4}, id="four-bit-kv"),
        pytest.param([90, 250, 31], 20, {"tp": 2, "step_tokens": 100}, id="two-ranks"),
        pytest.param([300, 290], 9, {"session_len": 400}, id="steps-in-parts"),
        pytest.param([90, 31], 9, {"tp": 4}, id="ranks-that-share-kv-heads"),
        pytest.param([1000], 24, {}, id="to-the-end-of-the-cache"),
        pytest.param([1], 1, {"kv_blocks": 2, "block_tokens": 1}, id="a-cache-of-two-tokens"),
    ],
)
def test_stock_turbomind_says_what_the_reference_says(
    stock: Stock, prompts: list[int], count: int, settings: dict[str, Any]
) -> None:
    got, expected = stock("outputs", prompts=prompts, count=count, **settings)
    assert got == expected


@needs_turbomind
def test_a_stop_token_ends_the_output_and_is_the_last_that_turbomind_says(stock: Stock) -> None:
    got, expected = stock("stopped", at=11)
    assert got[:-1] == expected
    assert len(expected) == 11


@needs_turbomind
def test_a_prompt_seen_before_begins_behind_its_cached_blocks(stock: Stock) -> None:
    seen = stock("prompt_twice", prefix_cache="on")
    assert seen["got"] == seen["expected"]
    assert seen["begins"] == [96, 120, 121, 122, 123]


@needs_turbomind
def test_without_the_prefix_cache_a_prompt_is_computed_again(stock: Stock) -> None:
    seen = stock("prompt_twice", prefix_cache="off")
    assert seen["got"] == seen["expected"]
    assert seen["begins"][0] == 0


@needs_turbomind
def test_all_ranks_take_the_same_steps(stock: Stock) -> None:
    ranks = stock("ranks_in_step", tp=2)
    assert len(ranks["0"]) > 12
    assert ranks["0"] == ranks["1"]


@needs_turbomind
def test_a_step_that_the_model_computes_in_parts_is_one_step(stock: Stock) -> None:
    steps = stock("parts_of_a_step")
    assert max(map(len, steps)) > 1
    for number in (2, 3, 4):  # a prompt and a decode, whoever came with whom
        at = [i for i, numbers in enumerate(steps) if number in numbers]
        assert at == [at[0], at[0] + 1]


@needs_turbomind
def test_two_engines_of_one_process_do_not_mix(stock: Stock) -> None:
    got, expected = stock("two_engines")
    assert got == expected


@needs_turbomind
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("position, bit", [(0, 0), (37, 31), (89, 5)])
def test_a_flipped_bit_of_the_kv_changes_the_output(
    stock: Stock, position: int, bit: int, tp: int
) -> None:
    got, right = stock("flipped", position=position, bit=bit, tp=tp)
    assert len(got) == len(right)
    assert got != right


# ---- an engine's life --------------------------------------------------------------------------


@needs_turbomind
def test_what_is_known_of_a_model_is_what_its_files_say(stock: Stock) -> None:
    assert stock("about", model="") == {
        "vocab_size": 1024,
        "eos_tokens": [1],
        "max_context_tokens": 512,
        "kv_bytes_per_token": 3 * 2 * 2 * 64 * 2,
    }


@needs_turbomind
def test_a_step_takes_no_less_than_its_pace(stock: Stock) -> None:
    taken = stock("time_taken", step_us=5000, token_us=100)
    assert taken["steps"] == 5
    assert taken["us"] >= 5 * 5000 + 104 * 100


@needs_turbomind
def test_layouts_agree_where_models_and_blocks_do(stock: Stock) -> None:
    one, same, *others = stock("seeds")
    assert one == same
    assert len({one, *others}) == 4


@needs_turbomind
@pytest.mark.parametrize("tp", [1, 2])
def test_a_close_ends_what_runs_and_the_threads(stock: Stock, tp: int) -> None:
    closed = stock("close_in_flight", tp=tp)
    assert closed["ended"] == ["CANCELLED"] * 4
    assert closed["threads"] == 0
    assert closed["after"] == "instance 'i' is closed"


@needs_turbomind
def test_a_process_may_end_while_sessions_run(fresh: Stock) -> None:
    fresh("leave_in_flight")  # the fixture looks at the exit code


@needs_turbomind
def test_a_cancelled_session_leaves_the_others_alone(stock: Stock) -> None:
    assert stock("cancelled") == {"status": "CANCELLED", "output": [], "right": True}


@needs_turbomind
def test_the_end_of_each_session_is_told_once(stock: Stock) -> None:
    assert stock("callbacks") == {"told": list(range(1, 31))}


@needs_turbomind
def test_no_library_of_nvidia_is_loaded(stock: Stock) -> None:
    names = stock("loaded_libraries")
    assert [name.rpartition("-")[0].rpartition("-")[0] for name in names] == [
        "host-libcublas",
        "host-libcublasLt",
        "host-libcuda",
        "host-libcudart",
        "host-libnccl",
    ]


# ---- the stand-in for NCCL -----------------------------------------------------------------------


def bfloat16(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0] >> 16)


def float16(value: float) -> int:
    return int(struct.unpack("<H", struct.pack("<e", value))[0])


@needs_turbomind
@pytest.mark.parametrize(
    "kind, sent, expected",
    [
        (FLOAT32, [[1.5, 2.0], [0.25, -4.0], [8.0, 1.0]], [9.75, -1.0]),
        (INT32, [[1, -2], [3, 4]], [4, 2]),
        (FLOAT16, [[float16(1.5)], [float16(-0.25)]], [float16(1.25)]),
        (BFLOAT16, [[bfloat16(1.5)], [bfloat16(-0.25)]], [bfloat16(1.25)]),
        (BFLOAT16, [[bfloat16(256.0)], [bfloat16(1.0)]], [bfloat16(256.0)]),
    ],
)
def test_an_all_reduce_is_the_sum_on_every_rank(
    stock: Stock, kind: int, sent: list[list[float]], expected: list[float]
) -> None:
    done = stock("collective", name="ncclAllReduce", sent=sent, kind=kind)
    assert done["codes"] == [0] * len(sent)
    assert [row[: len(expected)] for row in done["received"]] == [expected] * len(sent)


@needs_turbomind
@pytest.mark.parametrize(
    "name, expected",
    [
        ("ncclReduceScatter", [[11, 0, 0, 0], [22, 0, 0, 0]]),
        ("ncclAllGather", [[1, 2, 10, 20], [1, 2, 10, 20]]),
        ("ncclBroadcast", [[10, 20, 0, 0], [10, 20, 0, 0]]),
        ("ncclReduce", [[0, 0, 0, 0], [11, 22, 0, 0]]),
    ],
)
def test_other_collectives_give_each_rank_its_part(
    stock: Stock, name: str, expected: list[list[int]]
) -> None:
    done = stock("collective", name=name, sent=[[1, 2], [10, 20]], kind=INT32, root=1)
    assert done == {"codes": [0, 0], "received": expected}


@needs_turbomind
def test_ranks_that_call_different_collectives_all_fail(stock: Stock) -> None:
    sent = [[1, 2], [10, 20]]
    done = stock("collective", name="ncclAllReduce", sent=sent, kind=INT32, counts=[2, 1])
    assert done["codes"] == [5, 5]


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"options": {"maths": "toys"}}, "maths 'toys'; model or toy is wanted"),
        ({"options": {"colour": "red"}}, "turbomind has no option 'colour'; it has maths, tp, "),
        ({"options": {"tp": "two"}}, "tp 'two'; a whole number is wanted"),
        ({"options": {"tp": "0"}}, "tp 0; 1 at least"),
        ({"options": {"deadline_us": "0"}}, "deadline_us 0; 1 at least"),
        ({"options": {"deadline_us": "9" * 20}}, "deadline_us 9{20}; 2147483647 at most"),
        ({"options": {"devices": "0,x"}}, "devices '0,x'; numbers, as in '0,1'"),
        ({"options": {"devices": "0,1"}}, "devices '0,1' for tp 1; one device for each rank"),
        ({"options": {"tp": "2", "devices": "1,1"}}, "devices '1,1' for tp 2; one device"),
        ({"options": {"step_us": "5"}}, "step_us and token_us are the toy's"),
        (
            {"options": {"maths": "toy", "communicator": "native"}},
            "communicator 'native' needs GPUs; the toy has 'nccl'",
        ),
        ({"kv_blocks": 0}, "kv_blocks 0; 1 at least"),
        ({"block_tokens": 0}, "block_tokens 0; 1 at least"),
    ],
)
def test_a_wrong_option_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message) as refusal:
        read_options(spec(**fields))
    assert str(refusal.value).startswith("instance 'i': ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "config, message",
    [
        (None, r"config\.json: No such file"),
        ("{", r"config\.json is not JSON"),
        ("[]", r"config\.json holds no JSON object"),
    ],
)
def test_a_checkpoint_without_a_configuration_is_refused(
    tmp_path: Path, config: str | None, message: str
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    wrong = spec(model=str(tmp_path))
    with pytest.raises(EngineError, match=message):
        load(wrong, read_options(wrong))


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"options": {"maths": "toy", "session_len": "129"}},
            "session_len 129; 8 kv_blocks of 16 tokens hold 128",
        ),
        ({"kv_blocks": 1, "block_tokens": 1}, "room for 1 token of a request; 2 at least"),
        (
            {"options": {"maths": "toy", "tp": "3"}},
            "tp 3 for 4 heads and 2 KV heads; what does: 1, 2, 4",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused(fields: dict[str, Any], message: str) -> None:
    wrong = spec(**fields)
    with pytest.raises(EngineError, match=message):
        load(wrong, read_options(wrong))


def test_without_a_gpu_the_toy_is_recommended() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    real = spec(model=str(ROOT / "examples" / "models" / "tiny"), options={})
    with pytest.raises(EngineError, match="no CUDA GPU here; option maths=toy runs TurboMind's"):
        load(real, read_options(real))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0}


@pytest.mark.parametrize(
    ("config", "kind", "theta", "misread"),
    [
        ({}, "default", 1e4, ""),
        ({"rope_theta": 5e5}, "default", 5e5, ""),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, "llama3", 5e5, ""),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "default", 5e5, ""),
        ({"rope_theta": 5e5}, "default", 1e4, "rope_theta 500000, and 10000 was read"),
        (
            {"rope_parameters": {"rope_theta": 5e5}},
            "default",
            1e4,
            "rope_theta 500000, and 10000 was read",
        ),
        ({"rope_scaling": LLAMA3}, "default", 1e4, "rope_type llama3, and none was read"),
        ({"rope_scaling": {"type": "yarn"}}, "default", 1e4, "rope_type yarn, and none was read"),
    ],
)
def test_a_rotary_embedding_that_lmdeploy_misreads_is_found(
    config: dict[str, Any], kind: str, theta: float, misread: str
) -> None:
    assert misread_rope(config, SimpleNamespace(type=kind, base=theta)) == misread


def test_a_model_is_needed_but_by_the_toy() -> None:
    nothing = spec(options={})
    with pytest.raises(EngineError, match="no model; the path of a checkpoint is needed"):
        load(nothing, read_options(nothing))


@needs_turbomind
def test_what_lmdeploy_asserts_is_told_in_one_line(stock: Stock, tmp_path: Path) -> None:
    config = '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": "x"}'
    (tmp_path / "config.json").write_text(config)
    refusal = stock("refused", model=str(tmp_path))
    assert refusal.startswith(f"instance 'i': TurboMind cannot load {tmp_path} with tp 1, dtype")
    assert "\n" not in refusal


@needs_turbomind
def test_a_model_that_turbomind_does_not_have_is_refused(stock: Stock, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2"], "model_type": "gpt2"}')
    refusal = stock("refused", model=str(tmp_path))
    assert refusal.startswith(f"instance 'i': TurboMind has no such model as {tmp_path}; ")


@needs_turbomind
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"tokens": []}, "0 tokens to begin with; 1 to 63 can be"),
        ({"tokens": [1] * 64}, "64 tokens to begin with; 1 to 63 can be"),
        ({"max_new_tokens": 0}, "0 new tokens; 1 at least"),
        ({"sampling": {"temperature": 0.5}}, "temperature 0.5; the toy knows greedy sampling"),
        ({"sampling": {"top_k": 1025}}, "top_k 1025; TurboMind takes 1024 at most"),
        ({"stop_tokens": list(range(33))}, "33 stop tokens; TurboMind takes 32 at most"),
    ],
)
def test_a_session_that_turbomind_cannot_take_is_refused(
    stock: Stock, settings: dict[str, Any], message: str
) -> None:
    assert message in stock("refused_session", **settings)


@needs_turbomind
def test_the_toy_does_not_push_real_cuda_aside(fresh: Stock, tmp_path: Path) -> None:
    refusal = fresh("refused_over_real_cuda", folder=str(tmp_path))
    assert refusal.startswith(f"instance 'i': {tmp_path}/libcudart.so.12 is loaded, so the toy's")
    assert "a process of its own" in refusal


@needs_turbomind
def test_without_a_compiler_the_toy_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "from sagec.runtime.engines.turbomind import toy\n"
        "try:\n    toy.load_stand_ins()\nexcept toy.ToyError as error:\n    print(error)"
    )
    nowhere = {"CC": "no-such-cc", "CXX": "no-such-c++", "SAGEC_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | nowhere,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("the toy cannot be built: no C compiler (no-such-cc, ")
