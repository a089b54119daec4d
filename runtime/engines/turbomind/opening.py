"""From an InstanceSpec to a patched TurboMind of this process that obeys plans."""

import itertools
from dataclasses import dataclass
from pathlib import Path

from sagec.runtime.engines import Capability, EngineError, InstanceSpec
from sagec.runtime.engines.turbomind import abi
from sagec.runtime.engines.turbomind.loading import Loaded, load
from sagec.runtime.engines.turbomind.native import Native, NativeError, NativeInstance
from sagec.runtime.engines.turbomind.options import Options
from sagec.runtime.engines.turbomind.patching import PatchError, ensure_patched, has_driver
from sagec.runtime.engines.turbomind.residents import Residents
from sagec.runtime.engines.turbomind.toy import ToyError, load_stand_ins
from sagec.runtime.row import Intake
from sagec.runtime.text import TokenizerFile

_NUMBERS = itertools.count(1)
"""Of the instances of this process; none is given twice, for its sessions bear it."""


@dataclass(frozen=True)
class Opened:
    """An instance that waits for plans."""

    loaded: Loaded
    native: NativeInstance
    residents: Residents
    capability: Capability

    def close(self) -> None:
        """End all sessions, then TurboMind itself."""
        self.residents.close()
        self.native.close()
        self.loaded.close()


def open_instance(spec: InstanceSpec, options: Options) -> Opened:
    """Patch TurboMind, load the model, and take its decisions over. Raises EngineError."""
    library = _patched(spec, options)
    loaded = load(spec, options)
    try:
        native = library.open(
            next(_NUMBERS),
            decider=abi.PLANS,
            num_ranks=options.tp,
            deadline_us=options.deadline_us,
        )
    except NativeError as error:
        loaded.close()
        raise EngineError(f"instance {spec.id!r}: {error}") from None
    block_bytes = loaded.kv_bytes_per_token * spec.block_tokens // options.tp
    layout = library.layout(loaded.layout_seed, block_bytes, spec.block_tokens, options.tp)
    native.set_layout(layout)
    intake = Intake(
        vocab=loaded.vocab_size,
        eos_tokens=loaded.eos_tokens,
        room_tokens=loaded.max_context_tokens,
        tokenizer=TokenizerFile(Path(spec.model)),
    )
    capability = Capability(
        kv_blocks=spec.kv_blocks,
        block_tokens=spec.block_tokens,
        kv_layout=f"turbomind:{layout:016x}",
        kv_bytes_per_token=loaded.kv_bytes_per_token,
        max_context_tokens=loaded.max_context_tokens,
        eos_tokens=loaded.eos_tokens,
        caches_prefixes=options.prefix_cache == "on",
    )
    return Opened(loaded, native, Residents(loaded, native, intake, layout), capability)


def _patched(spec: InstanceSpec, options: Options) -> Native:
    """The patches, before a checkpoint is loaded, which may take minutes."""
    try:
        if options.maths == "toy":
            load_stand_ins()
        elif not has_driver():
            raise EngineError(
                f"instance {spec.id!r}: no CUDA GPU here; option maths=toy runs TurboMind's own "
                "scheduler on the CPU with a toy model"
            )
        return ensure_patched()
    except (ToyError, PatchError) as error:
        raise EngineError(f"instance {spec.id!r}: {error}") from None
