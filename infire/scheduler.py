"""Decide what the next step computes. No tensors, no clock, no I/O.

A sequence is behind by `len(token_ids) - num_computed` tokens, and steps let it catch up. There is
no prefill state and no decode state: a new prompt is many behind, a decoding sequence is one
behind, and a sequence whose KV came from another worker is one behind too.

Order is priority, then arrival, everywhere: who computes first, who waits, who gives way. A
sequence takes blocks only from those after it in that order, so the first always gets on.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from operator import attrgetter

from infire.admission import Limits, Refusal, admit
from infire.blocks import BlockPool, KVSpace, Tables
from infire.kv_layout import KVGroup
from infire.notes import Gauges
from infire.plan import Row, RowResult, SlotOpen, StepPlan
from infire.request import Reason, Sequence, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Adoption:
    """KV to be read into blocks before the next plan is made."""

    request_id: str
    block_ids: Tables  # `HOLE` before the window
    num_tokens: int


@dataclass(slots=True, eq=False)
class _Entry:
    """A sequence, and where it stands. Blocks, slot and `num_computed` are the sequence's own."""

    seq: Sequence
    order: tuple[int, int]  # (-priority, arrival)
    num_adopted: int  # tokens whose KV comes from a file; 0 once it has blocks
    num_covered: int = 0  # tokens that the block tables have room for
    num_planned: int = 0  # tokens in the plan being made
    num_sent: list[int] | None = None  # per group, blocks the runner knows; None: not its slot
    in_flight: bool = False
    dropped: bool = False  # while in flight: what it owns is given back at commit


_order = attrgetter("order")


class Scheduler:
    """Owns every sequence from `add` to its end, and every block and slot they use.

    One pool a KV group. A plan is made, run, and committed before the next is made; `drop` may
    come at any time, `add` too, `place` only between commit and plan.
    """

    def __init__(self, pools: Seq[BlockPool], groups: Seq[KVGroup], limits: Limits) -> None:
        self._space = KVSpace(pools, groups, limits.max_step_tokens)
        self._limits = limits
        self._longest = min(self._space.longest, limits.context_window or self._space.longest)
        # As many rows as a step has tokens: whoever runs can be given one token in every step.
        self._num_slots = min(limits.max_running, limits.max_step_tokens)
        self._free_slots = list(range(self._num_slots - 1, -1, -1))
        self._entries: dict[str, _Entry] = {}
        self._waiting: list[_Entry] = []  # in order
        self._running: list[_Entry] = []  # in order
        self._held: dict[str, _Entry] = {}  # finished, blocks kept for a hand-over
        self._flights: dict[int, list[_Entry]] = {}  # step: entries of its rows
        self._planned: list[_Entry] = []  # of the plan being made
        self._closes: list[int] = []  # slots to be closed by the next plan
        self._num_arrived = 0
        self._num_steps = 0
        self._num_preemptions = 0
        self._num_prompt_computed = 0
        self._num_output = 0

    @property
    def max_sequence_tokens(self) -> int:
        """The longest sequence, prompt and output, that this engine can ever hold."""
        return self._longest

    def add(self, seq: Sequence, num_adopted: int = 0) -> None:
        """Queue `seq`; raise `Refusal` when it can never run.

        With `num_adopted`, it waits for blocks, and `place` then asks for the KV of that many.
        """
        if seq.request_id in self._entries:
            raise Refusal("bad_input", f"request id {seq.request_id!r} is in use")
        admit(
            seq,
            num_adopted=num_adopted,
            longest=self._longest,
            vocab_size=self._limits.vocab_size,
        )
        self._num_arrived += 1
        seq.num_computed = 0
        seq.slot = None
        seq.block_ids = self._space.new_tables()
        entry = _Entry(seq, (-seq.priority, self._num_arrived), num_adopted)
        self._entries[seq.request_id] = entry
        insort(self._waiting, entry, key=_order)

    def drop(self, request_id: str) -> None:
        """Forget a request wherever it is; its blocks are free now, or when its step ends."""
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return
        if self._held.pop(request_id, None):
            self._free_blocks(entry)
        elif entry.seq.slot is None:
            _remove(self._waiting, entry)
        else:
            _remove(self._running, entry)
            if entry.in_flight:
                entry.dropped = True
            else:
                self._free_slot(entry)
                self._free_blocks(entry)

    def held(self, request_id: str) -> Sequence | None:
        """A finished sequence whose blocks are kept until `drop`."""
        entry = self._held.get(request_id)
        return entry.seq if entry else None

    def place(self) -> list[Adoption]:
        """Give blocks to sequences whose KV comes from a file, as far as there is room.

        Their KV must be read before the next `plan`; one that cannot be read must be dropped.
        """
        placed = []
        while (entry := self._next()) and entry.num_adopted:
            seq = entry.seq
            self._start(entry)
            seq.num_computed, entry.num_adopted = entry.num_adopted, 0
            seq.block_ids = self._space.new_tables(seq.num_computed)
            entry.num_covered = self._space.cover(seq.block_ids, seq.num_computed)
            placed.append(
                Adoption(
                    request_id=seq.request_id,
                    block_ids=seq.block_ids,
                    num_tokens=seq.num_computed,
                )
            )
        return placed

    def plan(self) -> StepPlan:
        """What to compute next, in flight until `commit`; false when nothing can be computed.

        Sequences one token behind come first, then those further behind, then new ones.
        """
        assert not self._flights, "one plan is in flight at a time"
        budget = self._limits.max_step_tokens
        behind = []
        for entry in self._running:  # preempting removes only entries after this one
            if len(entry.seq.token_ids) - entry.seq.num_computed > 1:
                behind.append(entry)
            else:
                budget -= self._give(entry, 1)
        for entry in behind:
            if budget and entry.seq.slot is not None:  # not preempted by one before it
                budget -= self._give(entry, budget)
        while budget and (new := self._next()) and not new.num_adopted:
            self._start(new)
            budget -= self._give(new, budget)
        return self._render()

    def commit(self, plan: StepPlan, results: Seq[RowResult]) -> list[Step]:
        """Record what a plan computed: what each request gained, in the plan's order.

        A stop id or `max_tokens` ends a request, whatever its row sampled after it.
        """
        steps = []
        entries = self._flights.pop(plan.step)
        for entry, row, result in zip(entries, plan.rows, results, strict=True):
            entry.in_flight = False
            end = row.start + row.num_new
            if row.start < entry.seq.num_prompt:
                self._num_prompt_computed += min(end, entry.seq.num_prompt) - row.start
            if entry.dropped:
                self._free_slot(entry)
                self._free_blocks(entry)
                continue
            assert row.sample == bool(result.ids)
            assert len(result.ids) <= 1 + len(row.draft_ids)
            if step := self._advance(entry, end, result):
                steps.append(step)
        return steps

    def gauges(self, step_s: float = 0.0) -> Gauges:
        return Gauges(
            step=self._num_steps,
            running=len(self._running),
            waiting=len(self._waiting),
            held=len(self._held),
            free_blocks=self._space.num_free,
            total_blocks=self._space.num_blocks,
            prompt_tokens_computed=self._num_prompt_computed,
            output_tokens=self._num_output,
            preemptions=self._num_preemptions,
            step_s=step_s,
        )

    def check(self) -> None:
        """Assert what holds between any two calls."""
        leaving = [e for flight in self._flights.values() for e in flight if e.dropped]
        owners = [*self._running, *self._held.values(), *leaving]
        self._space.check([(e.seq.block_ids, e.seq.num_computed) for e in owners])
        slots = [e.seq.slot for e in (*self._running, *leaving)]
        assert {*slots, *self._free_slots} == {*range(self._num_slots)}
        assert len(slots) + len(self._free_slots) == self._num_slots
        for queue in (self._waiting, self._running):
            assert [e.order for e in queue] == sorted({e.order for e in queue})
        for e in (*self._waiting, *self._held.values()):
            assert e.seq.slot is None
        assert not any(any(e.seq.block_ids) or e.seq.num_computed for e in self._waiting)
        known = [e.seq.request_id for e in (*self._waiting, *self._running)]
        assert sorted([*known, *self._held]) == sorted(self._entries)

    def _next(self) -> _Entry | None:
        """The first that waits, if it could run now.

        There must be room for all that it knows, and one more block for each that runs already:
        they grow, and would soon push the newcomer out again.
        """
        if not self._waiting or not self._free_slots:
            return None
        entry = self._waiting[0]
        num_known, spare = len(entry.seq.token_ids), len(self._running)
        return entry if self._space.fits(num_known, entry.num_adopted, spare=spare) else None

    def _start(self, entry: _Entry) -> None:
        _remove(self._waiting, entry)
        insort(self._running, entry, key=_order)
        entry.seq.slot = self._free_slots.pop()

    def _give(self, entry: _Entry, budget: int) -> int:
        """Plan up to `budget` tokens of `entry`: how many, 0 when there is no block for one."""
        seq = entry.seq
        count = min(len(seq.token_ids) - seq.num_computed, budget)
        if seq.num_computed + count > entry.num_covered:
            count = self._cover(entry, count)
        if count:
            entry.num_planned = count
            self._planned.append(entry)
        return count

    def _cover(self, entry: _Entry, count: int) -> int:
        """Take blocks for up to `count` more tokens; from others, when there is none for one."""
        seq = entry.seq
        room = self._space.room(seq.block_ids) - seq.num_computed
        while room < 1 and (victim := self._victim(entry)):
            self._preempt(victim)
            room = self._space.room(seq.block_ids) - seq.num_computed
        count = min(count, room)
        if count:
            entry.num_covered = self._space.cover(seq.block_ids, seq.num_computed + count)
        return count

    def _victim(self, needy: _Entry) -> _Entry | None:
        """Who gives way: of those after `needy` least priority, least preempted, youngest."""
        after = self._running[bisect_left(self._running, needy.order, key=_order) + 1 :]
        return min(
            after,
            key=lambda e: (e.seq.priority, e.seq.num_preempted, -e.order[1]),
            default=None,
        )

    def _preempt(self, victim: _Entry) -> None:
        """Back to the queue, to be computed again from its first token."""
        if victim.num_planned:  # it has a row in the plan being made
            victim.num_planned = 0
            self._planned.remove(victim)
        self._free_slot(victim)
        self._free_blocks(victim)
        victim.seq.num_computed = 0
        victim.seq.num_preempted += 1
        _remove(self._running, victim)
        insort(self._waiting, victim, key=_order)
        self._num_preemptions += 1

    def _free_blocks(self, entry: _Entry) -> None:
        self._space.give_back(entry.seq.block_ids, entry.seq.num_computed)
        entry.num_covered = 0

    def _free_slot(self, entry: _Entry) -> None:
        assert entry.seq.slot is not None
        if entry.num_sent is not None:
            self._closes.append(entry.seq.slot)
        self._free_slots.append(entry.seq.slot)
        entry.seq.slot = entry.num_sent = None

    def _render(self) -> StepPlan:
        planned, self._planned = self._planned, []
        if not planned:
            return StepPlan(step=self._num_steps)
        self._num_steps += 1
        self._flights[self._num_steps] = planned
        closes, self._closes = tuple(self._closes), []
        return StepPlan(
            step=self._num_steps,
            opens=tuple([_open(entry) for entry in planned if entry.num_sent is None]),
            rows=tuple([_row(entry) for entry in planned]),
            closes=closes,
        )

    def _advance(self, entry: _Entry, end: int, result: RowResult) -> Step | None:
        """Take over the ids that a row sampled after computing up to position `end`."""
        seq = entry.seq
        ids, finish = _cut(seq, result.ids)
        seq.token_ids += ids
        before = seq.num_computed
        # Of several ids, all but the last were computed in this step too, as accepted drafts.
        seq.num_computed = end + max(0, len(ids) - 1)
        self._space.forget(seq.block_ids, before, seq.num_computed)
        if not ids:
            return None
        self._num_output += len(ids)
        if finish:
            self._finish(entry)
        return Step(
            request_id=seq.request_id,
            ids=ids,
            logprobs=result.logprobs[: len(ids)],
            finish=finish,
            num_computed=seq.num_computed,
        )

    def _finish(self, entry: _Entry) -> None:
        _remove(self._running, entry)
        self._free_slot(entry)
        if entry.seq.hold:
            self._held[entry.seq.request_id] = entry
        else:
            del self._entries[entry.seq.request_id]
            self._free_blocks(entry)


def _open(entry: _Entry) -> SlotOpen:
    seq = entry.seq
    assert seq.slot is not None
    entry.num_sent = [0] * len(seq.block_ids)
    return SlotOpen(
        slot=seq.slot,
        token_ids=tuple(seq.token_ids),
        num_prompt=seq.num_prompt,
        sampling=seq.sampling,
        adapter=seq.adapter,
        grammar=seq.grammar,
    )


def _row(entry: _Entry) -> Row:
    seq = entry.seq
    assert seq.slot is not None
    start, end = seq.num_computed, seq.num_computed + entry.num_planned
    entry.num_planned = 0
    entry.in_flight = True
    return Row(
        slot=seq.slot,
        start=start,
        num_new=end - start,
        ids=tuple(seq.token_ids[start:end]),
        new_blocks=_unsent(entry),
        sample=end == len(seq.token_ids),
    )


def _unsent(entry: _Entry) -> tuple[tuple[int, ...], ...]:
    """Per group, the end of the block table that the runner does not know; () if it does."""
    tables, sent = entry.seq.block_ids, entry.num_sent
    assert sent is not None
    lengths = [len(table) for table in tables]
    if lengths == sent:
        return ()
    entry.num_sent = lengths
    return tuple([tuple(table[n:]) for table, n in zip(tables, sent, strict=True)])


def _cut(seq: Sequence, ids: tuple[int, ...]) -> tuple[tuple[int, ...], Reason | None]:
    """What of `ids` counts, up to and with a stop id, and why nothing follows."""
    room = seq.sampling.max_tokens - seq.num_output
    for n, token_id in enumerate(ids, start=1):
        if token_id in seq.sampling.stop_ids:
            return ids[:n], "stop"
        if n == room:
            return ids[:n], "length"
    return ids, None


def _remove(queue: list[_Entry], entry: _Entry) -> None:
    del queue[bisect_left(queue, entry.order, key=_order)]
