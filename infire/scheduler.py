"""Decide what the next step computes. No tensors, no clock, no I/O.

A sequence is behind by `len(token_ids) - num_computed` tokens, and steps let it catch up. There is
no prefill state and no decode state: a new prompt is many behind, a decoding sequence is one
behind, and a sequence whose KV came from another worker is one behind too.

Order is priority, then arrival, everywhere: who computes first, who waits, who gives way. A
sequence takes blocks only from those after it in that order, so the first always gets on.

Block tables keep their indices: block i of a group covers positions i*P .. i*P + P - 1. A group
with a window gives a block back once its last position has left the window, and `HOLE` stays in
its place; which blocks are owned therefore follows from `num_computed` alone.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, insort
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from operator import attrgetter

from infire.blocks import HOLE, BlockPool
from infire.kv_layout import KVGroup
from infire.notes import Gauges
from infire.plan import Row, RowResult, SlotOpen, StepPlan
from infire.request import Reason, Sequence, Step


class Refusal(Exception):
    """A sequence that cannot be run. `code` is a label of `routing.errors.Code`."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one engine takes on. None: whatever the KV pool holds, whatever ids come."""

    max_step_tokens: int = 512  # tokens one forward pass computes, all rows together
    max_running: int = 64  # rows of a pass, at most
    context_window: int | None = None  # tokens of one sequence, prompt and output
    vocab_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Adoption:
    """KV to be read into blocks before the next plan is made."""

    request_id: str
    block_ids: list[list[int]]  # per KV group, `HOLE` before the window
    num_tokens: int


@dataclass(slots=True, eq=False)
class _Entry:
    """A sequence, and where it stands. Blocks, slot and `num_computed` are the sequence's own."""

    seq: Sequence
    order: tuple[int, int]  # (-priority, arrival)
    num_adopted: int  # tokens whose KV comes from a file; 0 once it has blocks
    num_sent: list[int]  # per group: how much of the block table the runner has been told
    num_covered: int = 0  # tokens that the block tables have room for
    num_planned: int = 0  # tokens in the plan being made or in flight
    opened: bool = False  # the runner knows its slot
    in_flight: bool = False
    dropped: bool = False  # while in flight: what it owns is given back at commit


_order = attrgetter("order")


class Scheduler:
    """Owns every sequence from `add` to its end, and every block and slot they use.

    One pool a KV group. Calls go plan, run, commit, plan ...; `add`, `drop` and `place` between.
    """

    def __init__(self, pools: Seq[BlockPool], groups: Seq[KVGroup], limits: Limits) -> None:
        assert len(pools) == len(groups) > 0
        self._pools = tuple(pools)
        self._groups = tuple(groups)
        self._windowed = [n for n, group in enumerate(groups) if group.window is not None]
        self._limits = limits
        # As many rows as a step has tokens: whoever runs can be given one token in every step.
        num_slots = min(limits.max_running, limits.max_step_tokens)
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._num_slots = num_slots
        self._entries: dict[str, _Entry] = {}
        self._waiting: list[_Entry] = []  # in order
        self._running: list[_Entry] = []  # in order
        self._held: dict[str, _Entry] = {}  # finished, blocks kept for a hand-over
        self._flights: dict[int, list[_Entry]] = {}  # step: entries of its rows
        self._planned: list[_Entry] = []  # of the plan being made
        self._closes: list[int] = []  # slots to be closed by the next plan
        self._short = False  # blocks ran out in the plan being made
        self._num_arrived = 0
        self._num_steps = 0
        self._num_preemptions = 0
        self._num_prompt_computed = 0
        self._num_output = 0

    @property
    def max_sequence_tokens(self) -> int:
        """The longest sequence, prompt and output, that this engine can ever hold."""
        longest = self._limits.context_window or sys.maxsize
        for group, pool in zip(self._groups, self._pools, strict=True):
            if self._span(group) > pool.num_blocks:
                longest = min(longest, pool.num_blocks * group.block_tokens)
        return longest

    def add(self, seq: Sequence, num_adopted: int = 0) -> None:
        """Queue `seq`; raise `Refusal` when it can never run.

        With `num_adopted`, it waits for blocks, and `place` then asks for the KV of that many.
        """
        self._refuse_wrong(seq, num_adopted)
        self._num_arrived += 1
        seq.num_computed = 0
        seq.slot = None
        seq.block_ids = [[] for _ in self._groups]
        order = (-seq.priority, self._num_arrived)
        entry = _Entry(seq, order, num_adopted, num_sent=[0] * len(self._groups))
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
            for group, pool, table in zip(self._groups, self._pools, seq.block_ids, strict=True):
                first = group.first_visible(entry.num_adopted) // group.block_tokens
                taken = pool.take(_blocks(entry.num_adopted, group) - first)
                assert taken is not None
                table += [HOLE] * first + taken
            seq.num_computed, entry.num_adopted = entry.num_adopted, 0
            entry.num_covered = self._covered(seq)
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
        self._planned = []
        self._short = False
        budget = self._limits.max_step_tokens
        behind = []
        for entry in self._running:  # preempting removes only entries after this one
            if len(entry.seq.token_ids) - entry.seq.num_computed > 1:
                behind.append(entry)
            elif budget:
                budget -= self._give(entry, 1)
        for entry in behind:
            if budget and entry.seq.slot is not None:  # not preempted by one before it
                budget -= self._give(entry, budget)
        # Who runs and is short of blocks comes before anyone new.
        while budget and not self._short and (new := self._next()) and not new.num_adopted:
            self._start(new)
            budget -= self._give(new, budget)
        return self._render()

    def commit(self, plan: StepPlan, results: Seq[RowResult]) -> list[Step]:
        """Record what a plan computed: what each request gained, in the plan's order.

        Finished sequences leave, or are held.
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
            step = self._advance(entry, end, result)
            if step:
                steps.append(step)
        return steps

    def gauges(self, step_s: float = 0.0) -> Gauges:
        return Gauges(
            step=self._num_steps,
            running=len(self._running),
            waiting=len(self._waiting),
            held=len(self._held),
            free_blocks=sum(pool.num_free for pool in self._pools),
            total_blocks=sum(pool.num_blocks for pool in self._pools),
            prompt_tokens_computed=self._num_prompt_computed,
            output_tokens=self._num_output,
            preemptions=self._num_preemptions,
            step_s=step_s,
        )

    # --- admission ------------------------------------------------------------------------------

    def _refuse_wrong(self, seq: Sequence, num_adopted: int) -> None:
        known, params = len(seq.token_ids), seq.sampling
        total = seq.num_prompt + params.max_tokens
        if seq.request_id in self._entries:
            raise Refusal("bad_input", f"request id {seq.request_id!r} is already in use")
        if not 0 < seq.num_prompt <= known:
            raise Refusal("bad_input", f"prompt of {seq.num_prompt} tokens among {known} ids")
        if seq.num_output >= params.max_tokens:
            raise Refusal(
                "bad_input",
                f"max_tokens of {params.max_tokens} leaves nothing after {seq.num_output}",
            )
        if total > self.max_sequence_tokens:
            raise Refusal(
                "bad_input",
                f"prompt of {seq.num_prompt} tokens and max_tokens of {params.max_tokens} "
                f"exceed the {self.max_sequence_tokens} tokens that one request may have",
            )
        if not 0 <= num_adopted < known:
            raise Refusal("bad_input", f"KV of {num_adopted} tokens for {known} ids")
        self._refuse_unknown_ids(seq)

    def _refuse_unknown_ids(self, seq: Sequence) -> None:
        """An id outside the vocabulary would end the whole step, on a GPU the whole process."""
        size = self._limits.vocab_size or sys.maxsize
        biased = [token_id for token_id, _ in seq.sampling.logit_bias]
        for ids in (seq.token_ids, biased):
            if ids and not 0 <= min(ids) <= max(ids) < size:
                raise Refusal(
                    "bad_input", f"ids {min(ids)} to {max(ids)} in a vocabulary of {size}"
                )

    def _next(self) -> _Entry | None:
        """The first that waits, if it could run now.

        There must be room for all that it knows, and one more block for each that runs already:
        they grow, and would soon push the newcomer out again.
        """
        if not self._waiting or not self._free_slots:
            return None
        entry = self._waiting[0]
        num_known = len(entry.seq.token_ids)
        for group, pool in zip(self._groups, self._pools, strict=True):
            first = group.first_visible(entry.num_adopted) // group.block_tokens
            need = min(_blocks(num_known, group) - first, self._span(group))
            if pool.num_free < need + len(self._running):
                return None
        return entry

    def _span(self, group: KVGroup) -> int:
        """Blocks that a sequence of any length owns at once, at most, in `group`."""
        if group.window is None:
            return sys.maxsize
        return _blocks(group.window - 1 + self._limits.max_step_tokens, group) + 1

    def _start(self, entry: _Entry) -> None:
        _remove(self._waiting, entry)
        insort(self._running, entry, key=_order)
        entry.seq.slot = self._free_slots.pop()

    # --- blocks ---------------------------------------------------------------------------------

    def _give(self, entry: _Entry, budget: int) -> int:
        """Plan up to `budget` tokens of `entry`; how many, 0 when there are no blocks for one."""
        seq = entry.seq
        count = min(len(seq.token_ids) - seq.num_computed, budget)
        if seq.num_computed + count > entry.num_covered:
            count = self._cover(entry, count)
        if count:
            entry.num_planned = count
            self._planned.append(entry)
        return count

    def _cover(self, entry: _Entry, count: int) -> int:
        """Take blocks for up to `count` more tokens, from others when there is none for one."""
        room = self._room(entry)
        while room < 1 and (victim := self._victim(entry)):
            self._preempt(victim)
            room = self._room(entry)
        self._short = self._short or room < count
        count = min(count, max(room, 0))
        end = entry.seq.num_computed + count
        if end > entry.num_covered:
            for group, pool, table in zip(
                self._groups, self._pools, entry.seq.block_ids, strict=True
            ):
                taken = pool.take(max(0, _blocks(end, group) - len(table)))
                assert taken is not None
                table += taken
            entry.num_covered = self._covered(entry.seq)
        return count

    def _room(self, entry: _Entry) -> int:
        """Tokens `entry` could compute with its own blocks and all free ones."""
        tables = zip(self._groups, self._pools, entry.seq.block_ids, strict=True)
        slots = min((len(table) + pool.num_free) * g.block_tokens for g, pool, table in tables)
        return slots - entry.seq.num_computed

    def _covered(self, seq: Sequence) -> int:
        tables = zip(self._groups, seq.block_ids, strict=True)
        return min(len(table) * group.block_tokens for group, table in tables)

    def _victim(self, needy: _Entry) -> _Entry | None:
        """Who gives way: after `needy`, least priority, fewest times preempted, youngest."""
        after = self._running[bisect_left(self._running, needy.order, key=_order) + 1 :]
        return min(
            after,
            key=lambda e: (e.seq.priority, e.seq.num_preempted, -e.order[1]),
            default=None,
        )

    def _preempt(self, victim: _Entry) -> None:
        """Back to the queue, to be computed again from its first token."""
        assert not victim.in_flight
        self._free_slot(victim)
        self._free_blocks(victim)
        victim.num_planned = 0  # its row, if it had one, leaves the plan
        victim.seq.num_computed = 0
        victim.seq.num_preempted += 1
        _remove(self._running, victim)
        insort(self._waiting, victim, key=_order)
        self._short = True
        self._num_preemptions += 1

    def _first_owned(self, group: KVGroup, num_computed: int) -> int:
        return group.first_visible(num_computed) // group.block_tokens

    def _free_blocks(self, entry: _Entry) -> None:
        seq = entry.seq
        for group, pool, table in zip(self._groups, self._pools, seq.block_ids, strict=True):
            pool.give_back(table[self._first_owned(group, seq.num_computed) :])
        seq.block_ids = [[] for _ in self._groups]
        entry.num_covered = 0

    def _free_slot(self, entry: _Entry) -> None:
        assert entry.seq.slot is not None
        if entry.opened:
            self._closes.append(entry.seq.slot)
        self._free_slots.append(entry.seq.slot)
        entry.seq.slot = None
        entry.opened = False
        entry.num_sent = [0] * len(self._groups)

    # --- plans out, results in ------------------------------------------------------------------

    def _render(self) -> StepPlan:
        planned = [entry for entry in self._planned if entry.num_planned]
        if not planned:
            return StepPlan(step=self._num_steps)
        self._num_steps += 1
        self._flights[self._num_steps] = planned
        opens = tuple([self._open(entry) for entry in planned if not entry.opened])
        rows = tuple([self._row(entry) for entry in planned])
        closes, self._closes = tuple(self._closes), []
        return StepPlan(step=self._num_steps, opens=opens, rows=rows, closes=closes)

    def _open(self, entry: _Entry) -> SlotOpen:
        seq = entry.seq
        assert seq.slot is not None
        entry.opened = True
        return SlotOpen(
            slot=seq.slot,
            token_ids=tuple(seq.token_ids),
            num_prompt=seq.num_prompt,
            sampling=seq.sampling,
            adapter=seq.adapter,
            grammar=seq.grammar,
        )

    def _row(self, entry: _Entry) -> Row:
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
            new_blocks=self._unsent(entry),
            sample=end == len(seq.token_ids),
        )

    def _unsent(self, entry: _Entry) -> tuple[tuple[int, ...], ...]:
        """Per group, the end of the block table that the runner does not know; () if it does."""
        tables = entry.seq.block_ids
        lengths = [len(table) for table in tables]
        if lengths == entry.num_sent:
            return ()
        sent, entry.num_sent = entry.num_sent, lengths
        return tuple([tuple(table[n:]) for table, n in zip(tables, sent, strict=True)])

    def _advance(self, entry: _Entry, end: int, result: RowResult) -> Step | None:
        seq = entry.seq
        ids, finish = _cut(seq, result.ids)
        seq.token_ids += ids
        before = seq.num_computed
        # All but the last of several ids were computed in this step too, as accepted drafts.
        seq.num_computed = end + max(0, len(ids) - 1)
        for n in self._windowed:
            self._forget(n, seq.block_ids[n], before, seq.num_computed)
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

    def _forget(self, n: int, table: list[int], before: int, after: int) -> None:
        """Give back the blocks of group `n` that left the window with these tokens."""
        first = self._first_owned(self._groups[n], before)
        last = min(self._first_owned(self._groups[n], after), len(table))
        if first < last:
            self._pools[n].give_back(table[first:last])
            table[first:last] = [HOLE] * (last - first)

    def _finish(self, entry: _Entry) -> None:
        _remove(self._running, entry)
        self._free_slot(entry)
        if entry.seq.hold:
            self._held[entry.seq.request_id] = entry
        else:
            del self._entries[entry.seq.request_id]
            self._free_blocks(entry)

    # --- for tests ------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert what must hold between any two calls."""
        leaving = [e for flight in self._flights.values() for e in flight if e.dropped]
        owners = [*self._running, *self._held.values(), *leaving]
        for n, (group, pool) in enumerate(zip(self._groups, self._pools, strict=True)):
            pool.check()
            owned = []
            for e in owners:
                table = e.seq.block_ids[n]
                assert len(table) * group.block_tokens >= e.seq.num_computed
                owned += table[self._first_owned(group, e.seq.num_computed) :]
            assert len(set(owned)) == len(owned) == pool.num_blocks - pool.num_free
        slots = [e.seq.slot for e in (*self._running, *leaving)] + self._free_slots
        assert sorted(slots, key=str) == sorted(range(self._num_slots), key=str)
        for queue in (self._waiting, self._running):
            assert [e.order for e in queue] == sorted(e.order for e in queue)
        for e in self._waiting:
            assert e.seq.slot is None
            assert not any(e.seq.block_ids)
            assert e.seq.num_computed == 0
        known = [*self._waiting, *self._running, *self._held.values()]
        assert {e.seq.request_id for e in known} == set(self._entries)
        assert len(known) == len(self._entries)


def _cut(seq: Sequence, ids: tuple[int, ...]) -> tuple[tuple[int, ...], Reason | None]:
    """What of `ids` counts, up to and with a stop id, and why nothing follows."""
    room = seq.sampling.max_tokens - seq.num_output
    for n, token_id in enumerate(ids, start=1):
        if token_id in seq.sampling.stop_ids:
            return ids[:n], "stop"
        if n == room:
            return ids[:n], "length"
    return ids, None


def _blocks(num_tokens: int, group: KVGroup) -> int:
    return -(-num_tokens // group.block_tokens)


def _remove(queue: list[_Entry], entry: _Entry) -> None:
    del queue[bisect_left(queue, entry.order, key=_order)]
