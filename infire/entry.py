"""A sequence as the scheduler sees it, and what it says of it in a plan. Owns no block and no slot.

Blocks, slot and `num_computed` are the sequence's own; here is where it stands among the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from infire.blocks import KVSpace
from infire.plan import Row, SlotOpen
from infire.prefix import Chain
from infire.request import Reason, Sequence
from infire.speculate import Drafter

_FAVOURED, _ORDINARY = 0, 1


@dataclass(slots=True, eq=False)
class Entry:
    """What the scheduler notes of one sequence from `add` to its end."""

    seq: Sequence
    arrival: int
    num_adopted: int  # tokens whose KV comes from a file; 0 once it has blocks
    most_tokens: int  # prompt and output, when it has said all that it may
    stop_ids: tuple[int, ...]
    drafter: Drafter | None  # None: speculation is not for this one
    order: tuple[int, int, int]  # favoured first, then by priority, then by arrival
    num_starts_before: int = 0  # starts of all sequences when it began to wait
    num_covered: int = 0  # tokens that the block tables have room for
    num_planned: int = 0  # tokens in the plan being made
    draft_ids: tuple[int, ...] = ()  # in the plan being made
    num_sent: list[int] | None = None  # per group, blocks the runner knows; None: not its slot
    is_extended: bool = False  # has blocks that the runner does not know
    chain: Chain | None = None  # names its blocks; None: they are not shared
    num_read: int = 0  # tokens whose KV in its blocks comes from a file
    num_named: int = 0  # blocks from the first on that need no name any more
    cached_tokens: int | None = None  # of the prompt, found when it first started
    tags: list[list[int]] = field(default_factory=list)  # per group, of blocks the runner knows
    dropped: bool = False  # while in flight: what it owns is given back at commit

    @property
    def favoured(self) -> bool:
        """Before all others, and not to be preempted again."""
        return self.order[0] == _FAVOURED

    def favour(self) -> None:
        """Put it first; it must not be in a queue meanwhile."""
        self.order = (_FAVOURED, *self.order[1:])


def make_entry(
    seq: Sequence, *, arrival: int, num_adopted: int, max_draft_ids: int, chain: Chain | None = None
) -> Entry:
    """`seq` as it comes. Where each id costs more than its own, nothing is proposed.

    That is where log probabilities are wanted, or a grammar decides what may follow.
    """
    sampling = seq.sampling
    drafts = max_draft_ids and sampling.speculate
    drafts = drafts and sampling.logprobs is None and seq.grammar is None
    return Entry(
        seq=seq,
        arrival=arrival,
        num_adopted=num_adopted,
        most_tokens=seq.num_prompt + sampling.max_tokens,
        stop_ids=sampling.stop_ids,
        drafter=Drafter(max_draft_ids) if drafts else None,
        order=(_ORDINARY, -seq.priority, arrival),
        chain=chain,
    )


def open_slot(entry: Entry) -> SlotOpen:
    seq = entry.seq
    assert seq.slot is not None
    entry.num_sent = [0] * len(seq.block_ids)
    entry.tags = [[] for _ in seq.block_ids]
    entry.is_extended = True
    return SlotOpen(
        slot=seq.slot,
        token_ids=tuple(seq.token_ids),
        num_prompt=seq.num_prompt,
        sampling=seq.sampling,
        adapter=seq.adapter,
        grammar=seq.grammar,
    )


def make_row(entry: Entry, space: KVSpace) -> Row:
    """The planned tokens of `entry` as a row."""
    seq, count = entry.seq, entry.num_planned
    token_ids, start, slot = seq.token_ids, seq.num_computed, seq.slot
    assert slot is not None
    entry.num_planned = 0
    draft_ids, entry.draft_ids = entry.draft_ids, ()
    if count == 1 and not entry.is_extended and start + 1 == len(token_ids):  # nearly always
        return Row(slot=slot, start=start, num_new=1, ids=(token_ids[-1],), draft_ids=draft_ids)
    new_blocks, new_tags = _unsent(entry, space) if entry.is_extended else ((), ())
    return Row(
        slot=slot,
        start=start,
        num_new=count,
        ids=tuple(token_ids[start : start + count]),
        new_blocks=new_blocks,
        new_tags=new_tags,
        draft_ids=draft_ids,
        sample=start + count == len(token_ids),
    )


def cut(entry: Entry, ids: tuple[int, ...]) -> tuple[tuple[int, ...], Reason | None]:
    """What of `ids` counts, up to and with a stop id, and why nothing follows."""
    stop_ids = entry.stop_ids
    room = entry.most_tokens - len(entry.seq.token_ids)
    if len(ids) == 1 and room > 1 and ids[0] not in stop_ids:  # nearly always
        return ids, None
    for n, token_id in enumerate(ids, start=1):
        if token_id in stop_ids:
            return ids[:n], "stop"
        if n == room:
            return ids[:n], "length"
    return ids, None


_PerGroup = tuple[tuple[int, ...], ...]


def _unsent(entry: Entry, space: KVSpace) -> tuple[_PerGroup, _PerGroup]:
    """Per group, the end of the block table that the runner does not know, and its tags."""
    tables, sent = entry.seq.block_ids, entry.num_sent
    assert sent is not None
    entry.num_sent = [len(table) for table in tables]
    entry.is_extended = False
    tags = space.tags(tables, sent)
    for known, new in zip(entry.tags, tags, strict=True):
        known += new
    return tuple([tuple(table[n:]) for table, n in zip(tables, sent, strict=True)]), tags
