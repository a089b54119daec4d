"""What a checkpoint may look like, and what each malformed one is told."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from sagec.runtime.engines import EngineError  # noqa: E402
from sagec.runtime.engines.torch.config import read_config  # noqa: E402
from sagec.runtime.engines.torch.rope import rope_table  # noqa: E402
from tests.checkpoints import KINDS, checkpoint, generate, reference  # noqa: E402
from tests.torch_engines import engine, outputs, plan, request, run  # noqa: E402

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole checkpoint, to be spoilt."""
    return Path(shutil.copytree(checkpoint("qwen3"), tmp_path / "model"))


def spoil_config(folder: Path, **changes: Any) -> None:
    """Change fields of config.json; None removes one."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def spoil_tensors(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def greedy(folder: Path, **options: str) -> tuple[int, ...]:
    one = engine("i0", folder, **options)
    ids = {"r": len(PROMPT)}
    one.submit(
        plan("i0", ids, chunks=[(0, "r", 0, len(PROMPT))], decodes={"r": 200}),
        [request("r", PROMPT, 16)],
    )
    return outputs(run(one))["r"]


def refusal(folder: Path, **options: str) -> str:
    """The message of the error that loading ends in: one line."""
    with pytest.raises(EngineError) as caught:
        engine("i0", folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_checkpoint_in_shards_is_the_same_model():
    shards = checkpoint("llama", shard_bytes=60_000)
    assert len(list(shards.glob("*.safetensors"))) > 2
    assert greedy(shards) == generate("llama", PROMPT, 16)


def test_the_spelling_of_transformers_4_is_understood(tmp_path: Path):
    folder = Path(shutil.copytree(checkpoint("llama-llama3-rope"), tmp_path / "model"))
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    spoil_config(
        folder,
        rope_parameters=None,
        dtype=None,
        rope_theta=theta,
        rope_scaling=rope | {"type": kind},
        torch_dtype="float32",
    )
    assert greedy(folder) == generate("llama-llama3-rope", PROMPT, 16)


def test_leftovers_that_exporters_write_are_passed_over(tmp_path: Path):
    folder = Path(shutil.copytree(checkpoint("llama-tied"), tmp_path / "model"))

    def add(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    spoil_tensors(folder, add)
    assert greedy(folder) == generate("llama-tied", PROMPT, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_rope_angles_are_those_of_transformers(kind: str):
    config = read_config(checkpoint(kind))
    table = rope_table(config.rope, config.head_dim, 256, torch.float32)
    cos, sin = reference(kind).model.rotary_emb(torch.zeros(1), torch.arange(256)[None])
    half = config.head_dim // 2
    torch.testing.assert_close(table[:, :half], cos[0, :, :half], rtol=0, atol=2e-5)
    torch.testing.assert_close(table[:, half:], sin[0, :, :half], rtol=0, atol=2e-5)


def test_yarn_with_all_its_fields_is_that_of_transformers(tmp_path: Path):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 1.5,
        "mscale_all_dim": 0.8,
        "truncate": False,
    }
    config = LlamaConfig(rope_scaling=dict(scaling), max_position_embeddings=1024)
    config.save_pretrained(tmp_path)
    ours = read_config(tmp_path)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(1024)[None])
    table = rope_table(ours.rope, ours.head_dim, 1024, torch.float32)
    half = ours.head_dim // 2
    torch.testing.assert_close(table[:, :half], cos[0, :, :half], rtol=0, atol=1e-4)
    torch.testing.assert_close(table[:, half:], sin[0, :, :half], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("eos", "generation", "expected"),
    [
        (2, None, (2,)),
        ([2, 3], None, (2, 3)),
        (2, [5, 6], (5, 6)),
        (None, 4, (4,)),
        (2, "no", (2,)),
    ],
)
def test_eos_comes_from_generation_config_first(folder: Path, eos, generation, expected):
    spoil_config(folder, eos_token_id=eos)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({} if generation == "no" else {"eos_token_id": generation}))
    assert read_config(folder).eos_tokens == expected


MOE = {"model_type": "qwen3_moe", "moe_intermediate_size": 8, "num_experts": 8,
       "num_experts_per_tok": 2}  # fmt: skip
CONFIG_ERRORS = [
    ({"model_type": "mamba"}, "model_type is 'mamba'; this engine runs llama, qwen2, qwen3"),
    ({"model_type": None}, "model_type is None; this engine runs llama, qwen2, qwen3"),
    ({"hidden_size": None}, "no 'hidden_size'; it must be an integer >= 1"),
    ({"hidden_size": "64"}, "hidden_size is '64'; an integer >= 1 is needed"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0; an integer >= 1 is needed"),
    ({"vocab_size": True}, "vocab_size is True; an integer >= 1 is needed"),
    ({"rms_norm_eps": -1}, "rms_norm_eps is -1; a number > 0 is needed"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; true or false is needed"),
    ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
    ({"head_dim": 31}, "head_dim 31 is odd; RoPE turns pairs"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; this engine computes silu"),
    ({"dtype": "int8"}, "dtype is 'int8'; it can be float32, bfloat16, float16"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is set; this engine runs unquant"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "has 'sliding_attention'; this eng"),
    (
        {
            "layer_types": None,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 0,
        },
        "full attention only, so use_sliding_window must be false",
    ),
    (
        {"model_type": "mixtral", "sliding_window": 8},
        "sliding_window is 8; this engine computes fu",
    ),
    ({**MOE, "num_experts": None}, "no 'num_local_experts'; it must be an integer >= 1"),
    ({**MOE, "num_experts_per_tok": 9}, "num_experts_per_tok is 9; there are 8 experts"),
    ({**MOE, "decoder_sparse_step": 2}, "decoder_sparse_step is 2; this engine wants experts in a"),
    ({**MOE, "mlp_only_layers": [0]}, "mlp_only_layers is [0]; this engine wants experts in all"),
    ({"rope_parameters": [1]}, "rope_parameters is [1]; one flat object is needed"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'; this"),
    ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: no 'factor'; it must be a"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "no 'low_freq_factor'; it must"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1; this engine turns all"),
    ({"eos_token_id": "x"}, "eos_token_id is 'x'; a token or a list of them is needed"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIG_ERRORS, ids=lambda value: str(value)[:40])
def test_a_config_that_is_not_understood_is_refused(folder: Path, changes, message: str):
    spoil_config(folder, **changes)
    found = refusal(folder)
    assert message in found
    assert "config.json" in found


def test_a_missing_folder_is_named(tmp_path: Path):
    assert "no such folder; a model is a folder with config.json" in refusal(tmp_path / "none")


def test_a_folder_without_config_is_named(tmp_path: Path):
    assert "No such file or directory; a checkpoint needs its config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ("[1]", "a JSON list, not an object")]
)
def test_a_config_that_is_no_json_object_is_refused(folder: Path, text: str, message: str):
    (folder / "config.json").write_text(text)
    assert message in refusal(folder)


def test_missing_weights_are_named(folder: Path):
    (folder / "model.safetensors").unlink()
    assert f"neither model.safetensors nor {INDEX}; save the model with" in refusal(folder)


@pytest.mark.parametrize("left", [0, 4, 100, 5000])
def test_a_truncated_file_is_named(folder: Path, left: int):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    message = refusal(folder)
    assert "model.safetensors: not a whole safetensors file (" in message
    assert message.endswith("; fetch it again")


def spoilt(tensors: dict[str, Any], name: str, tensor: Any) -> None:
    tensors[name] = tensor


TENSOR_ERRORS = [
    (
        lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
        "no tensor 'model.layers.1.mlp.up_proj.weight' (1 missing)",
    ),
    (
        lambda t: spoilt(t, "model.extra", torch.ones(1)),
        "unknown tensor 'model.extra'; config.json",
    ),
    (
        lambda t: spoilt(t, "model.norm.weight", torch.ones(63)),
        "'model.norm.weight' has shape [63]; by config.json it is [64]",
    ),
    (
        lambda t: spoilt(t, "model.norm.weight", torch.ones(64, dtype=torch.int32)),
        "'model.norm.weight' is int32; this engine reads float32, bfloat16 and float16",
    ),
]


@pytest.mark.parametrize(("change", "message"), TENSOR_ERRORS)
def test_tensors_that_do_not_fit_the_config_are_refused(folder: Path, change, message: str):
    spoil_tensors(folder, change)
    assert message in refusal(folder)


INDEX_ERRORS = [
    ({}, "no weight_map from tensor to file; fetch it again"),
    ({"weight_map": {"a": "../x.safetensors"}}, "'../x.safetensors' is not the name of a file"),
    ({"weight_map": {"a": 3}}, "3 is not the name of a file beside it"),
    ({"weight_map": {"a": "x.safetensors"}}, "x.safetensors: no such file, but model.safetensors"),
]


@pytest.mark.parametrize(("index", "message"), INDEX_ERRORS)
def test_an_index_that_leads_nowhere_is_refused(folder: Path, index, message: str):
    (folder / INDEX).write_text(json.dumps(index))
    assert message in refusal(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path):
    shutil.copy(folder / "model.safetensors", folder / "two.safetensors")
    names = {"a": "model.safetensors", "b": "two.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    assert "is in another file too; keep one of them" in refusal(folder)


OPTION_ERRORS = [
    ({"colour": "red"}, "no option 'colour'; the torch engine has dtype, device, threads, channel"),
    ({"threads": "many"}, "options: Expected `int`, got `str` - at `$.threads`"),
    ({"threads": "0"}, "threads 0; 1 at least"),
    ({"dtype": "int8"}, "dtype 'int8'; it can be auto, float32, bfloat16, float16"),
    ({"native": "yes"}, "native 'yes'; it can be auto, on, off"),
    ({"prefix_cache": "maybe"}, "prefix_cache 'maybe'; it can be on, off"),
    ({"migration": "never"}, "migration 'never'; it can be always, where-it-pays"),
    ({"host_blocks": "-1"}, "host_blocks -1; 0 (none) or more"),
    ({"eviction": "lur"}, "option eviction: no eviction policy 'lur'; did you mean 'lru'?"),
    ({"quotas": "red"}, "quotas: 'red'; a tenant's is like acme=40, in blocks"),
    ({"disk_blocks": "4", "spool": "/absent"}, "4 disk_blocks in spool '/absent': [Errno 2]"),
    ({"host_blocks": "9" * 15}, "no place for 999999999999999 host_blocks and 0 disk_blocks"),
    ({"device": "abacus"}, "device 'abacus': Expected one of cpu, cuda"),
    ({"channel": "pigeon"}, "option channel: no channel 'pigeon'; there are: local, shared-memory"),
]


@pytest.mark.parametrize(("options", "message"), OPTION_ERRORS)
def test_an_option_that_does_not_exist_is_refused(folder: Path, options, message: str):
    found = refusal(folder, **options)
    assert message in found
    assert "'i0'" in found


@pytest.mark.parametrize("size", [{"kv_blocks": 0}, {"block_tokens": 0}])
def test_kv_of_no_size_is_refused(folder: Path, size: dict[str, int]):
    with pytest.raises(EngineError, match=f"{next(iter(size))} 0; 1 at least"):
        engine("i0", folder, **size)


def test_kv_that_memory_does_not_hold_is_refused(folder: Path):
    with pytest.raises(EngineError, match=r"no memory for 10+ KV blocks \(.*\); ask for fewer"):
        engine("i0", folder, kv_blocks=10**12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_runs_in_another_dtype_than_its_files(dtype: str):
    one = engine("i0", checkpoint("llama"), dtype=dtype)
    assert dtype in one.capability().kv_layout
    assert len(greedy(checkpoint("llama"), dtype=dtype)) == 16


def test_two_trainings_of_one_shape_have_different_kv_layouts(folder: Path):
    other = engine("i0", folder).capability().kv_layout
    spoil_tensors(folder, lambda t: t["model.norm.weight"].mul_(1.5))
    assert engine("i0", folder).capability().kv_layout != other


def test_without_torch_the_engine_says_what_to_install():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from sagec.runtime.engines import EngineError, InstanceSpec, create\n"
        "spec = InstanceSpec(id='i0', engine='torch', model='x', kv_blocks=1, block_tokens=1)\n"
        "try:\n    create(spec)\nexcept EngineError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "instance 'i0': the torch engine needs torch; install it with: pip install 'sagec[torch]'\n"
    )
