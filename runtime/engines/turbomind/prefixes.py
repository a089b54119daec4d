"""What TurboMind's prefix cache holds, by the hashes that sagec knows blocks by."""

from collections.abc import Iterable, Sequence

from sagec.runtime.kv import block_hashes


class Published:
    """Blocks in the prefix cache of an instance, by uid and by hash.

    TurboMind knows a block by the uid of its content's place, which a block computed twice changes:
    the trie then names the newer one.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._hash_of: dict[int, int] = {}
        self._uid_of: dict[int, int] = {}
        self._changed: set[int] = set()
        self._said: set[int] = set()

    def store(self, tokens: Sequence[int], uids: Sequence[int]) -> None:
        """The first blocks of `tokens` are in the cache now, under these uids."""
        named = block_hashes(tokens[: len(uids) * self._block_tokens], self._block_tokens)
        for block_hash, uid in zip(named, uids, strict=False):
            older = self._uid_of.get(block_hash)
            if older != uid:
                if older is not None:
                    del self._hash_of[older]
                self._hash_of[uid], self._uid_of[block_hash] = block_hash, uid
                self._changed.add(block_hash)

    def evict(self, uids: Iterable[int]) -> None:
        """These blocks are gone, in the cache or not."""
        for uid in uids:
            block_hash = self._hash_of.pop(uid, None)
            if block_hash is not None:
                del self._uid_of[block_hash]
                self._changed.add(block_hash)

    def take_changes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Hashes of blocks that came, and of those that went, since this was asked last."""
        here = {block_hash for block_hash in self._changed if block_hash in self._uid_of}
        stored, evicted = here - self._said, (self._changed - here) & self._said
        self._said |= stored
        self._said -= evicted
        self._changed.clear()
        return tuple(stored), tuple(evicted)
