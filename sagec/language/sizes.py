"""How many blocks of KV instances have, where they say it as a size or not at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from sagec.dialects.cluster import INSTANCE_SCALARS
from sagec.language.devices import Device
from sagec.language.errors import Errors
from sagec.language.instances import Instance
from sagec.language.models import Model, with_defaults

KV_SHARE = 0.9
"""Of a device's memory, what weights and KV may fill where the program does not say."""


class Sizes:
    """The memory of a cluster: what the weights of its instances leave of it."""

    def __init__(
        self,
        errors: Errors,
        models: Mapping[str, Model],
        devices: Mapping[str, Device],
        instances: Iterable[Instance],
    ) -> None:
        self.errors = errors
        self.models = models
        self.devices = devices
        self.weights: Counter[str] = Counter()
        self.sharers: Counter[str] = Counter()
        for instance in instances:
            each = models[instance.model].shape.weight_bytes / len(instance.devices)
            for device in instance.devices:
                self.weights[device] += int(each)
                self.sharers[device] += 1

    def kv_blocks(self, instance: Instance) -> int:
        """The blocks of an instance; 1 where that is an error, which the errors then say."""
        settings = instance.statement.settings
        blocks, kv = settings.get("kv_blocks"), settings.get("kv")
        if blocks is not None:
            if kv is not None:
                self.errors.at(kv, "'kv' and 'kv_blocks' say the same", "leave one out")
            return int(str(blocks.value))
        if kv is None:
            return self._left_over(instance)
        size, block_bytes = int(str(kv.value)), self._block_bytes(instance)
        if size < block_bytes:
            hint = f"a block of {_block_tokens(instance)} tokens is {block_bytes:.0f} bytes"
            self.errors.at(kv, f"{size} bytes hold no block", hint)
        return max(1, int(size // block_bytes))

    def _left_over(self, instance: Instance) -> int:
        """What memory is left for, but no more than full batches of full length need."""
        free, block_bytes = (
            sum(map(self._free_bytes, instance.devices)),
            self._block_bytes(instance),
        )
        if free < block_bytes:
            message = f"instance '{instance.at.text}' has no memory left for KV"
            self.errors.at(instance.at, message, self._weights_text(instance))
        context = self.models[instance.model].shape.max_context
        batch = int(with_defaults(INSTANCE_SCALARS, instance.scalars)["max_batch"])
        most = batch * -(-context // _block_tokens(instance))
        return max(1, min(int(free // block_bytes), most))

    def _block_bytes(self, instance: Instance) -> float:
        kv_dtype = str(instance.scalars.get("kv_dtype", "auto"))
        shape = self.models[instance.model].shape
        return shape.kv_bytes_per_token(kv_dtype) * _block_tokens(instance)

    def _free_bytes(self, device: str) -> float:
        """What one instance may take of a device's memory for KV."""
        memory = self.devices[device].memory_bytes
        return (memory * KV_SHARE - self.weights[device]) / self.sharers[device]

    def _weights_text(self, instance: Instance) -> str:
        weights = max(self.weights[device] for device in instance.devices)
        memory = min(self.devices[device].memory_bytes for device in instance.devices)
        return f"the weights are {weights / 2**20:.1f} MiB of a device's {memory / 2**20:.1f} MiB"


def _block_tokens(instance: Instance) -> int:
    return int(with_defaults(INSTANCE_SCALARS, instance.scalars)["block_tokens"])
