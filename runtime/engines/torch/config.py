"""config.json of a checkpoint, read strictly: what is not understood is refused, not ignored."""

import json
from pathlib import Path
from typing import Any

import msgspec

from sagec.runtime.engines import EngineError

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mixtral", "qwen3_moe")
DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_ROPE_THETA = 10_000.0


class Rope(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary embedding: kind is default, linear, llama3 or yarn; the rest is what the kind uses.

    original_tokens: context length before it was stretched.
    """

    kind: str
    theta: float
    factor: float = 1.0
    original_tokens: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Shape and constants of a model, independent of how its config.json spells them.

    ffn: the width of the hidden layer, or of each expert's; experts: 0 where the model is dense.
    scales_experts: whether a token's shares in its experts sum up to 1.
    """

    architecture: str
    vocab: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_context_tokens: int
    norm_eps: float
    rope: Rope
    qkv_bias: bool
    output_bias: bool
    ffn_bias: bool
    qk_norm: bool
    tied: bool
    dtype: str
    eos_tokens: tuple[int, ...] = ()
    experts: int = 0
    experts_per_token: int = 0
    scales_experts: bool = False


class Fields:
    """A JSON object whose fields are read by kind; each error names the file and the field."""

    def __init__(self, values: dict[str, Any], place: str) -> None:
        self.values = values
        self.place = place

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        """An integer of at least `least`; null counts as missing."""
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise EngineError(f"{self.place}: no {name!r}; it must be an integer >= {least}")
        if type(value) is not int or value < least:
            raise EngineError(f"{self.place}: {name} is {value!r}; an integer >= {least} is needed")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number; null counts as missing."""
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise EngineError(f"{self.place}: no {name!r}; it must be a number > 0")
        if type(value) not in (int, float) or not value > 0:
            raise EngineError(f"{self.place}: {name} is {value!r}; a number > 0 is needed")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """As `number`, and None where it is missing."""
        return None if self.values.get(name) is None else self.number(name)

    def flag(self, name: str, default: bool) -> bool:
        """true or false; null counts as missing."""
        value = self.values.get(name)
        value = default if value is None else value
        if type(value) is not bool:
            raise EngineError(f"{self.place}: {name} is {value!r}; true or false is needed")
        return value


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in `path`. Raises EngineError with `remedy` where there is none."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise EngineError(f"{path}: {error.strerror or error}; {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{path}: not JSON: {error}; {remedy}") from None
    if not isinstance(values, dict):
        raise EngineError(f"{path}: a JSON {type(values).__name__}, not an object; {remedy}")
    return values


def read_config(folder: Path) -> ModelConfig:
    """The model that `folder`/config.json describes, in the spelling of transformers 4 or 5.

    Raises EngineError with file, field, value and remedy.
    """
    if not folder.is_dir():
        raise EngineError(f"{folder}: no such folder; a model is a folder with config.json")
    path = folder / "config.json"
    values = read_json(path, "a checkpoint needs its config.json")
    fields = Fields(values, str(path))
    architecture = _architecture(fields)
    _refuse_unsupported(fields)
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    bias = architecture == "qwen2" or fields.flag("attention_bias", False)
    config = ModelConfig(
        architecture=architecture,
        vocab=fields.integer("vocab_size"),
        hidden=hidden,
        ffn=fields.integer(
            "moe_intermediate_size" if architecture == "qwen3_moe" else "intermediate_size"
        ),
        layers=fields.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", 128 if architecture == "qwen3" else hidden // heads),
        max_context_tokens=fields.integer("max_position_embeddings"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(fields),
        qkv_bias=bias,
        output_bias=bias and architecture != "qwen2",
        ffn_bias=architecture == "llama" and fields.flag("mlp_bias", False),
        qk_norm=architecture in ("qwen3", "qwen3_moe"),
        tied=fields.flag("tie_word_embeddings", False),
        dtype=_dtype(fields),
        eos_tokens=_eos_tokens(folder, fields),
        **_experts(fields, architecture),
    )
    _check_heads(config, fields.place)
    return config


def _architecture(fields: Fields) -> str:
    kind = fields.values.get("model_type")
    if kind not in ARCHITECTURES:
        raise EngineError(
            f"{fields.place}: model_type is {kind!r}; this engine runs {', '.join(ARCHITECTURES)}"
        )
    return str(kind)


def _refuse_unsupported(fields: Fields) -> None:
    values = fields.values
    if (act := values.get("hidden_act", "silu")) != "silu":
        raise EngineError(f"{fields.place}: hidden_act is {act!r}; this engine computes silu")
    if values.get("quantization_config"):
        raise EngineError(
            f"{fields.place}: quantization_config is set; this engine runs unquantised weights"
        )
    if values.get("model_type") == "mixtral" and values.get("sliding_window") is not None:
        raise EngineError(
            f"{fields.place}: sliding_window is {values['sliding_window']!r}; this engine computes "
            "full attention only, so it must be null"
        )
    kinds = values.get("layer_types")
    window = values.get("use_sliding_window") and values.get("sliding_window") is not None
    if kinds is None and window:
        layers = fields.integer("num_hidden_layers")
        full = fields.integer("max_window_layers", 28, least=0)
        kinds = ["sliding_attention"] * (layers - full)
    if others := [kind for kind in kinds or () if kind != "full_attention"]:
        raise EngineError(
            f"{fields.place}: layer_types has {others[0]!r}; this engine computes full attention "
            "only, so use_sliding_window must be false"
        )


def _experts(fields: Fields, architecture: str) -> dict[str, Any]:
    """What ModelConfig says of experts; nothing of a dense model."""
    if architecture not in ("mixtral", "qwen3_moe"):
        return {}
    # transformers 5 writes one name for both families, 4 another one for the second.
    name = "num_experts" if fields.values.get("num_experts") else "num_local_experts"
    experts, chosen = fields.integer(name), fields.integer("num_experts_per_tok")
    if chosen > experts:
        raise EngineError(
            f"{fields.place}: num_experts_per_tok is {chosen}; there are {experts} experts"
        )
    step = fields.integer("decoder_sparse_step", 1)
    if step > 1 or (dense := fields.values.get("mlp_only_layers")):
        said = f"decoder_sparse_step is {step}" if step > 1 else f"mlp_only_layers is {dense!r}"
        raise EngineError(f"{fields.place}: {said}; this engine wants experts in all layers")
    scales = architecture == "mixtral" or fields.flag("norm_topk_prob", False)
    return {"experts": experts, "experts_per_token": chosen, "scales_experts": scales}


def _check_heads(config: ModelConfig, place: str) -> None:
    if config.heads % config.kv_heads:
        raise EngineError(
            f"{place}: num_attention_heads {config.heads} is no multiple of "
            f"num_key_value_heads {config.kv_heads}"
        )
    if config.head_dim % 2:
        raise EngineError(f"{place}: head_dim {config.head_dim} is odd; RoPE turns pairs")


def _dtype(fields: Fields) -> str:
    dtype = fields.values.get("dtype") or fields.values.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise EngineError(f"{fields.place}: dtype is {dtype!r}; it can be {', '.join(DTYPES)}")
    return str(dtype)


def _eos_tokens(folder: Path, fields: Fields) -> tuple[int, ...]:
    """What ends an output: by generation_config.json, else config.json; perhaps nothing."""
    path = folder / "generation_config.json"
    place, value = fields.place, fields.values.get("eos_token_id")
    if path.exists():
        generation = read_json(path, "mend it or remove it")
        if generation.get("eos_token_id") is not None:
            place, value = str(path), generation["eos_token_id"]
    tokens = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int for token in tokens):
        raise EngineError(
            f"{place}: eos_token_id is {value!r}; a token or a list of them is needed"
        )
    return tuple(tokens)


def _rope(fields: Fields) -> Rope:
    """RoPE from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    values = fields.values
    found = values.get("rope_parameters") or values.get("rope_scaling") or {}
    name = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
        raise EngineError(f"{fields.place}: {name} is {found!r}; one flat object is needed")
    rope = Fields(found, f"{fields.place}: {name}")
    if rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)) != 1.0:
        raise EngineError(f"{rope.place}: partial_rotary_factor must be 1; this engine turns all")
    kind = found.get("rope_type") or found.get("type") or "default"
    theta = rope.number("rope_theta", fields.number("rope_theta", DEFAULT_ROPE_THETA))
    if kind == "default":
        return Rope(kind=kind, theta=theta)
    if kind == "linear":
        return Rope(kind=kind, theta=theta, factor=rope.number("factor"))
    if kind not in ("llama3", "yarn"):
        raise EngineError(
            f"{rope.place}: rope_type is {kind!r}; this engine computes default, linear, llama3 "
            "and yarn (dynamic and longrope change with the length of a request, so cached KV "
            "would not stay valid)"
        )
    return _stretched_rope(kind, theta, fields, rope)


def _stretched_rope(kind: str, theta: float, fields: Fields, rope: Fields) -> Rope:
    longest = fields.integer("max_position_embeddings")
    outer = fields.integer("original_max_position_embeddings", longest)
    original = (
        outer
        if "original_max_position_embeddings" in fields.values
        else rope.integer("original_max_position_embeddings", outer)
    )
    if kind == "llama3":
        return Rope(
            kind=kind,
            theta=theta,
            factor=rope.number("factor"),
            original_tokens=original,
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
        )
    return Rope(
        kind=kind,
        theta=theta,
        factor=rope.number("factor", longest / original),
        original_tokens=original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.optional_number("attention_factor"),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        truncate=rope.flag("truncate", True),
    )
