"""Weights from a Hugging Face folder: one or several safetensors files, each tensor checked."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from sagec.runtime.engines import EngineError
from sagec.runtime.engines.torch.config import ModelConfig, read_json
from sagec.runtime.engines.torch.ffn import FFN, Experts
from sagec.runtime.engines.torch.linear import Linear
from sagec.runtime.engines.torch.share import Share

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LM_HEAD = "lm_head.weight"
SAMPLED_ELEMENTS = 64
"""Of each tensor, for a model's identity: enough to tell two trainings apart, quick to read."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; projections of one input are fused along their output."""

    norm: torch.Tensor  # [hidden]
    qkv: Linear  # hidden -> (heads + 2 * kv_heads) * head_dim
    q_norm: torch.Tensor | None  # [head_dim]
    k_norm: torch.Tensor | None  # [head_dim]
    output: Linear  # heads * head_dim -> hidden
    ffn_norm: torch.Tensor  # [hidden]
    ffn: FFN | Experts


@dataclass(frozen=True)
class Weights:
    """A rank's weights of a model, on its device; identity names the whole: equal models, equal
    text. Shapes are those of a rank that has all.
    """

    embedding: torch.Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [hidden]
    lm_head: Linear  # hidden -> vocab
    identity: str


def load_weights(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    share: Share,
) -> Weights:
    """A rank's share of the weights in `folder`, as `dtype` on `device`; config: of the whole.

    Files are mapped into memory: what is of another rank's share is checked, but hardly read.

    Raises EngineError where a file is missing or cut short, or where a tensor is missing, unknown,
    of the wrong shape or no plain float.
    """
    expected = expected_shapes(config)
    found: dict[str, torch.Tensor] = {}
    for path in _shards(folder):
        _read_shard(path, expected, found, config.tied)
    if missing := sorted(expected.keys() - found.keys()):
        raise EngineError(
            f"{folder}: no tensor {missing[0]!r} ({len(missing)} missing); "
            f"a {config.architecture} model of {config.layers} layers has it: fetch the whole model"
        )
    identity = _identity(config, found)

    def take(*names: str) -> torch.Tensor:
        parts = [share.tensor(name, found.pop(name)) for name in names]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        return whole.to(device=device, dtype=dtype).contiguous()

    embedding = take("model.embed_tokens.weight")
    return Weights(
        embedding=embedding,
        layers=tuple(
            _layer(config, f"model.layers.{number}", take, share) for number in range(config.layers)
        ),
        norm=take("model.norm.weight"),
        lm_head=Linear(share.tensor(LM_HEAD, embedding) if config.tied else take(LM_HEAD), None),
        identity=identity,
    )


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every tensor that a checkpoint of this model holds."""
    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": (config.vocab, config.hidden),
        "model.norm.weight": (config.hidden,),
    }
    if not config.tied:
        shapes[LM_HEAD] = (config.vocab, config.hidden)
    for number in range(config.layers):
        for name, shape in _layer_shapes(config).items():
            shapes[f"model.layers.{number}.{name}"] = shape
    return shapes


def _layer_shapes(config: ModelConfig) -> dict[str, Shape]:
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    hidden, ffn = config.hidden, config.ffn
    linears: dict[str, tuple[Shape, bool]] = {
        "self_attn.q_proj": ((queries, hidden), config.qkv_bias),
        "self_attn.k_proj": ((keys, hidden), config.qkv_bias),
        "self_attn.v_proj": ((keys, hidden), config.qkv_bias),
        "self_attn.o_proj": ((hidden, queries), config.output_bias),
    }
    if config.experts:
        linears[_router(config)] = ((config.experts, hidden), False)
    for number in range(config.experts) if config.experts else (None,):
        gate, up, down = _ffn_names(config, number)
        linears |= dict.fromkeys((gate, up), ((ffn, hidden), config.ffn_bias))
        linears[down] = ((hidden, ffn), config.ffn_bias)
    shapes: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    for name, (shape, biased) in linears.items():
        shapes[f"{name}.weight"] = shape
        if biased:
            shapes[f"{name}.bias"] = shape[:1]
    return shapes


def _router(config: ModelConfig) -> str:
    return "block_sparse_moe.gate" if config.architecture == "mixtral" else "mlp.gate"


def _ffn_names(config: ModelConfig, expert: int | None) -> tuple[str, str, str]:
    """Gate, up and down of a layer, or of one of its experts."""
    if config.architecture == "mixtral":
        prefix = f"block_sparse_moe.experts.{expert}"
        return f"{prefix}.w1", f"{prefix}.w3", f"{prefix}.w2"
    prefix = "mlp" if expert is None else f"mlp.experts.{expert}"
    return f"{prefix}.gate_proj", f"{prefix}.up_proj", f"{prefix}.down_proj"


def _layer(
    config: ModelConfig, prefix: str, take: Callable[..., torch.Tensor], share: Share
) -> LayerWeights:
    """One rank adds the biases of output and down."""

    def norm(name: str) -> torch.Tensor:
        return take(f"{prefix}.{name}.weight")

    def linear(biased: bool, *names: str) -> Linear:
        bias = take(*(f"{prefix}.{name}.bias" for name in names)) if biased else None
        return Linear(take(*(f"{prefix}.{name}.weight" for name in names)), bias)

    def ffn(expert: int | None) -> FFN:
        gate, up, down = _ffn_names(config, expert)
        bias = config.ffn_bias
        return FFN(linear(bias, gate, up), linear(bias and share.adds_bias, down))

    def experts() -> Experts:
        held = share.experts(config)
        return Experts(
            router=linear(False, _router(config)),
            held=tuple(ffn(number) for number in held),
            first=held.start,
            per_token=config.experts_per_token,
            is_scaled=config.scales_experts,
        )

    return LayerWeights(
        norm=norm("input_layernorm"),
        qkv=linear(config.qkv_bias, *(f"self_attn.{name}_proj" for name in "qkv")),
        q_norm=norm("self_attn.q_norm") if config.qk_norm else None,
        k_norm=norm("self_attn.k_norm") if config.qk_norm else None,
        output=linear(config.output_bias and share.adds_bias, "self_attn.o_proj"),
        ffn_norm=norm("post_attention_layernorm"),
        ffn=experts() if config.experts else ffn(None),
    )


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of the model, in a fixed order."""
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise EngineError(
                f"{folder}: neither {SINGLE} nor {INDEX}; "
                "save the model with save_pretrained(safe_serialization=True)"
            )
        return [folder / SINGLE]
    weight_map = read_json(index, "fetch it again").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise EngineError(f"{index}: no weight_map from tensor to file; fetch it again")
    names = set(weight_map.values())
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise EngineError(f"{index}: {name!r} is not the name of a file beside it")
    return [folder / name for name in sorted(names)]


def _read_shard(
    path: Path, expected: dict[str, Shape], found: dict[str, torch.Tensor], tied: bool
) -> None:
    try:
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (it is no mapping)
                if name not in expected:
                    _refuse_unknown(path, name, tied)
                    continue
                if name in found:
                    raise EngineError(f"{path}: {name!r} is in another file too; keep one of them")
                found[name] = _checked(path, name, shard.get_tensor(name), expected[name])
    except FileNotFoundError:
        raise EngineError(
            f"{path}: no such file, but {INDEX} names it; fetch the whole model"
        ) from None
    except (SafetensorError, OSError) as error:
        raise EngineError(
            f"{path}: not a whole safetensors file ({_one_line(error)}); fetch it again"
        ) from None


def _refuse_unknown(path: Path, name: str, tied: bool) -> None:
    """Raise, unless the tensor is one that some exporters write though no model needs it."""
    if name.endswith("rotary_emb.inv_freq") or (tied and name == LM_HEAD):
        return
    raise EngineError(
        f"{path}: unknown tensor {name!r}; config.json does not describe a model that has it"
    )


def _checked(path: Path, name: str, tensor: torch.Tensor, shape: Shape) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        raise EngineError(
            f"{path}: {name!r} has shape {list(tensor.shape)}; by config.json it is {list(shape)}"
        )
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise EngineError(
            f"{path}: {name!r} is {str(tensor.dtype).removeprefix('torch.')}; "
            "this engine reads float32, bfloat16 and float16"
        )
    return tensor


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())


def _identity(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> str:
    """A digest of all that KV depends on: the model's shape, and a few elements of each tensor."""
    digest = hashlib.sha256(repr(msgspec.structs.replace(config, eos_tokens=())).encode())
    for name in sorted(tensors):
        flat = tensors[name].flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLED_ELEMENTS)].to(torch.float32)
        digest.update(name.encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]
