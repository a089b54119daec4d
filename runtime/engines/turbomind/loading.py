"""From an InstanceSpec to lmdeploy's TurboMind, over GPUs or over the toy."""

import atexit
import contextlib
import dataclasses
import hashlib
import importlib
import json
import logging
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from sagec.runtime.engines import EngineError, InstanceSpec
from sagec.runtime.engines.turbomind.options import Options, devices
from sagec.runtime.engines.turbomind.sessions import (
    Session,
    generation_config,
    session_inputs,
    session_parameters,
)
from sagec.runtime.request import Sampling

BUILT_IN = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
"""config.json of the toy's own model."""

MAX_TOP_K = 1024
MAX_STOP_TOKENS = 32
"""More abort TurboMind's thread, and are cut off without a word."""

_END_S = 10.0
"""How long a close waits for what it cancelled."""

_loading = threading.Lock()
"""What loading replaces for its duration belongs to the process."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Loaded:
    """TurboMind, ready for sessions.

    layout_seed: a hash of whatever must agree where KV moves from one instance to another.
    """

    turbomind: Any
    instance: str
    maths: str
    num_ranks: int
    vocab_size: int
    eos_tokens: tuple[int, ...]
    max_context_tokens: int
    kv_bytes_per_token: int
    layout_seed: int
    sessions: weakref.WeakSet[Session] = dataclasses.field(default_factory=weakref.WeakSet)

    def __post_init__(self) -> None:
        _open.add(self)

    def new_request(self) -> Any:
        """TurboMind's own object for one request. Raises EngineError after `close`."""
        if self.turbomind.model_comm is None:
            raise EngineError(f"instance {self.instance!r} is closed")
        return self.turbomind.model_comm.create_model_instance(0)

    def close(self) -> None:
        """Cancel what runs, wait for it, end TurboMind's threads. A second call does nothing."""
        if self.turbomind.model_comm is None:
            return
        running = [each for each in self.sessions if not each.ended]
        for session in running:
            session.cancel()
        for session in running:
            session.wait(_END_S)
        self.turbomind.close()
        _open.discard(self)


_open: weakref.WeakSet[Loaded] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """TurboMind's threads call Python, and must not outlive it."""
    for loaded in list(_open):
        loaded.close()


def load(spec: InstanceSpec, options: Options) -> Loaded:
    """TurboMind with the model of `spec`; steps can be decided for it from its first request on.

    Raises EngineError: no lmdeploy, no GPU, an unsupported model, a cache too small.
    """
    with _loading, _model_folder(spec, options) as folder:
        config = _read_json(spec, folder / "config.json")
        settings = _engine_settings(spec, options, config)
        os.environ.setdefault("TM_LOG_LEVEL", "ERROR")
        if options.maths == "toy":
            _install_toy(spec, options)
        else:
            _find_gpus(spec, options)
        turbomind = _turbomind(spec, options, folder, settings)
        misread = misread_rope(config, turbomind.config.attention_config.rope_param)
        if misread and options.maths == "model":
            turbomind.close()
            raise EngineError(
                f"instance {spec.id!r}: config.json of {spec.model} says {misread}: lmdeploy reads "
                "it wrongly through this transformers; pip install 'transformers<5'"
            )
        return _loaded(spec, options, folder, config, turbomind)


def submit_session(
    loaded: Loaded,
    session: int,
    tokens: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop_tokens: Collection[int] = (),
    on_end: Callable[[Session], None] | None = None,
) -> Session:
    """Start session number `session` with these tokens; see `Session` for `on_end`.

    Raises EngineError for what TurboMind would not answer, or would end the process over: no
    tokens, nothing to generate, too large a top_k, too many stop tokens.
    """
    if (refusal := _refusal(loaded, tokens, max_new_tokens, sampling, stop_tokens)) is not None:
        raise EngineError(f"instance {loaded.instance!r}: {refusal}")
    started = Session(session, len(tokens), on_end)
    loaded.sessions.add(started)
    started.submit(
        loaded.new_request(),
        session_inputs(tokens),
        session_parameters(session),
        generation_config(max_new_tokens, sampling, stop_tokens),
    )
    return started


def _refusal(
    loaded: Loaded,
    tokens: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop_tokens: Collection[int],
) -> str | None:
    """What TurboMind, or the toy, cannot take of a request."""
    most = loaded.max_context_tokens
    if not 0 < len(tokens) < most:
        return f"{len(tokens)} tokens to begin with; 1 to {most - 1} can be"
    if max_new_tokens < 1:
        return f"{max_new_tokens} new tokens; 1 at least"
    if sampling.top_k > MAX_TOP_K:
        return f"top_k {sampling.top_k}; TurboMind takes {MAX_TOP_K} at most"
    if len(stop_tokens) > MAX_STOP_TOKENS:
        return f"{len(stop_tokens)} stop tokens; TurboMind takes {MAX_STOP_TOKENS} at most"
    if loaded.maths == "toy" and sampling.temperature != 0:
        return f"temperature {sampling.temperature}; the toy knows greedy sampling alone: 0"
    return None


def _install_toy(spec: InstanceSpec, options: Options) -> None:
    from sagec.runtime.engines.turbomind import toy

    try:
        toy.install().set_pace(options.step_us, options.token_us)
    except toy.ToyError as error:
        raise EngineError(f"instance {spec.id!r}: {error}") from None


def _find_gpus(spec: InstanceSpec, options: Options) -> None:
    toy = "option maths=toy runs TurboMind's own scheduler on the CPU with a toy model"
    try:
        import torch
    except ImportError:
        raise EngineError(
            f"instance {spec.id!r}: TurboMind needs torch; pip install 'sagec[torch]'"
        ) from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise EngineError(f"instance {spec.id!r}: no CUDA GPU here; {toy}")
    if (highest := max(devices(options))) >= count:
        raise EngineError(
            f"instance {spec.id!r}: device {highest} is wanted, and there are {count}; {toy}"
        )


@contextlib.contextmanager
def _model_folder(spec: InstanceSpec, options: Options) -> Iterator[Path]:
    """The checkpoint, or for a toy without one a folder with a configuration alone."""
    if spec.model:
        yield Path(spec.model)
        return
    if options.maths != "toy":
        raise EngineError(f"instance {spec.id!r}: no model; the path of a checkpoint is needed")
    with tempfile.TemporaryDirectory(prefix="sagec-toy-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(BUILT_IN), "utf-8")
        yield Path(folder)


def _read_json(spec: InstanceSpec, path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise EngineError(f"instance {spec.id!r}: {path}: {error.strerror}") from None
    except ValueError as error:
        raise EngineError(f"instance {spec.id!r}: {path} is not JSON: {error}") from None
    if not isinstance(read, dict):
        raise EngineError(f"instance {spec.id!r}: {path} holds no JSON object")
    return read


def _turbomind(spec: InstanceSpec, options: Options, folder: Path, settings: dict[str, Any]) -> Any:
    """lmdeploy's TurboMind. What it asserts is told in one line."""
    lmdeploy = _import_lmdeploy(spec)
    toy = options.maths == "toy"
    try:
        with _quiet(), _without_gpu(lmdeploy) if toy else contextlib.nullcontext():
            if not lmdeploy.is_supported(str(folder)):
                raise EngineError(
                    f"instance {spec.id!r}: TurboMind has no such model as {spec.model}; the torch "
                    "engine may have"
                )
            wanted = lmdeploy.TurbomindEngineConfig(**settings)
            made = lmdeploy.TurboMind.from_pretrained(str(folder), engine_config=wanted)
            if toy:
                made._process_weights()
                made._create_engine()
            return made
    except EngineError:
        raise
    except Exception as error:  # whatever lmdeploy, or what it reads with, makes of a checkpoint
        model = spec.model or "the toy's own model"
        told = " ".join(str(error).split())[:300] or type(error).__name__
        raise EngineError(
            f"instance {spec.id!r}: TurboMind cannot load {model} with tp {options.tp}, dtype "
            f"{options.dtype}: {told}"
        ) from None


def _import_lmdeploy(spec: InstanceSpec) -> Any:
    """The module of lmdeploy that has TurboMind. It sets the level of its logger when imported."""
    try:
        return importlib.import_module("lmdeploy.turbomind.turbomind")
    except ImportError as error:
        raise EngineError(
            f"instance {spec.id!r}: lmdeploy does not load: {error}; install it with: "
            "pip install 'sagec[turbomind]' and pip install --no-deps lmdeploy==0.11.0"
        ) from None


def _engine_settings(
    spec: InstanceSpec, options: Options, config: dict[str, Any]
) -> dict[str, Any]:
    """Of TurbomindEngineConfig. A count of blocks, not a share of memory, all allocated at once."""
    _check_ranks(spec, options.tp, config)
    session_tokens = _session_tokens(spec, options, config)
    return {
        "dtype": options.dtype,
        "tp": options.tp,
        "device_num": options.tp,
        "devices": devices(options),
        "session_len": session_tokens,
        "max_batch_size": min(options.max_batch, session_tokens**2),  # or TurboMind aborts
        "cache_max_entry_count": float(spec.kv_blocks),
        "cache_chunk_size": -1,
        "cache_block_seq_len": spec.block_tokens,
        "enable_prefix_caching": options.prefix_cache == "on",
        "quant_policy": int(options.quant_policy),
        "max_prefill_token_num": options.step_tokens,
        "communicator": options.communicator,
        "empty_init": options.maths == "toy",
        "enable_metrics": False,
    }


def _check_ranks(spec: InstanceSpec, tp: int, config: dict[str, Any]) -> None:
    """Heads are split over the ranks; ranks beyond the KV heads share these evenly."""
    heads = config.get("num_attention_heads", tp)
    kv_heads = config.get("num_key_value_heads", heads)
    counts = [
        n for n in (1, 2, 4, 8) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)
    ]
    if tp not in counts:
        raise EngineError(
            f"instance {spec.id!r}: tp {tp} for {heads} heads and {kv_heads} KV heads; what does: "
            f"{', '.join(map(str, counts))}"
        )


def _session_tokens(spec: InstanceSpec, options: Options, config: dict[str, Any]) -> int:
    """The most tokens of a request: the model's, and no more than the cache holds."""
    held = spec.kv_blocks * spec.block_tokens
    if options.session_len > held:
        raise EngineError(
            f"instance {spec.id!r}: session_len {options.session_len}; {spec.kv_blocks} kv_blocks "
            f"of {spec.block_tokens} tokens hold {held}"
        )
    tokens = options.session_len or min(held, config.get("max_position_embeddings", held))
    if tokens < 2:
        raise EngineError(
            f"instance {spec.id!r}: room for {tokens} token of a request; 2 at least: a prompt and "
            "its output"
        )
    return int(tokens)


def misread_rope(config: dict[str, Any], read: Any) -> str:
    """What lmdeploy made of the rotary embedding, where it is not what config.json says; else "".

    It takes a default without a word for what transformers, from version 5 on, keeps elsewhere.
    """
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = config.get("rope_theta", scaling.get("rope_theta"))
    if theta is not None and float(theta) != float(read.base):
        return f"rope_theta {theta:g}, and {read.base:g} was read"
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default" and read.type == "default":
        return f"rope_type {kind}, and none was read"
    return ""


@contextlib.contextmanager
def _without_gpu(turbomind: Any) -> Iterator[None]:
    """What lmdeploy asks of torch and the checkpoint that a toy on a CPU cannot answer."""
    from lmdeploy.turbomind.deploy import converter

    with contextlib.ExitStack() as stack:
        replacements: list[tuple[Any, str, Callable[..., Any]]] = [
            (turbomind.torch.cuda, "synchronize", lambda: None),
            (converter, "is_bf16_supported", lambda: True),
            (turbomind, "Tokenizer", lambda folder: None),
        ]
        for owner, name, replacement in replacements:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Warnings of TurboMind and what loads it are kept back, unless the user asked for them."""
    loggers = [logging.getLogger(name) for name in ("lmdeploy", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _loaded(
    spec: InstanceSpec, options: Options, folder: Path, config: dict[str, Any], turbomind: Any
) -> Loaded:
    model = turbomind.config.model_config
    bits = int(options.quant_policy) or 16
    per_token = model.num_layer * model.kv_head_num * 2 * model.size_per_head * bits // 8
    checkpoint = [(path.name, path.stat().st_size) for path in sorted(folder.glob("*.safetensors"))]
    agreeing = (
        *(options.maths, config, checkpoint, model.data_type, options.quant_policy),
        *(spec.block_tokens, options.tp),
    )
    return Loaded(
        turbomind=turbomind,
        instance=spec.id,
        maths=options.maths,
        num_ranks=options.tp,
        vocab_size=model.vocab_size,
        eos_tokens=_eos_tokens(spec, folder, config),
        max_context_tokens=turbomind.session_len,
        kv_bytes_per_token=per_token,
        layout_seed=int.from_bytes(hashlib.sha256(repr(agreeing).encode()).digest()[:8], "little"),
    )


def _eos_tokens(spec: InstanceSpec, folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """Tokens that end an output, as generation_config.json says, or else config.json."""
    path = folder / "generation_config.json"
    generation = _read_json(spec, path) if path.exists() else {}
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
