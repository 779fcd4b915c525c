"""An engine whose every token depends on all of its KV: the flags and the notes of `infire serve`.

    python -m loadtest.bench.soak.engine --step-s 0.02 --fd N --model NAME ...

The KV of a token is its id, kept in the blocks that the real scheduler assigned. The next id is
read off a checksum over all of a sequence's KV, so whoever knows the prompt knows the answer, and
one block that is shared by mistake, freed too early or lost on a hand-over makes another.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import islice
from pathlib import Path
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from infire.admission import Limits
from infire.block_tags import BlockTags, with_stale
from infire.blocks import BlockPool
from infire.engine import Engine
from infire.kv_layout import KVLayout
from infire.notes import Hello
from infire.plan import Row, RowResult, StepPlan
from infire.scheduler import Scheduler
from infire.serve import serve_process
from loadtest.bench.engine_parts import engine_flags, hello_of, layout_of, limits_of

FIRST, NUM_IDS = 0x21, 0x7E - 0x21 + 1  # answers are printable ASCII, an id a character
DTYPE = "float32"
_SLOTS = 1024
_ID_BYTES = 4


def answer_to(prompt_ids: Seq[int], num_tokens: int) -> str:
    """What this model says."""
    return "".join(map(chr, islice(_ids_after(array("i", prompt_ids).tobytes()), num_tokens)))


def _ids_after(context: bytes) -> Iterator[int]:
    checksum = crc32(context)
    while True:
        token_id = FIRST + checksum % NUM_IDS
        yield token_id
        checksum = crc32(token_id.to_bytes(_ID_BYTES, "little"), checksum)


class ChecksumRunner:
    """`infire.plan.Runner` without a model; a step takes at least `step_s`."""

    def __init__(self, layout: KVLayout, num_blocks: int, *, step_s: float) -> None:
        (group,) = layout.groups
        self._layout = layout
        self._block_tokens = group.block_tokens
        self._step_s = step_s
        self._kv = np.full((num_blocks, group.block_tokens), -1, np.int32)
        self._tables: NDArray[np.int32] = np.zeros((_SLOTS, num_blocks), np.int32)
        self._lengths: dict[int, int] = {}  # of the tables of open slots
        self.tags = BlockTags(layout.groups, [self._tables], [num_blocks])

    def run(self, plan: StepPlan) -> list[RowResult]:
        began = time.monotonic()
        for slot in plan.closes:
            del self._lengths[slot]
        for opened in plan.opens:
            assert opened.slot not in self._lengths, "a slot is closed before it is opened again"
            self._lengths[opened.slot] = 0
            self.tags.open(opened.slot)
        for row in plan.rows:
            self._append(row)
        rows = self.tags.fresh(plan.rows)
        for row in rows:  # all are written before one is read, as if computed at once
            assert isinstance(row.ids, tuple)
            self._put(self._table(row.slot), row.start, (*row.ids, *row.draft_ids))
        results = [self._sample(row) for row in rows]
        time.sleep(max(0.0, self._step_s - (time.monotonic() - began)))
        return with_stale(plan.rows, rows, results)

    def save(self, block: int) -> bytes:
        raise NotImplementedError

    def load(self, block: int, content: bytes) -> None:
        raise NotImplementedError

    def export(self, block_ids: Seq[Seq[int]], num_tokens: int, path: str, start: int = 0) -> int:
        (table,) = block_ids
        ids = self._read(np.array(table, np.int32), num_tokens)[start:]
        with Path(path).open("r+b" if start else "xb") as file:
            file.seek(0, os.SEEK_END)
            file.write(ids.tobytes() + bytes(_ID_BYTES * len(ids)))  # V holds nothing
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
        (table,) = block_ids
        for start, end in pieces:
            ids = np.frombuffer(content, np.int32, end - start, 2 * _ID_BYTES * start)
            self._put(np.array(table, np.int32), start, ids)

    def _append(self, row: Row) -> None:
        """Take over the row's blocks."""
        if row.new_blocks:
            (new,) = row.new_blocks
            length = self._lengths[row.slot]
            self._tables[row.slot, length : length + len(new)] = new
            self._lengths[row.slot] = length + len(new)
            self.tags.extend(row)

    def _sample(self, row: Row) -> RowResult:
        if not row.sample:
            return RowResult()
        context = self._read(self._table(row.slot), row.start + row.num_new)
        said: list[int] = []
        next_ids = _ids_after(context.tobytes())
        for draft in (*row.draft_ids, None):
            said.append(next(next_ids))
            if said[-1] != draft:
                break
        return RowResult(tuple(said))

    def _table(self, slot: int) -> NDArray[np.int32]:
        return self._tables[slot, : self._lengths[slot]]

    def _read(self, table: NDArray[np.int32], num_tokens: int) -> NDArray[np.int32]:
        return self._kv[table].reshape(-1)[:num_tokens]

    def _put(self, table: NDArray[np.int32], start: int, ids: Seq[int] | NDArray[np.int32]) -> None:
        positions = np.arange(start, start + len(ids))
        blocks = table[positions // self._block_tokens]
        self._kv[blocks, positions % self._block_tokens] = ids


def checksum_engine(
    *, model: str, kv_tokens: int, block_tokens: int, limits: Limits, step_s: float
) -> tuple[Hello, Engine]:
    """An engine that keeps and reads KV, and what it says of itself."""
    layout = layout_of(model, block_tokens=block_tokens, dtype=DTYPE)
    num_blocks = kv_tokens // block_tokens
    scheduler = Scheduler([BlockPool(num_blocks)], layout.groups, limits)
    hello = hello_of(model, layout, scheduler, device="none: it checks sums")
    return hello, Engine(scheduler, ChecksumRunner(layout, num_blocks, step_s=step_s))


def main() -> None:
    given, _ = engine_flags().parse_known_args()  # the others are about computing
    serve_process(
        given.fd,
        lambda: checksum_engine(
            model=given.model,
            kv_tokens=given.kv_tokens,
            block_tokens=given.block_tokens,
            limits=limits_of(given),
            step_s=given.step_s,
        ),
    )


if __name__ == "__main__":
    main()
