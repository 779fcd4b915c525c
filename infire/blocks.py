"""Which KV block belongs to whom. Bookkeeping only: knows no queue, and no bytes.

A block table keeps its indices: block i of a group covers positions i*P .. i*P + P - 1. A group
with a window gives a block back once its last position has left the window, and `HOLE` stays in
its place; so which blocks of a table are owned follows from the number of computed tokens alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence as Seq

from infire.kv_layout import KVGroup

# A block id like any other, so that a gather through a table stays inside the cache; but nothing
# read through it may count.
HOLE = 0

Tables = list[list[int]]  # the block table of each KV group


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


class KVSpace:
    """The pools of all groups, and how the block tables of a sequence are cut from them.

    The tables are the sequence's own; `max_step_tokens` is how many tokens it gains at once.
    """

    def __init__(self, pools: Seq[BlockPool], groups: Seq[KVGroup], max_step_tokens: int) -> None:
        self._groups = tuple(zip(groups, pools, strict=True))
        self._max_step_tokens = max_step_tokens
        self._windowed = [n for n, group in enumerate(groups) if group.window is not None]
        self.forgets = bool(self._windowed)  # else `forget` does nothing

    @property
    def num_free(self) -> int:
        return sum(pool.num_free for _, pool in self._groups)

    @property
    def num_blocks(self) -> int:
        return sum(pool.num_blocks for _, pool in self._groups)

    @property
    def longest(self) -> int:
        """Tokens that one sequence with the pools to itself may have."""
        return min(
            (
                pool.num_blocks * group.block_tokens
                for group, pool in self._groups
                if self._most_owned(group) > pool.num_blocks
            ),
            default=sys.maxsize,
        )

    def fits(
        self,
        num_tokens: int,
        num_adopted: int,
        *,
        spare: int,
        leaving: Seq[tuple[Tables, int]] = (),
    ) -> bool:
        """Whether a new sequence may grow to `num_tokens` and leave `spare` blocks a group.

        With the blocks that are free, and those of `leaving`: tables, and tokens computed.
        """
        for n, (group, pool) in enumerate(self._groups):
            owned = _blocks(num_tokens, group) - _first_owned(num_adopted, group)
            num_free = pool.num_free + sum(
                max(0, len(tables[n]) - _first_owned(num_computed, group))
                for tables, num_computed in leaving
            )
            if num_free < min(owned, self._most_owned(group)) + spare:
                return False
        return True

    def holds(self, lengths: Seq[int]) -> bool:
        """Whether sequences can all grow to these lengths, with the pools to themselves."""
        return all(
            sum(min(_blocks(length, group), self._most_owned(group)) for length in lengths)
            <= pool.num_blocks
            for group, pool in self._groups
        )

    def new_tables(self, num_adopted: int = 0) -> Tables:
        """Tables of a sequence that begins with the KV of `num_adopted` tokens, without blocks."""
        return [[HOLE] * _first_owned(num_adopted, group) for group, _ in self._groups]

    def room(self, tables: Tables, *, spare: int = 0) -> int:
        """Tokens, from the sequence's first, for which there are blocks in `tables` or free.

        `spare` of the free blocks of each group do not count.
        """
        return min(
            (len(table) + max(0, pool.num_free - spare)) * group.block_tokens
            for (group, pool), table in zip(self._groups, tables, strict=True)
        )

    def cover(self, tables: Tables, num_tokens: int) -> int:
        """Take the blocks missing for `num_tokens`, of which there must be room for all.

        How many tokens the tables then cover: up to a block more.
        """
        for (group, pool), table in zip(self._groups, tables, strict=True):
            taken = pool.take(max(0, _blocks(num_tokens, group) - len(table)))
            assert taken is not None, "room is asked for before blocks are taken"
            table += taken
        return min(
            len(table) * group.block_tokens
            for (group, _), table in zip(self._groups, tables, strict=True)
        )

    def forget(self, tables: Tables, before: int, after: int) -> None:
        """Give back what left a window while computed tokens went from `before` to `after`."""
        for n in self._windowed:
            group, pool = self._groups[n]
            first = _first_owned(before, group)
            end = min(_first_owned(after, group), len(tables[n]))
            if first < end:
                pool.give_back(tables[n][first:end])
                tables[n][first:end] = [HOLE] * (end - first)

    def give_back(self, tables: Tables, num_computed: int) -> None:
        """Empty the tables of a sequence that goes."""
        for (group, pool), table in zip(self._groups, tables, strict=True):
            pool.give_back(table[_first_owned(num_computed, group) :])
            table.clear()

    def check(self, owners: Seq[tuple[Tables, int]]) -> None:
        """Assert that these tables, with computed tokens, own each block that is not free once."""
        for n, (group, pool) in enumerate(self._groups):
            pool.check()
            owned: list[int] = []
            for tables, num_computed in owners:
                first = _first_owned(num_computed, group)
                assert len(tables[n]) * group.block_tokens >= num_computed
                assert tables[n][:first] == [HOLE] * len(tables[n][:first])
                owned += tables[n][first:]
            assert len(set(owned)) == len(owned) == pool.num_blocks - pool.num_free

    def _most_owned(self, group: KVGroup) -> int:
        """Blocks that a sequence of any length owns at once, at most."""
        if group.window is None:
            return sys.maxsize
        return _blocks(group.window - 1 + self._max_step_tokens, group) + 1


def _blocks(num_tokens: int, group: KVGroup) -> int:
    return -(-num_tokens // group.block_tokens)


def _first_owned(num_computed: int, group: KVGroup) -> int:
    """Index of the first block whose positions the token at `num_computed` may still look at."""
    return group.first_visible(num_computed) // group.block_tokens
