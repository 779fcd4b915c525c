"""Whether what a slot is about to read is still its own: a tag a physical block, checked each step.

The pool gives a block a new tag whenever it is handed out anew (`infire.blocks.BlockPool.tags`),
and a row brings the tags of the blocks that it appends. The first to bring a newer tag owns the
block from then on; whoever still has the block under an older one has lost it. Indices only.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from infire.kv_layout import KVGroup
from infire.plan import Row, RowResult


class BlockTags:
    """What each physical block carries, and what each slot expects of its own."""

    def __init__(
        self, groups: Seq[KVGroup], tables: Seq[NDArray[np.int32]], num_blocks: Seq[int]
    ) -> None:
        """`tables`: of each group the block tables of all slots, (slots, width), kept by others."""
        self._groups = tuple(groups)
        self._tables = tuple(tables)
        self._expected = [np.zeros(table.shape, np.int64) for table in tables]  # 0: not checked
        self._lengths = [[0] * len(table) for table in tables]
        self.carried = [np.zeros(count, np.int64) for count in num_blocks]

    def reset(self) -> None:
        """Begin anew, as with the first plan of a new scheduler."""
        for array in (*self._expected, *self.carried):
            array.fill(0)

    def open(self, slot: int) -> None:
        """Forget what was expected in the slot."""
        for expected, lengths in zip(self._expected, self._lengths, strict=True):
            expected[slot, : lengths[slot]] = 0
            lengths[slot] = 0

    def extend(self, row: Row) -> None:
        """Take note of the blocks that the row appends to its slot's tables.

        Those without tags are not checked.
        """
        untold = [(0,) * len(blocks) for blocks in row.new_blocks]
        for n, (blocks, tags) in enumerate(
            zip(row.new_blocks, row.new_tags or untold, strict=True)
        ):
            begin = self._lengths[n][row.slot]
            end = self._lengths[n][row.slot] = begin + len(blocks)
            if blocks:
                self._expected[n][row.slot, begin:end] = tags
                index = np.array(blocks)
                self.carried[n][index] = np.maximum(self.carried[n][index], tags)

    def fresh(self, rows: Seq[Row]) -> list[Row]:
        """The rows all of whose blocks, as far as they are looked at, are still their own."""
        stale = [False] * len(rows)
        for n, group in enumerate(self._groups):
            if group.window is None:
                self._mark_stale(n, rows, stale)
            else:
                self._mark_stale_in_window(n, group, rows, stale)
        return [row for row, gone in zip(rows, stale, strict=True) if not gone]

    def _mark_stale(self, n: int, rows: Seq[Row], stale: list[bool]) -> None:
        lengths = self._lengths[n]
        slots = [row.slot for row in rows]
        width = max(lengths[slot] for slot in slots)
        expected = self._expected[n][slots, :width]
        found = self.carried[n][self._tables[n][slots, :width]]
        differs = found != expected
        if differs.any():  # beyond the end of a shorter table, too
            differs &= expected != 0
            for i in np.flatnonzero(differs.any(axis=1)).tolist():
                stale[i] = True

    def _mark_stale_in_window(
        self, n: int, group: KVGroup, rows: Seq[Row], stale: list[bool]
    ) -> None:
        for i, row in enumerate(rows):
            first = group.first_visible(row.start) // group.block_tokens
            last = self._lengths[n][row.slot]
            expected = self._expected[n][row.slot, first:last]
            found = self.carried[n][self._tables[n][row.slot, first:last]]
            if ((found != expected) & (expected != 0)).any():
                stale[i] = True


def with_stale(rows: Seq[Row], fresh: Seq[Row], results: Seq[RowResult]) -> list[RowResult]:
    """One result for each of `rows`, where only the `fresh` were computed."""
    of_slot = {row.slot: result for row, result in zip(fresh, results, strict=True)}
    return [of_slot.get(row.slot, RowResult(stale=True)) for row in rows]
