"""Which KV block belongs to whom. Bookkeeping only: knows no sequence, and no bytes."""

from __future__ import annotations

from collections.abc import Sequence as Seq

# Stands in a block table for a block that was given back, or never taken, because every position
# in it has left the window. A block id like any other, so that a gather stays inside the cache,
# but nothing read through it may count.
HOLE = 0


class BlockPool:
    """The blocks of one KV group, handed out and taken back by number."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: what was used last is in cache
        self._is_free = bytearray(b"\1" * num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """`count` block ids, or None, and nothing taken, when there are too few."""
        if count > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._is_free[block] = 0
        return taken

    def give_back(self, block_ids: Seq[int]) -> None:
        for block in block_ids:
            assert not self._is_free[block], f"block {block} was given back twice"
            self._is_free[block] = 1
        self._free.extend(block_ids)

    def check(self) -> None:
        """Assert that each block is either free, once, or taken."""
        assert len(set(self._free)) == len(self._free) == sum(self._is_free)
        assert all(self._is_free[block] for block in self._free)
