"""Which KV block belongs to whom, and what is known to lie in it. Bookkeeping only: knows no queue,
and no bytes.

A block table keeps its indices: block i of a group covers positions i*P .. i*P + P - 1. A group
with a window gives a block back once its last position has left the window, and `HOLE` stays in
its place; so which blocks of a table are owned follows from the number of computed tokens alone.

A full block whose tokens are all computed may be given a key (see `infire.prefix`). It can then be
shared by every sequence that begins with the same tokens, and it keeps its content when nobody has
it any more, until its place is needed: the block unused for longest goes first.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence as Seq

from infire.kv_layout import KVGroup

# A block id like any other, so that a gather through a table stays inside the cache; but nothing
# read through it may count.
HOLE = 0

Tables = list[list[int]]  # the block table of each KV group


class BlockPool:
    """The blocks of one KV group, handed out and taken back by number.

    Each has a tag, which grows whenever it is handed out anew: who finds another tag than he was
    given reads what is no longer his.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.tags = [0] * num_blocks
        self.evicted: list[tuple[int, bytes]] = []  # block and key, since `take_news`
        self.added: list[bytes] = []  # keys, as above
        self.unsaved: list[tuple[int, bytes]] = []  # evicted, still what it was till written to
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: what was used last is in cache
        self._idle: OrderedDict[int, None] = OrderedDict()  # keyed, nobody's; the oldest first
        self._num_owners = [0] * num_blocks
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that may be taken, those with a content that would be lost among them."""
        return len(self._free) + len(self._idle)

    @property
    def num_keyed(self) -> int:
        return len(self._block_of)

    def take(self, count: int) -> list[int] | None:
        """`count` block ids, or None, and nothing taken, when there are too few."""
        free, idle = self._free, self._idle
        if count > len(free) + len(idle):
            return None
        taken = []
        for _ in range(count):
            block = free.pop() if free else self._evict(idle.popitem(last=False)[0])
            self._num_owners[block] = 1
            self.tags[block] += 1
            taken.append(block)
        return taken

    def find(self, key: bytes) -> int | None:
        """The block in which lies what `key` names."""
        return self._block_of.get(key)

    def is_used(self, block: int) -> bool:
        return self._num_owners[block] > 0

    def is_shared(self, block: int) -> bool:
        return self._num_owners[block] > 1  # one owner less leaves it taken

    def share(self, block: int) -> None:
        """One more owner of a block that was found."""
        if not self._num_owners[block]:
            del self._idle[block]
        self._num_owners[block] += 1

    def name(self, block: int, key: bytes) -> None:
        """Say what lies in a block that is taken; one that repeats another's content has no key."""
        assert self._num_owners[block], f"block {block} is nobody's"
        if self._key_of[block] is None and key not in self._block_of:
            self._key_of[block] = key
            self._block_of[key] = block
            self.added.append(key)

    def give_back(self, block_ids: Seq[int]) -> None:
        """One owner less of each. Of those left idle the last of a table goes first, as all that
        is found after it is found through it."""
        for block in reversed(block_ids):
            assert self._num_owners[block], f"block {block} was given back twice"
            self._num_owners[block] -= 1
            if self._num_owners[block]:
                continue
            if self._key_of[block] is None:
                self._free.append(block)
            else:
                self._idle[block] = None

    def take_news(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Keys that came since the last call and are here, and those that went and are not."""
        touched = dict.fromkeys([*self.added, *(key for _, key in self.evicted)])
        self.added, self.evicted = [], []
        here = tuple([key for key in touched if key in self._block_of])
        return here, tuple([key for key in touched if key not in self._block_of])

    def take_unsaved(self) -> list[tuple[int, bytes]]:
        unsaved, self.unsaved = self.unsaved, []
        return unsaved

    def idle(self) -> list[tuple[int, bytes]]:
        """Blocks that nobody has, with their keys, the first to be evicted first."""
        found = ((block, self._key_of[block]) for block in self._idle)
        return [(block, key) for block, key in found if key is not None]

    def forget(self) -> None:
        """Forget what lies in blocks, whoever has them."""
        for block, key in enumerate(self._key_of):
            if key is not None:
                self._key_of[block] = None
                self.evicted.append((block, key))
        self._block_of.clear()
        self._free.extend(self._idle)
        self._idle.clear()

    def check(self, owners: Seq[int] | None = None) -> None:
        """Assert that each block is free, or idle, or has as many owners as it is said to have."""
        assert len({*self._free}) == len(self._free)
        assert not {*self._free} & {*self._idle}
        nobodys = {*self._free, *self._idle}
        assert nobodys == {b for b in range(self.num_blocks) if not self._num_owners[b]}
        assert all(self._key_of[block] is None for block in self._free)
        keyed = {key: block for block, key in enumerate(self._key_of) if key is not None}
        assert keyed == self._block_of
        assert {*self._idle} <= {*keyed.values()}
        if owners is not None:
            counts = [0] * self.num_blocks
            for block in owners:
                counts[block] += 1
            assert counts == self._num_owners

    def _evict(self, block: int) -> int:
        key = self._key_of[block]
        assert key is not None
        self._key_of[block] = None
        del self._block_of[key]
        self.evicted.append((block, key))
        self.unsaved.append((block, key))
        return block


class KVSpace:
    """The pools of all groups, and how the block tables of a sequence are cut from them.

    The tables are the sequence's own; `max_step_tokens` is how many tokens it gains at once.
    """

    def __init__(self, pools: Seq[BlockPool], groups: Seq[KVGroup], max_step_tokens: int) -> None:
        self._groups = tuple(zip(groups, pools, strict=True))
        self._max_step_tokens = max_step_tokens
        sizes = {group.block_tokens for group in groups}
        #: tokens of a block, which is what is shared; None where groups differ: nothing is
        self.block_tokens = sizes.pop() if len(sizes) == 1 else None
        self._windowed = [n for n, group in enumerate(groups) if group.window is not None]
        self.forgets = bool(self._windowed)  # else `forget` does nothing

    @property
    def num_free(self) -> int:
        return sum(pool.num_free for _, pool in self._groups)

    def take_unsaved(self) -> list[tuple[int, bytes]]:
        """As of the one group: blocks evicted since the last call, with their keys."""
        taken = [pool.take_unsaved() for _, pool in self._groups]
        return taken[0] if len(taken) == 1 else []

    def has(self, key: bytes) -> bool:
        return self._groups[0][1].find(key) is not None  # of the first group

    def idle(self) -> list[tuple[int, bytes]]:
        return self._groups[0][1].idle()  # of the first group

    def take_news(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Keys that came and went since the last call: of a group that forgets least."""
        first = next((n for n, (group, _) in enumerate(self._groups) if not group.window), 0)
        news = [pool.take_news() for _, pool in self._groups]
        return news[first]

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
        found: Tables | None = None,
        num_found: int = 0,
    ) -> bool:
        """Whether a new sequence may grow to `num_tokens` and leave `spare` blocks a group.

        With the blocks that are free, and those of `leaving`: tables, and tokens computed. It
        begins with `num_found` tokens in the blocks `found`, as `find` gave them.
        """
        for n, (group, pool) in enumerate(self._groups):
            owned = _blocks(num_tokens, group) - _first_owned(num_adopted, group)
            owned = min(owned, self._most_owned(group))
            given = {
                block
                for tables, num_computed in leaving
                for block in tables[n][_first_owned(num_computed, group) :]
                if not pool.is_shared(block)
            }
            if found is not None:  # what others have anyway, and keep
                kept = {*found[n][_first_owned(num_found, group) :]} - given
                owned -= sum(pool.is_used(block) for block in kept)
            if pool.num_free + len(given) < owned + spare:
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

    def find(self, keys: Seq[bytes]) -> tuple[Tables, int]:
        """Tables of the longest beginning of these full blocks that is here, and its tokens.

        Of a group with a window only the blocks are needed that the next token looks at.
        """
        size = self.block_tokens
        assert size is not None
        count = len(keys)
        for group, pool in self._groups:
            if group.window is None:
                count = next((n for n in range(count) if pool.find(keys[n]) is None), count)
        while count and not self._sees(keys, count, size):
            count -= 1
        return [
            [HOLE] * first + [_known(pool, key) for key in keys[first:count]]
            for group, pool in self._groups
            for first in [_first_owned(count * size, group)]
        ], count * size

    def _sees(self, keys: Seq[bytes], count: int, size: int) -> bool:
        """Whether the groups with windows have all that is visible after `count` blocks."""
        for n in self._windowed:
            group, pool = self._groups[n]
            first = _first_owned(count * size, group)
            if any(pool.find(key) is None for key in keys[first:count]):
                return False
        return True

    def share(self, tables: Tables, num_tokens: int) -> None:
        """One more owner of what `find` found."""
        for (group, pool), table in zip(self._groups, tables, strict=True):
            for block in table[_first_owned(num_tokens, group) :]:
                pool.share(block)

    def name(
        self, tables: Tables, keys: Seq[bytes], begin: int, *, before: int, num_adopted: int
    ) -> None:
        """Say what lies in the blocks from index `begin` on; `keys` from the first block on.

        `before`: tokens computed when something was last forgotten. `num_adopted`: those of a file,
        in which a window's first block may be in part."""
        for (group, pool), table in zip(self._groups, tables, strict=True):
            whole = _blocks(group.first_visible(num_adopted), group)
            for n in range(max(begin, whole, _first_owned(before, group)), len(keys)):
                pool.name(table[n], keys[n])

    def tags(self, tables: Tables, begins: Seq[int]) -> tuple[tuple[int, ...], ...]:
        """Of each group, the tags of the blocks from those indices on."""
        return tuple(
            [
                tuple([pool.tags[block] for block in table[begin:]])
                for (_, pool), table, begin in zip(self._groups, tables, begins, strict=True)
            ]
        )

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

    def owns(self, tables: Tables, num_computed: int, tags: Seq[Seq[int]]) -> bool:
        """Whether no block of `tables`, with the tags it had, was handed out anew since."""
        return all(
            pool.tags[block] == tag
            for (group, pool), table, known in zip(self._groups, tables, tags, strict=True)
            for first in [_first_owned(num_computed, group)]
            for block, tag in zip(table[first:], known[first:], strict=False)
        )

    def give_back_own(self, tables: Tables, num_computed: int, tags: Seq[Seq[int]]) -> None:
        """As `give_back`, but for the blocks that were handed out anew since they had `tags`."""
        for (group, pool), table, known in zip(self._groups, tables, tags, strict=True):
            first = _first_owned(num_computed, group)
            own = [
                block
                for n, block in enumerate(table[first:], start=first)
                if n >= len(known) or pool.tags[block] == known[n]
            ]
            pool.give_back(own)
            table.clear()

    def check(self, owners: Seq[tuple[Tables, int]]) -> None:
        """Assert that these tables, with computed tokens, are the owners of all that is taken."""
        for n, (group, pool) in enumerate(self._groups):
            owned: list[int] = []
            for tables, num_computed in owners:
                first = _first_owned(num_computed, group)
                assert len(tables[n]) * group.block_tokens >= num_computed
                assert tables[n][:first] == [HOLE] * len(tables[n][:first])
                owned += tables[n][first:]
                assert len({*tables[n][first:]}) == len(tables[n][first:])
            pool.check(owned)

    def _most_owned(self, group: KVGroup) -> int:
        """Blocks that a sequence of any length owns at once, at most."""
        if group.window is None:
            return sys.maxsize
        return _blocks(group.window - 1 + self._max_step_tokens, group) + 1


def _known(pool: BlockPool, key: bytes) -> int:
    block = pool.find(key)
    assert block is not None
    return block


def _blocks(num_tokens: int, group: KVGroup) -> int:
    return -(-num_tokens // group.block_tokens)


def _first_owned(num_computed: int, group: KVGroup) -> int:
    """Index of the first block whose positions the token at `num_computed` may still look at."""
    return group.first_visible(num_computed) // group.block_tokens
