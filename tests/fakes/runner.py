"""A model whose every answer can be worked out by hand: the next id is the last plus one.

`(last + 1) % 256`, so after the prompt `[7, 8]` come 9, 10, 11 ... and after 255 comes 0; with a
`period` of 4, 3 is followed by 0 already. It never stops by itself: answers end by `max_tokens` or
`stop_ids`. Asked for logprobs, it gives the chosen id 0.0, and the i-th likeliest (from 0) is the
id i further on, with logprob -i. Drafts are accepted as far as they are what it says itself.

Behind it is an honest KV cache: "the KV" of a token is its id (K) and its position (V), kept in
the blocks that the scheduler assigned. Exported, it is that of head 0, and of each further head
`HEAD` more: what is adopted must have every head of its rank in its place. Every row first checks
that its block table still holds exactly its history, so a block shared by mistake, freed too early
or lost on a hand-over fails an assertion in the same step.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

import numpy as np

from infire.block_tags import BlockTags, with_stale
from infire.kv_layout import KVGroup, KVLayout
from infire.plan import Row, RowResult, SlotOpen, StepPlan
from infire.request import Logprob

VOCABULARY = 256
_CELL = Struct("=ii")  # the KV of one token: its id, its position
_EMPTY = _CELL.pack(-1, -1)
_SLOTS = 1024
HEAD = 1 << 20  # from the KV of a head to that of the next


def counting_layout(
    *,
    block_tokens: int = 4,
    windows: Seq[int | None] = (None,),
    model_digest: str = "counting",
    chunked: bool = False,
    num_heads: int = 1,
) -> KVLayout:
    """One group of one layer a window (None: full attention); 8 bytes a token a head a group."""
    windowed = "chunked" if chunked else "sliding"
    groups = tuple(
        KVGroup(
            kind="full" if window is None else windowed,
            layers=(n,),
            num_heads=num_heads,
            head_dim=1,
            window=window,
            block_tokens=block_tokens,
        )
        for n, window in enumerate(windows)
    )
    return KVLayout(groups=groups, dtype="float32", model_digest=model_digest)


def exported_kv(layout: KVLayout, token_ids: Seq[int]) -> bytes:
    """What the export of a sequence with these computed tokens holds: per group all K, all V."""
    content = b""
    for group in layout.groups:
        heads = layout.heads(group, layout.tp_rank)
        positions = range(group.first_visible(len(token_ids)), len(token_ids))
        content += _of_heads([token_ids[p] for p in positions], heads)
        content += _of_heads(positions, heads)
    return content


def _of_heads(values: Seq[int], heads: range) -> bytes:
    """A plane of the KV of these heads, which is `values` for head 0."""
    if heads == range(1):
        return array("i", values).tobytes()
    return array("i", [value + head * HEAD for value in values for head in heads]).tobytes()


def _of_head_0(plane: array[int], heads: range) -> array[int]:
    """The values of which that plane is. ValueError where a head is not in its place."""
    values = array("i", [value - heads.start * HEAD for value in plane[:: len(heads)]])
    if _of_heads(values, heads) != plane.tobytes():
        raise ValueError(f"this is not the KV of heads {heads.start} to {heads.stop - 1}")
    return values


@dataclass(slots=True)
class _Slot:
    """What a runner remembers of the tenant of a slot."""

    opened: SlotOpen
    history: bytearray  # one cell a token: what the KV of each position must be
    last_id: int
    tables: list[list[int]]  # per group


class CountingRunner:
    """`infire.plan.Runner` without a model; `step_s` is how long a step pretends to compute."""

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: Seq[int],
        *,
        step_s: float = 0.0,
        period: int = VOCABULARY,
    ) -> None:
        self._layout = layout
        self._step_s = step_s
        self._period = period
        self._slots: dict[int, _Slot] = {}
        self._kv = [
            bytearray(_EMPTY * count * group.block_tokens)
            for count, group in zip(num_blocks, layout.groups, strict=True)
        ]
        self._last_step = 0
        # Tables as a runner with arrays has them: of as many slots and blocks as any test uses.
        self._arrays = [np.zeros((_SLOTS, 4 * count + 64), np.int32) for count in num_blocks]
        self.tags = BlockTags(layout.groups, self._arrays, num_blocks)
        self.prompt_tokens = 0  # computed here, as opposed to adopted

    def run(self, plan: StepPlan) -> list[RowResult]:
        assert plan.step == self._last_step + 1, "every plan with rows is run, in order"
        self._last_step = plan.step
        for slot in plan.closes:
            del self._slots[slot]
        for opened in plan.opens:
            assert opened.slot not in self._slots, "a slot is closed before it is opened again"
            self._slots[opened.slot] = _Slot(
                opened=opened,
                history=bytearray().join(_CELL.pack(t, p) for p, t in enumerate(opened.token_ids)),
                last_id=opened.token_ids[-1],
                tables=[[] for _ in self._layout.groups],
            )
            self.tags.open(opened.slot)
        assert len({row.slot for row in plan.rows}) == len(plan.rows)
        for row in plan.rows:
            self._append(row)
        rows = self.tags.fresh(plan.rows)
        for row in rows:  # all are written before one is read, as if computed at once
            self._write(row)
        results = [self._sample(row) for row in rows]
        if self._step_s:
            time.sleep(self._step_s)
        return with_stale(plan.rows, rows, results)

    def save(self, block: int) -> bytes:
        (kv,), (group,) = self._kv, self._layout.groups
        width = group.block_tokens * _CELL.size
        return bytes(kv[block * width : (block + 1) * width])

    def load(self, block: int, content: bytes) -> None:
        (kv,), (group,) = self._kv, self._layout.groups
        width = group.block_tokens * _CELL.size
        assert len(content) == width
        kv[block * width : (block + 1) * width] = content

    def export(self, block_ids: Seq[Seq[int]], num_tokens: int, path: str, start: int = 0) -> int:
        content = bytearray()
        for n, (group, table) in enumerate(zip(self._layout.groups, block_ids, strict=True)):
            first = max(start, group.first_visible(num_tokens))
            values = array("i", self._read(n, table, first, num_tokens))
            heads = self._layout.heads(group, self._layout.tp_rank)
            content += _of_heads(values[0::2], heads) + _of_heads(values[1::2], heads)
        with Path(path).open("r+b" if start else "xb") as file:
            file.seek(0, os.SEEK_END)
            file.write(content)
            assert file.tell() == self._layout.exported_bytes(num_tokens)
            return file.tell()

    def adopt(
        self, block_ids: Seq[Seq[int]], num_tokens: int, path: str, piece_ends: Seq[int] = ()
    ) -> None:
        content = Path(path).read_bytes()
        pieces = self._layout.pieces(num_tokens, piece_ends)
        expected = self._layout.exported_bytes(num_tokens)
        if len(content) != expected:
            raise ValueError(f"{len(content)} bytes for {num_tokens} tokens, not {expected}")
        values = array("i", content)
        for start, end in pieces:
            for n, (group, table) in enumerate(zip(self._layout.groups, block_ids, strict=True)):
                first = max(start, group.first_visible(end))
                heads = self._layout.heads(group, self._layout.tp_rank)
                count = (end - first) * len(heads)
                keys = _of_head_0(values[:count], heads)
                positions = _of_head_0(values[count : 2 * count], heads)
                values = values[2 * count :]
                cells = b"".join(map(_CELL.pack, keys, positions))
                self._put(n, table, first, cells)

    def _append(self, row: Row) -> None:
        """Take over the row's blocks."""
        if row.new_blocks:
            tables = self._slots[row.slot].tables
            for array_, table, new in zip(self._arrays, tables, row.new_blocks, strict=True):
                array_[row.slot, len(table) : len(table) + len(new)] = new
                table += new
            self.tags.extend(row)

    def _write(self, row: Row) -> None:
        """Store the KV of the row's ids and drafts."""
        slot = self._slots[row.slot]
        assert isinstance(row.ids, tuple)
        assert len(row.ids) == row.num_new > 0
        end = row.start + row.num_new
        cells = b"".join(map(_CELL.pack, row.ids, range(row.start, end)))
        begin = row.start * _CELL.size
        assert slot.history[begin : begin + len(cells)] == cells, "the ids are not the history's"
        cells += b"".join(map(_CELL.pack, row.draft_ids, range(end, end + len(row.draft_ids))))
        for n, table in enumerate(slot.tables):
            self._put(n, table, row.start, cells)
        self.prompt_tokens += max(0, min(end, slot.opened.num_prompt) - row.start)

    def _sample(self, row: Row) -> RowResult:
        """Check that all that the row may look at is there, and count on."""
        slot = self._slots[row.slot]
        end = row.start + row.num_new
        for n, (group, table) in enumerate(zip(self._layout.groups, slot.tables, strict=True)):
            first = group.first_visible(row.start)
            assert (
                self._read(n, table, first, end)
                == slot.history[first * _CELL.size : end * _CELL.size]
            ), f"slot {row.slot}: the KV of {first} to {end - 1} in group {n} is not its own"
        assert row.sample == (end * _CELL.size == len(slot.history))
        if not row.sample:
            assert not row.draft_ids
            return RowResult()
        said: list[int] = []
        for draft in (*row.draft_ids, None):
            slot.last_id = (slot.last_id + 1) % self._period
            slot.history += _CELL.pack(slot.last_id, end + len(said))
            said.append(slot.last_id)
            if slot.last_id != draft:
                break
        return RowResult(tuple(said), self._logprobs(slot, said))

    def _logprobs(self, slot: _Slot, said: Seq[int]) -> tuple[Logprob, ...]:
        num_top = slot.opened.sampling.logprobs
        if num_top is None:
            return ()
        return tuple(
            Logprob(i, 0.0, tuple(((i + n) % VOCABULARY, -float(n)) for n in range(num_top)))
            for i in said
        )

    def _read(self, n: int, table: Seq[int], first: int, end: int) -> bytes:
        """Cells of positions first .. end - 1 in group `n`."""
        kv, size = self._kv[n], self._layout.groups[n].block_tokens
        width = size * _CELL.size
        skipped = first // size
        needed = table[skipped : -(-end // size)]
        cells = b"".join([kv[block * width : (block + 1) * width] for block in needed])
        base = skipped * size
        return cells[(first - base) * _CELL.size : (end - base) * _CELL.size]

    def _put(self, n: int, table: Seq[int], start: int, cells: bytes) -> None:
        """Store cells of the positions from `start` on."""
        kv, size = self._kv[n], self._layout.groups[n].block_tokens
        for i in range(0, len(cells), _CELL.size):
            position = start + i // _CELL.size
            index = (table[position // size] * size + position % size) * _CELL.size
            kv[index : index + _CELL.size] = cells[i : i + _CELL.size]
