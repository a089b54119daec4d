"""What an instance of TurboMind can be told."""

from typing import Literal, get_args, get_type_hints

import msgspec

from sagec.runtime.engines import EngineError, InstanceSpec


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `InstanceSpec.options` may say to this engine.

    maths: "model" computes with the checkpoint on GPUs, "toy" on the CPU with a toy model (its
    path gives sizes and vocabulary alone; "" is a built-in one). tp: tensor-parallel ranks.
    devices: of each rank, separated by commas ("": the first ones). prefix_cache: whether KV stays
    for prompts that begin alike. session_len: the most tokens of a prompt with its output (0: the
    model's, or what the cache holds). max_batch: requests that TurboMind knows at a time, on hold
    or not. step_tokens: the most that a planned step computes (where TurboMind decides by itself
    it may be max_batch more). dtype: of weights and sums. quant_policy: bits of KV where it is
    quantised. communicator: of ranks. deadline_us: how long a step waits for a plan before
    TurboMind decides by itself. channel: how KV travels. step_us, token_us: how long a step, and
    each of its tokens, takes the toy.
    """

    maths: Literal["model", "toy"] = "model"
    tp: int = 1
    devices: str = ""
    prefix_cache: Literal["on", "off"] = "on"
    session_len: int = 0
    max_batch: int = 128
    step_tokens: int = 8192
    dtype: Literal["auto", "float16", "bfloat16"] = "auto"
    quant_policy: Literal["0", "4", "8"] = "0"
    communicator: Literal["nccl", "native", "cuda-ipc"] = "nccl"
    deadline_us: int = 1_000_000
    channel: Literal["shared-memory", "local"] = "shared-memory"
    step_us: int = 0
    token_us: int = 0


_LEAST = {
    "tp": 1,
    "session_len": 0,
    "max_batch": 1,
    "step_tokens": 1,
    "deadline_us": 1,
    "step_us": 0,
    "token_us": 0,
}

_MOST = 2**31 - 1
"""What TurboMind's own numbers hold."""


def read_options(spec: InstanceSpec) -> Options:
    """The options of `spec`, all given as text. Raises EngineError for one that is wrong."""
    place = f"instance {spec.id!r}"
    known = Options.__struct_fields__
    if unknown := sorted(spec.options.keys() - set(known)):
        listed = ", ".join(known)
        raise EngineError(f"{place}: turbomind has no option {unknown[0]!r}; it has {listed}")
    try:
        options = msgspec.convert(spec.options, Options, strict=False)
    except msgspec.ValidationError:
        raise EngineError(f"{place}: {_wrong_value(spec)}") from None
    sizes = {name: getattr(options, name) for name in _LEAST}
    sizes |= {"kv_blocks": spec.kv_blocks, "block_tokens": spec.block_tokens}
    for name, value in sizes.items():
        if value < (least := _LEAST.get(name, 1)):
            raise EngineError(f"{place}: {name} {value}; {least} at least")
        if value > _MOST:
            raise EngineError(f"{place}: {name} {value}; {_MOST} at most")
    _check_together(place, options)
    return options


def _wrong_value(spec: InstanceSpec) -> str:
    """The first option whose text is no value of its type, and what would be one."""
    kinds = get_type_hints(Options)
    for name, text in spec.options.items():
        try:
            msgspec.convert(text, kinds[name], strict=False)
        except msgspec.ValidationError:
            right = " or ".join(get_args(kinds[name])) or "a whole number"
            return f"{name} {text!r}; {right} is wanted"
    raise AssertionError("one of them was refused")


def devices(options: Options) -> list[int]:
    """Of each rank, its device."""
    return (
        [int(each) for each in options.devices.split(",")]
        if options.devices
        else [*range(options.tp)]
    )


def _check_together(place: str, options: Options) -> None:
    words = options.devices.split(",") if options.devices else []
    if not all(word.isascii() and word.isdigit() for word in words):
        raise EngineError(f"{place}: devices {options.devices!r}; numbers, as in '0,1'")
    if words and len(set(words)) != options.tp:
        raise EngineError(
            f"{place}: devices {options.devices!r} for tp {options.tp}; one device for each rank"
        )
    if options.maths == "toy" and options.communicator != "nccl":
        raise EngineError(
            f"{place}: communicator {options.communicator!r} needs GPUs; the toy has 'nccl'"
        )
    if options.maths == "model" and (options.step_us or options.token_us):
        raise EngineError(f"{place}: step_us and token_us are the toy's; set maths=toy or neither")
