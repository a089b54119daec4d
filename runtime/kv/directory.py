"""Who has KV of whom: of each request that waits, the leading tokens that every instance has.

Instances say which blocks came to their prefix caches and which left. The prompts that wait are a
tree of the same blocks, and so an event finds the requests whose prompts hold its blocks: it costs
what it changes, not what waits.
"""

from collections.abc import Sequence

import numpy as np

from sagec.runtime.kv.hashes import block_hashes
from sagec.runtime.request import Request
from sagec.runtime.state import Instances, RequestTable


class Directory:
    """Keeps the column `cached_tokens` of a request table true.

    A request is of interest from when it waits until an instance has begun it: what is told of it
    in between decides where it goes, and what the plan says it need not compute. Reused are whole
    blocks, and never the last token, for that one is to be computed. What an instance keeps of a
    request in host memory counts there instead, to the token.
    """

    def __init__(
        self, instances: Instances, caches_prefixes: Sequence[bool], table: RequestTable
    ) -> None:
        """caches_prefixes: of each instance; who does not prefill has no use for prefixes."""
        self._table = table
        self._held: list[set[int]] = [set() for _ in caches_prefixes]
        self._trees: dict[tuple[str, int], _Tree] = {}
        self._tree_at: list[_Tree | None] = [None] * len(caches_prefixes)
        for index in np.flatnonzero(instances.prefills & caches_prefixes).tolist():
            model, block_tokens = str(instances.model[index]), int(instances.block_tokens[index])
            tree = self._trees.setdefault((model, block_tokens), _Tree(block_tokens))
            tree.reached[index] = set()
            self._tree_at[index] = tree
        self._chains: dict[int, dict[int, tuple[int, ...]]] = {}
        self._kept: dict[int, int] = {}

    def wait(self, row: int, request: Request, output: Sequence[int] = ()) -> None:
        """A request waits; its output so far is part of what is to be computed."""
        self.leave(row)
        model = str(self._table.model[row])
        for (of_model, block_tokens), tree in self._trees.items():
            if of_model != model:
                continue
            chains = self._chains.setdefault(row, {})
            known = chains.get(block_tokens, ())
            chains[block_tokens] = chain = _chain(request, output, block_tokens, known)
            chain = tree.add(row, chain)
            for index in tree.reached:
                depth = tree.reach(chain, index, self._held[index])
                self._table.cached([row], index, depth * block_tokens)

    def keep(self, row: int, instance: int, tokens: int) -> None:
        """The instance has so many tokens of a waiting request in host memory."""
        self._kept[row] = instance
        last = int(self._table.prompt_tokens[row]) - 1
        self._table.cached([row], instance, min(tokens, last))

    def leave(self, row: int) -> None:
        """An instance has begun the request, or nobody ever will."""
        self._kept.pop(row, None)
        for tree in self._trees.values():
            tree.remove(row)

    def forget(self, row: int) -> None:
        """The request has ended."""
        self.leave(row)
        self._chains.pop(row, None)

    def changed(self, instance: int, stored: Sequence[int], evicted: Sequence[int]) -> None:
        """The prefix cache of an instance has these blocks now, and those no more."""
        held, tree = self._held[instance], self._tree_at[instance]
        gone = held.intersection(evicted).difference(stored)
        held.difference_update(gone)
        held.update(stored)
        if tree is None:
            return
        # Who loses a block loses what is behind it too, so that the first one gone says all.
        for block in gone & tree.reached[instance]:
            if (node := tree.nodes[block]).parent not in gone:
                tree.retreat(block, instance)
                self._write(node.rows, instance, node.depth)
        for block in stored:
            for rows, depth in tree.advance(block, instance, held):
                self._write(rows, instance, depth)

    def lose(self, instance: int) -> None:
        """The instance has failed: it has nothing any more."""
        self._held[instance].clear()
        if (tree := self._tree_at[instance]) is not None:
            tree.reached[instance].clear()
        self._kept = {row: at for row, at in self._kept.items() if at != instance}
        rows = self._table.cached_tokens[:, instance].nonzero()[0]
        self._table.cached(rows.tolist(), instance, 0)

    def held(self, instance: int) -> frozenset[int]:
        """The blocks that an instance has said it has."""
        return frozenset(self._held[instance])

    def _write(self, rows: set[int], instance: int, blocks: int) -> None:
        """The instance has so many first blocks of these prompts."""
        if self._kept:
            rows = {row for row in rows if self._kept.get(row) != instance}
        tree = self._tree_at[instance]
        assert tree is not None
        self._table.cached([*rows], instance, blocks * tree.block_tokens)


def _chain(
    request: Request, output: Sequence[int], block_tokens: int, known: tuple[int, ...]
) -> tuple[int, ...]:
    """Hashes of the blocks that a request could reuse; known: those of it when it last waited."""
    num_tokens = len(request.prompt) + len(output)
    whole = max(num_tokens - 1, 0) // block_tokens
    given = request.block_hashes
    if given and len(given) == len(request.prompt) // block_tokens:
        if not output:
            return given[:whole]
        known = ()
    tokens = (*request.prompt, *output) if output else request.prompt
    return block_hashes(tokens[: whole * block_tokens], block_tokens, request.adapter, known)


class _Node:
    """A block of prompts: how many are before it and which one, those behind it, the rows of the
    prompts that it is in, and of those that end with it."""

    __slots__ = ("children", "depth", "ends", "parent", "rows")

    def __init__(self, depth: int, parent: int | None) -> None:
        self.depth, self.parent = depth, parent
        self.children: set[int] = set()
        self.rows: set[int] = set()
        self.ends: set[int] = set()


class _Tree:
    """Prompts that wait, for one model and size of block, as a tree of blocks.

    A hash names all tokens up to its block's end, so that a prompt is a path, and a block's place
    in it the same in every prompt. reached: of each instance, the blocks that it has with all
    before them.
    """

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.nodes: dict[int, _Node] = {}
        self.reached: dict[int, set[int]] = {}
        self._chain_of: dict[int, tuple[int, ...]] = {}

    def add(self, row: int, chain: tuple[int, ...]) -> tuple[int, ...]:
        """A prompt waits; the part of it that is kept here.

        That is all of it, unless a sender made its hashes up: a block that would stand in two
        places is left out, with all behind it.
        """
        nodes, parent = self.nodes, None
        for depth, block in enumerate(chain):
            node = nodes.get(block)
            if node is not None and (node.depth, node.parent) != (depth, parent):
                chain = chain[:depth]
                break
            if node is None:
                node = nodes[block] = _Node(depth, parent)
                if parent is not None:
                    nodes[parent].children.add(block)
            node.rows.add(row)
            parent = block
        if parent is not None:
            nodes[parent].ends.add(row)
        self._chain_of[row] = chain
        return chain

    def remove(self, row: int) -> None:
        """A prompt waits no more; blocks that are in no other go."""
        for block in reversed(self._chain_of.pop(row, ())):
            node = self.nodes[block]
            node.rows.discard(row)
            node.ends.discard(row)
            if not node.rows:
                del self.nodes[block]
                if node.parent is not None:
                    self.nodes[node.parent].children.discard(block)
                for reached in self.reached.values():
                    reached.discard(block)

    def reach(self, chain: tuple[int, ...], instance: int, held: set[int]) -> int:
        """How many of a prompt's first blocks the instance has."""
        depth = next((at for at, block in enumerate(chain) if block not in held), len(chain))
        self.reached[instance].update(chain[:depth])
        return depth

    def advance(self, block: int, instance: int, held: set[int]) -> list[tuple[set[int], int]]:
        """A block came: the rows of which the instance has more now, and how many blocks."""
        node, reached = self.nodes.get(block), self.reached[instance]
        if node is None or block in reached:
            return []
        if node.parent is not None and node.parent not in reached:
            return []
        found: list[tuple[set[int], int]] = []
        left = [block]
        while left:
            reached.add(block := left.pop())
            node = self.nodes[block]
            left += node.children & held
            stay = [self.nodes[child].rows for child in node.children - held]
            if rows := node.ends.union(*stay):
                found.append((rows, node.depth + 1))
        return found

    def retreat(self, block: int, instance: int) -> None:
        """A block went: the instance reaches neither it nor what is beyond it any more."""
        reached, left = self.reached[instance], [block]
        while left:
            block = left.pop()
            if block in reached:
                reached.discard(block)
                left += self.nodes[block].children
