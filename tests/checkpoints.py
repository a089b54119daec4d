"""Small random checkpoints, made on the spot, whose greedy choices leave no doubt.

Weights are drawn wide (0.2), biases and norms too, so that everything matters; and prompts are
chosen so that the likeliest token always leads by far more than rounding moves it.
"""

import contextlib
import functools
import itertools
import random
import tempfile
from pathlib import Path
from typing import Any

import torch

VOCAB = 97
CONTEXT = 256
LEAST_LEAD = 1e-3
"""Of the likeliest token's logit over the next one's; rounding moves logits by about 1e-5."""
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []  # they go when the tests end
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3-rope": ("Llama", {"rope_scaling": _LLAMA3}),
    "llama-linear-rope": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama-one-kv-head": ("Llama", {"num_key_value_heads": 1, "head_dim": 24}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen2-tied-yarn": ("Qwen2", {"tie_word_embeddings": True, "rope_scaling": _YARN}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-tied": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "mixtral": (
        "Mixtral",
        {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "head_dim": 32,
            "moe_intermediate_size": 40,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
        },
    ),
}
"""Name of a checkpoint -> its family in transformers, and what differs from the common shape."""


@functools.cache
def reference(kind: str) -> Any:
    """The model `kind` in transformers; the same in every run."""
    import transformers

    family, changes = KINDS[kind]
    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**{**_SHAPE, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            if "embed_tokens" in name and not config.tie_word_embeddings:
                parameter.mul_(4)
    return model


@functools.cache
def checkpoint(kind: str, shard_bytes: int = 10**9) -> Path:
    """A folder with the model `kind` as transformers writes it, in shards of `shard_bytes`."""
    folder = tempfile.TemporaryDirectory(prefix=f"sagec-{kind}-")
    _FOLDERS.append(folder)
    reference(kind).save_pretrained(folder.name, max_shard_size=shard_bytes)
    return Path(folder.name)


class Undecided(ValueError):
    """Two tokens are so near that rounding may choose between them."""


def generate(kind: str, prompt: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
    """The greedy tokens that transformers gives for `prompt`.

    Raises Undecided where one of them leads the next by less than LEAST_LEAD.
    """
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = reference(kind).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best, second = torch.cat(out.logits).topk(2).values.T
    if (best - second).min() < LEAST_LEAD:
        raise Undecided(f"{kind}: {prompt}")
    return tuple(out.sequences[0, len(prompt) :].tolist())


@functools.cache
def decided(kind: str, length: int, num_tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A random prompt of `length` tokens and its greedy tokens, none of which is a close call."""
    for seed in itertools.count(length):
        draw = random.Random(seed)
        prompt = tuple(draw.randrange(VOCAB) for _ in range(length))
        with contextlib.suppress(Undecided):
            return prompt, generate(kind, prompt, num_tokens)
    raise AssertionError


def byte_tokenizer() -> Any:
    """A tokenizer whose token n is the byte n."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # The byte-level alphabet, in the order of the bytes that its characters stand for.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE({characters[b]: b for b in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
