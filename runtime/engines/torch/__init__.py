"""The reference engine: Llama, Qwen2, Qwen3, Mixtral and Qwen3-MoE checkpoints on torch, one KV
tensor a layer.

What each file holds, in the order data passes: config (config.json), share (what a rank holds of a
model), checkpoint (safetensors to weights), ffn (one network, or experts), rope, batch (what one
step computes, flattened), lanes (a batch in parts), program (the forward pass as generated code) or
model (the same, written here), both over linear (matrix products) and kernels (the rest, in torch)
or native (in C, kernels.c, where a compiler is found), sampling, row (a request here), residents
(the rows and their blocks, which are those of runtime/kv), rank (this process's part of steps and
KV) over ranks (collectives) and rank_processes (the other ranks, each running rank_child), transfer
(KV out and in), loading, engine (plans to steps to events). Beside these, live_memory says what a
step held.
"""

from sagec.runtime.engines import Engine, EngineError, InstanceSpec


def create(spec: InstanceSpec) -> Engine:
    """A torch engine with the checkpoint of `spec` loaded, ready for plans.

    Options: dtype ("auto", float32, bfloat16, float16), device ("cpu", "cuda"), threads ("1"),
    channel ("shared-memory", "local"), native ("auto": C kernels where a compiler is found, "on",
    "off"), prefix_cache ("on": KV of whole blocks stays until its room is needed, "off"), eviction
    ("lru", or another policy of runtime/kv/policies), host_blocks and disk_blocks ("0": for cached
    blocks that the device has no room for), spool ("": folder of the disk's file), migration
    ("always", "where-it-pays": which blocks move there), quotas ("": the most KV blocks that the
    requests of some tenants may hold, as in "acme=40,other=20"), program ("off", or the file of
    generated code that computes the steps), tp ("1": ranks that share out the model, each a process
    on the CPU; more need a program).

    Raises EngineError where torch is missing, an option is unknown or the checkpoint is malformed.
    """
    try:
        from sagec.runtime.engines.torch.engine import TorchEngine
    except ImportError as error:
        raise EngineError(
            f"instance {spec.id!r}: the torch engine needs {error.name}; "
            "install it with: pip install 'sagec[torch]'"
        ) from None
    return TorchEngine(spec)
