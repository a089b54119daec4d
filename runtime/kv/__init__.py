"""KV blocks: who holds them, which prefixes they are, and which of them go when room is needed."""

from sagec.runtime.kv.hashes import block_contents, block_hashes

__all__ = ["block_contents", "block_hashes"]
