"""A model whose every answer can be worked out by hand: the next id is the last plus one.

`(last + 1) % 256`, so after the prompt `[7, 8]` come 9, 10, 11 ... and after 255 comes 0. It never
stops by itself: answers end by `max_tokens` or `stop_ids`. Asked for logprobs, it gives the chosen
id 0.0, and the i-th likeliest (from 0) is the id i further on, with logprob -i.

Behind it is an honest KV cache: "the KV" of a token is its id (K) and its position (V), kept in
the blocks that the scheduler assigned. Every row first checks that its block table still holds
exactly its history, so a block shared by mistake, freed too early or lost on a hand-over fails an
assertion in the same step.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

from infire.kv_layout import KVGroup, KVLayout
from infire.plan import Row, RowResult, SlotOpen, StepPlan
from infire.request import Logprob

VOCABULARY = 256
_EMPTY = -1


def counting_layout(
    *,
    block_tokens: int = 4,
    windows: Seq[int | None] = (None,),
    model_digest: str = "counting",
    chunked: bool = False,
) -> KVLayout:
    """One group of one layer a window (None: full attention); 8 bytes a token a group."""
    windowed = "chunked" if chunked else "sliding"
    groups = tuple(
        KVGroup(
            kind="full" if window is None else windowed,
            layers=(n,),
            num_heads=1,
            head_dim=1,
            window=window,
            block_tokens=block_tokens,
        )
        for n, window in enumerate(windows)
    )
    return KVLayout(groups=groups, dtype="float32", model_digest=model_digest)


@dataclass(slots=True)
class _Slot:
    """What a runner remembers of the tenant of a slot."""

    opened: SlotOpen
    history: array[int]  # one cell a token: what the KV of each position must be
    tables: list[list[int]]  # per group


class CountingRunner:
    """`infire.plan.Runner` without a model; `step_s` is how long a step pretends to compute."""

    def __init__(self, layout: KVLayout, num_blocks: Seq[int], *, step_s: float = 0.0) -> None:
        self._layout = layout
        self._step_s = step_s
        self._slots: dict[int, _Slot] = {}
        self._kv = [
            array("q", [_EMPTY]) * (count * group.block_tokens)
            for count, group in zip(num_blocks, layout.groups, strict=True)
        ]
        self._last_step = 0
        self.prompt_tokens = 0  # computed here, as opposed to adopted

    def run(self, plan: StepPlan) -> list[RowResult]:
        assert plan.step == self._last_step + 1, "every plan with rows is run, in order"
        self._last_step = plan.step
        for slot in plan.closes:
            del self._slots[slot]
        for opened in plan.opens:
            assert opened.slot not in self._slots, "a slot is closed before it is opened again"
            self._slots[opened.slot] = _Slot(
                opened,
                array("q", [_cell(t, p) for p, t in enumerate(opened.token_ids)]),
                [[] for _ in self._layout.groups],
            )
        assert len({row.slot for row in plan.rows}) == len(plan.rows)
        # Twice over the rows, as all of them compute at once: none may write over another.
        for row in plan.rows:
            self._write(row)
        results = [self._sample(row) for row in plan.rows]
        time.sleep(self._step_s)
        return results

    def export(self, block_ids: Seq[Seq[int]], num_tokens: int, path: str) -> int:
        content = bytearray()
        for n, (group, table) in enumerate(zip(self._layout.groups, block_ids, strict=True)):
            cells = [
                self._kv[n][_index(group, table, position)]
                for position in range(group.first_visible(num_tokens), num_tokens)
            ]
            content += array("i", [cell & 0xFFFFFFFF for cell in cells]).tobytes()
            content += array("i", [cell >> 32 for cell in cells]).tobytes()
        assert len(content) == self._layout.exported_bytes(num_tokens)
        with Path(path).open("xb") as file:
            return file.write(content)

    def adopt(self, block_ids: Seq[Seq[int]], num_tokens: int, path: str) -> None:
        content = Path(path).read_bytes()
        expected = self._layout.exported_bytes(num_tokens)
        if len(content) != expected:
            raise ValueError(f"{len(content)} bytes for {num_tokens} tokens, not {expected}")
        values = array("i", content)
        begin = 0
        for n, (group, table) in enumerate(zip(self._layout.groups, block_ids, strict=True)):
            first = group.first_visible(num_tokens)
            count = num_tokens - first
            for i in range(count):
                cell = _cell(values[begin + i], values[begin + count + i])
                self._kv[n][_index(group, table, first + i)] = cell
            begin += 2 * count

    def _write(self, row: Row) -> None:
        slot = self._slots[row.slot]
        if row.new_blocks:
            for table, new in zip(slot.tables, row.new_blocks, strict=True):
                table += new
        assert isinstance(row.ids, tuple)
        assert len(row.ids) == row.num_new > 0
        end = row.start + row.num_new
        assert slot.history[row.start : end] == array(
            "q", [_cell(t, row.start + n) for n, t in enumerate(row.ids)]
        ), "the row's ids are not the sequence's"
        for kv, group, table in zip(self._kv, self._layout.groups, slot.tables, strict=True):
            for position in range(row.start, end):
                kv[_index(group, table, position)] = slot.history[position]
        self.prompt_tokens += max(0, min(end, slot.opened.num_prompt) - row.start)

    def _sample(self, row: Row) -> RowResult:
        slot = self._slots[row.slot]
        end = row.start + row.num_new
        self._check_history(slot, row.start, end)
        assert row.sample == (end == len(slot.history))
        if not row.sample:
            return RowResult()
        last = slot.history[end - 1] & 0xFFFFFFFF
        chosen = (last + 1) % VOCABULARY
        slot.history.append(_cell(chosen, end))
        num_top = slot.opened.sampling.logprobs
        if num_top is None:
            return RowResult((chosen,))
        top = tuple(((chosen + i) % VOCABULARY, -float(i)) for i in range(num_top))
        return RowResult((chosen,), (Logprob(chosen, 0.0, top),))

    def _check_history(self, slot: _Slot, start: int, end: int) -> None:
        """All that the row may look at is there, block by block, in every group."""
        for kv, group, table in zip(self._kv, self._layout.groups, slot.tables, strict=True):
            size = group.block_tokens
            position = group.first_visible(start)
            while position < end:
                upto = min(end, (position // size + 1) * size)
                index = _index(group, table, position)
                assert kv[index : index + upto - position] == slot.history[position:upto], (
                    f"slot {slot.opened.slot}: KV of {position} to {upto - 1} is not its own"
                )
                position = upto


def _cell(token_id: int, position: int) -> int:
    return position << 32 | token_id


def _index(group: KVGroup, table: Seq[int], position: int) -> int:
    return (
        table[position // group.block_tokens] * group.block_tokens + position % group.block_tokens
    )
