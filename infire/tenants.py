"""Who waits, who runs, and who gives way: queues, slots and blocks. Knows no plan and no result.

Order is priority, then arrival, everywhere. A sequence takes blocks only from those after it in
that order, so the first always gets on.

Nobody waits for ever. Before all priorities come the favoured: who gave way `MAX_PREEMPTIONS`
times, and who saw `MAX_OVERTAKEN` others start while it waited. They never give way again, and so
many run together as can all grow to their ends.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence as Seq
from operator import attrgetter
from typing import Protocol

from infire.blocks import BlockPool, KVSpace, Tables
from infire.entry import Entry
from infire.kv_layout import KVGroup

# Each time costs a sequence all that it has computed. Fewer than 3, and an engine short of blocks
# soon runs favoured sequences only, with nobody left who may give way.
MAX_PREEMPTIONS = 3
# At most one start in so many goes past the priorities, to who has waited longest.
MAX_OVERTAKEN = 64

# Blocks that are read from the tiers behind the device for one step: others wait for these. Of the
# default model it is 24 MB, which takes 10 ms where computing as much takes a second.
MOST_FILLED = 64

_order = attrgetter("order")
_arrival = attrgetter("arrival")


class Tier(Protocol):
    """What has blocks that the device has no place for. `infire.tiers.Tiers` is one."""

    def get(self, key: bytes) -> bytes | None:
        """The content of the block of that key, if it is there."""


class Tenants:
    """Owns slots and blocks, and lends them to the sequences that run; held ones keep blocks."""

    def __init__(
        self,
        pools: Seq[BlockPool],
        groups: Seq[KVGroup],
        *,
        num_slots: int,
        max_step_tokens: int,
        tier: Tier | None = None,
    ) -> None:
        self._tier = tier
        self._fills: list[tuple[int, bytes, bytes]] = []  # block, key and content, to be loaded
        self.space = KVSpace(pools, groups, max_step_tokens)
        self.waiting: list[Entry] = []  # in order; written here only
        self.running: list[Entry] = []  # in order; written here only
        self.num_preemptions = 0
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._closes: list[int] = []  # slots to be closed by the next plan
        self._num_starts = 0

    def add(self, entry: Entry) -> None:
        """Let `entry` wait, as one that has just come."""
        seq = entry.seq
        seq.num_computed = seq.num_preempted = 0
        seq.slot = None
        seq.block_ids = self.space.new_tables()
        self._wait(entry)

    def next(self, *, adopted: bool, before: Entry | None = None) -> Entry | None:
        """The first that waits, if it can start now; of lower priority, others give way to it.

        None also when it has adopted KV or has none, whichever is not asked for, or when it comes
        after `before`.
        """
        if not self.waiting:
            return None
        entry = self.waiting[0]
        if bool(entry.num_adopted) is not adopted or (before and before.order < entry.order):
            return None
        if entry.favoured:
            favoured = [e.most_tokens for e in self.running if e.favoured]
            if not self.space.holds([*favoured, entry.most_tokens]):
                return None
        return entry if self._make_way(entry) else None

    def start(self, entry: Entry) -> None:
        """Give a slot to one that waits, with the blocks in which its beginning lies already.

        The others it must cover itself.
        """
        self._seat(entry)
        tables, num_found = self._find(entry)
        if num_found:
            assert self.space.block_tokens is not None
            self.space.share(tables, num_found)
            entry.seq.block_ids = tables
            entry.seq.num_computed = entry.num_covered = num_found
            entry.num_named = num_found // self.space.block_tokens
            entry.is_extended = True
        if self._tier is not None and entry.chain is not None:
            num_found += self._fill(entry, self._tier)
        if entry.cached_tokens is None:
            entry.cached_tokens = min(num_found, entry.seq.num_prompt)

    def _fill(self, entry: Entry, tier: Tier) -> int:
        """Blocks for what comes next of it in the tiers behind the device: how many tokens.

        For these there is room, as there is for all that it knows.
        """
        size, seq = self.space.block_tokens, entry.seq
        assert size is not None
        assert entry.chain is not None
        begin = seq.num_computed // size
        end = min((len(seq.token_ids) - 1) // size, begin + MOST_FILLED - len(self._fills))
        found: list[bytes] = []
        keys = entry.chain.keys(seq.token_ids, max(begin, end))
        while begin + len(found) < end:
            content = tier.get(keys[begin + len(found)])
            if content is None:
                break
            found.append(content)
        if not found:
            return 0
        self._take(entry, (begin + len(found)) * size)
        (table,) = seq.block_ids
        self._fills += zip(table[begin:], keys[begin:], found, strict=False)
        seq.num_computed += len(found) * size
        self.name(entry, begin * size)
        return len(found) * size

    def _seat(self, entry: Entry) -> None:
        """From those who wait to those who run."""
        _remove(self.waiting, entry)
        insort(self.running, entry, key=_order)
        entry.seq.slot = self._free_slots.pop()
        self._num_starts += 1
        if self.waiting and self._num_starts % MAX_OVERTAKEN == 0:
            eldest = min(self.waiting, key=_arrival)
            if self._num_starts - eldest.num_starts_before >= MAX_OVERTAKEN:
                _remove(self.waiting, eldest)
                eldest.favour()
                insort(self.waiting, eldest, key=_order)

    def start_adopted(self, entry: Entry) -> None:
        """Start one with blocks for the KV that comes from a file, as if it were computed."""
        seq = entry.seq
        self._seat(entry)
        seq.num_computed = entry.num_read = entry.num_adopted
        entry.num_adopted = 0
        seq.block_ids = self.space.new_tables(seq.num_computed)
        self._take(entry, seq.num_computed)

    def cover(self, entry: Entry, count: int) -> int:
        """Take blocks for up to `count` more tokens; from others, when there is none for one.

        How many tokens there are blocks for: 0 when nobody may give way.
        """
        seq = entry.seq
        room = self.space.room(seq.block_ids) - seq.num_computed
        while room < 1 and (victim := self._victim(entry)):
            self._preempt(victim)
            room = self.space.room(seq.block_ids) - seq.num_computed
        count = min(count, room)
        if count:
            self._take(entry, seq.num_computed + count)
        return count

    def cover_spare(self, entry: Entry, count: int) -> int:
        """Take blocks for up to `count` more tokens that no one misses: how many there are for.

        One free block is left for each that runs, who may want it in the next step.
        """
        seq = entry.seq
        room = self.space.room(seq.block_ids, spare=len(self.running))
        count = min(count, max(room, entry.num_covered) - seq.num_computed)
        if seq.num_computed + count > entry.num_covered:
            self._take(entry, seq.num_computed + count)
        return count

    def take_fills(self) -> list[tuple[int, bytes, bytes]]:
        """Blocks to be loaded before anything is computed, with their keys and contents."""
        fills, self._fills = self._fills, []
        return fills

    def take_closes(self) -> tuple[int, ...]:
        """The slots that the runner knows and that were freed since the last call."""
        closes, self._closes = tuple(self._closes), []
        return closes

    def stop(self, entry: Entry) -> None:
        """Take `entry` out of its queue. Slot and blocks it keeps, until they are freed."""
        _remove(self.waiting if entry.seq.slot is None else self.running, entry)

    def free_slot(self, entry: Entry) -> None:
        assert entry.seq.slot is not None
        if entry.num_sent is not None:
            self._closes.append(entry.seq.slot)
        self._free_slots.append(entry.seq.slot)
        entry.seq.slot = entry.num_sent = None

    def free_blocks(self, entry: Entry) -> None:
        self.space.give_back(entry.seq.block_ids, entry.seq.num_computed)
        entry.num_covered = entry.num_named = entry.num_read = 0

    def owns(self, entry: Entry) -> bool:
        """Whether the blocks that the runner was told of are still those of `entry`."""
        return self.space.owns(entry.seq.block_ids, entry.seq.num_computed, entry.tags)

    def free_own_blocks(self, entry: Entry) -> None:
        """As `free_blocks`, of one that may have lost blocks to others."""
        self.space.give_back_own(entry.seq.block_ids, entry.seq.num_computed, entry.tags)
        entry.num_covered = entry.num_named = entry.num_read = 0

    def name(self, entry: Entry, before: int) -> None:
        """Name the blocks that are full now, for others to find; `before`: tokens it had."""
        size, seq = self.space.block_tokens, entry.seq
        if entry.chain is None or size is None or seq.num_computed // size <= entry.num_named:
            return
        keys = entry.chain.keys(seq.token_ids, seq.num_computed // size)
        self.space.name(
            seq.block_ids, keys, entry.num_named, before=before, num_adopted=entry.num_read
        )
        entry.num_named = len(keys)

    def check(self, held: Seq[Entry], leaving: Seq[Entry]) -> None:
        """Assert what holds between any two calls.

        `held` have blocks and no slot; `leaving` are in no queue and still have both.
        """
        owners = [*self.running, *held, *leaving]
        self.space.check([(e.seq.block_ids, e.seq.num_computed) for e in owners])
        slots = [e.seq.slot for e in (*self.running, *leaving)]
        assert {*slots, *self._free_slots} == {*range(self._num_slots)}
        assert len(slots) + len(self._free_slots) == self._num_slots
        for queue in (self.waiting, self.running):
            assert [e.order for e in queue] == sorted({e.order for e in queue})
        assert all(e.seq.slot is None for e in (*self.waiting, *held))
        assert not any(any(e.seq.block_ids) or e.seq.num_computed for e in self.waiting)
        assert all(e.seq.num_preempted <= MAX_PREEMPTIONS for e in (*self.waiting, *owners))
        assert self.space.holds([e.most_tokens for e in self.running if e.favoured])

    def _wait(self, entry: Entry) -> None:
        entry.num_starts_before = self._num_starts
        insort(self.waiting, entry, key=_order)

    def _make_way(self, entry: Entry) -> bool:
        """Whether `entry` can start: if need be, once as few as possible have given way to it.

        There must be room for all that it knows, and one more block for each that runs already:
        they grow, and would soon push the newcomer out again.
        """
        leaving: list[Entry] = []
        lower = iter(self._lower(entry))
        found = self.space.new_tables(), 0
        if not entry.num_adopted and self._free_slots:
            found = self._find(entry)
        while not self._fits(entry, leaving, *found):
            victim = next(lower, None)
            if victim is None:
                return False
            leaving.append(victim)
        for victim in leaving:
            self._preempt(victim)
        return True

    def _find(self, entry: Entry) -> tuple[Tables, int]:
        """Blocks in which its beginning lies, but for its last token, and how many tokens."""
        size, ids = self.space.block_tokens, entry.seq.token_ids
        if entry.chain is None or size is None:
            return self.space.new_tables(), 0
        return self.space.find(entry.chain.keys(ids, (len(ids) - 1) // size))

    def _fits(self, entry: Entry, leaving: Seq[Entry], found: Tables, num_found: int) -> bool:
        """Whether there are a slot and blocks for `entry`, with `leaving` gone."""
        return bool(self._free_slots or leaving) and self.space.fits(
            len(entry.seq.token_ids),
            entry.num_adopted,
            spare=len(self.running) - len(leaving),
            leaving=[(e.seq.block_ids, e.seq.num_computed) for e in leaving],
            found=found,
            num_found=num_found,
        )

    def _lower(self, entry: Entry) -> list[Entry]:
        """Who may have to give way to let `entry` start, the first to go first."""
        priority = entry.seq.priority
        if not self.running or self.running[-1].seq.priority >= priority:
            return []  # nearly always: the last in order has the lowest priority
        lower = [e for e in self.running if e.seq.priority < priority and not e.favoured]
        return sorted(lower, key=_reluctance)

    def _victim(self, needy: Entry) -> Entry | None:
        """Who gives way to one that runs: of those after it, unless favoured."""
        after = self.running[bisect_left(self.running, needy.order, key=_order) + 1 :]
        return min((e for e in after if not e.favoured), key=_reluctance, default=None)

    def _preempt(self, victim: Entry) -> None:
        """Back to the queue, to be computed again from its first token."""
        self.stop(victim)
        self.free_slot(victim)
        self.free_blocks(victim)
        victim.num_planned = 0
        victim.seq.num_computed = 0
        victim.seq.num_preempted += 1
        if victim.seq.num_preempted == MAX_PREEMPTIONS:
            victim.favour()
        self._wait(victim)
        self.num_preemptions += 1

    def _take(self, entry: Entry, num_tokens: int) -> None:
        """Take the blocks for so many tokens, for which there must be room."""
        entry.num_covered = self.space.cover(entry.seq.block_ids, num_tokens)
        entry.is_extended = True


def _reluctance(entry: Entry) -> tuple[int, int, int]:
    """Who gives way first: least priority, of these the least preempted, of these the youngest."""
    return entry.seq.priority, entry.seq.num_preempted, -entry.arrival


def _remove(queue: list[Entry], entry: Entry) -> None:
    del queue[bisect_left(queue, entry.order, key=_order)]
