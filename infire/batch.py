"""From a plan to the tensors of one forward pass. Knows no model and no sampling."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infire.cells import cells_of
from infire.kernels.tiles import Span, Tile, TileShape, tiles_of
from infire.kv_layout import KVGroup
from infire.plan import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupBatch:
    """What the layers of one KV group need to know of a step."""

    cells: Tensor  # (T,) int64: where the KV of each token goes
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """All rows of a step, one after the other: T tokens."""

    token_ids: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64
    # (R,) int64: indices of the tokens whose successors are wanted; of a row that samples, its
    # last known token and its drafts.
    sampled: Tensor
    groups: tuple[GroupBatch, ...]


class BlockTables:
    """The block table of every slot, per KV group."""

    def __init__(self, groups: Seq[KVGroup], num_slots: int, max_tokens: int) -> None:
        self.groups = tuple(groups)
        self._tables = [
            np.zeros((num_slots, -(-max_tokens // group.block_tokens)), np.int32)
            for group in groups
        ]
        self._lengths = np.zeros((len(groups), num_slots), np.int64)

    @property
    def arrays(self) -> list[NDArray[np.int32]]:
        """(slots, width) each, a group after the other: read only."""
        return self._tables

    def clear(self, slot: int) -> None:
        self._lengths[:, slot] = 0

    def extend(self, slot: int, new_blocks: Seq[Seq[int]]) -> None:
        """Append to the slot's table of each group."""
        for n, blocks in enumerate(new_blocks):
            length = self._lengths[n, slot]
            self._tables[n][slot, length : length + len(blocks)] = blocks
            self._lengths[n, slot] += len(blocks)

    def of(self, group: int, slot: int) -> NDArray[np.int32]:
        return self._tables[group][slot, : self._lengths[group, slot]]


def build(rows: Seq[Row], tables: BlockTables, shapes: Seq[TileShape]) -> Batch:
    """The batch that computes `rows`; one shape a KV group. The tables must cover the rows."""
    device = shapes[0].device
    firsts = np.cumsum([0, *(_num_tokens(row) for row in rows)])
    positions = np.concatenate([_positions(row) for row in rows])
    token_ids = np.concatenate([_ids(row) for row in rows])
    sampled = [
        index
        for end, row in zip(firsts[1:], rows, strict=True)
        if row.sample
        for index in range(end - 1 - len(row.draft_ids), end)
    ]
    return Batch(
        token_ids=torch.from_numpy(token_ids).to(device),
        positions=torch.from_numpy(positions).to(device),
        sampled=torch.tensor(sampled, dtype=torch.int64, device=device),
        groups=tuple(
            [_group_batch(rows, firsts, tables, n, shape) for n, shape in enumerate(shapes)]
        ),
    )


def _num_tokens(row: Row) -> int:
    return row.num_new + len(row.draft_ids)


def _positions(row: Row) -> NDArray[np.int64]:
    return np.arange(row.start, row.start + _num_tokens(row))


def _ids(row: Row) -> NDArray[np.int64]:
    assert isinstance(row.ids, tuple), "one step is in flight at a time: its ids are known"
    assert len(row.ids) == row.num_new > 0
    return np.array(row.ids + row.draft_ids, np.int64)


def _group_batch(
    rows: Seq[Row], firsts: NDArray[np.int64], tables: BlockTables, n: int, shape: TileShape
) -> GroupBatch:
    group = tables.groups[n]
    spans = []
    cells = []
    for row, first in zip(rows, firsts[:-1], strict=True):
        positions = _positions(row)
        blocks = tables.of(n, row.slot)
        cells.append(cells_of(group, blocks, positions))
        spans.append(
            Span(
                first=int(first),
                start=row.start,
                blocks=blocks,
                oldest=_oldest(group, positions),
            )
        )
    return GroupBatch(
        cells=torch.from_numpy(np.concatenate(cells)).to(shape.device),
        tiles=tiles_of(spans, shape),
    )


def _oldest(group: KVGroup, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    if group.window is None:
        return np.zeros_like(positions)
    return np.array([group.first_visible(position) for position in positions.tolist()])
