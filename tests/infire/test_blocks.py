from __future__ import annotations

import random
import sys

import pytest

from infire.blocks import HOLE, BlockPool, KVSpace, Tables
from tests.fakes.runner import counting_layout


def space(
    num_blocks: int, *, window: int | None = None, chunked: bool = False, step: int = 6
) -> KVSpace:
    layout = counting_layout(block_tokens=4, windows=[window], chunked=chunked)
    return KVSpace([BlockPool(num_blocks)], layout.groups, step)


def test_all_blocks_can_be_taken_and_each_is_another() -> None:
    pool = BlockPool(7)
    taken = pool.take(3), pool.take(4)
    assert sorted([*taken[0], *taken[1]]) == list(range(7))
    assert pool.num_free == 0


def test_too_many_takes_nothing() -> None:
    pool = BlockPool(7)
    assert pool.take(8) is None
    assert pool.num_free == 7
    assert pool.take(0) == []


def test_giving_back_twice_is_a_bug() -> None:
    pool = BlockPool(7)
    taken = pool.take(2)
    pool.give_back(taken)
    with pytest.raises(AssertionError, match="twice"):
        pool.give_back(taken[:1])


def test_tables_cover_whole_blocks() -> None:
    kv = space(10)
    tables = kv.new_tables()
    assert kv.cover(tables, 5) == 8
    assert [len(table) for table in tables] == [2]
    assert kv.room(tables) == 40
    kv.give_back(tables, num_computed=5)
    assert kv.num_free == 10


def test_a_sliding_group_keeps_what_the_next_token_sees() -> None:
    kv = space(10, window=4)
    tables = kv.new_tables()
    kv.cover(tables, 12)
    kv.forget(tables, 0, 10)  # position 10 sees 7, 8, 9 and itself: block 1 is still needed
    assert tables[0][0] == HOLE
    assert kv.num_free == 8
    kv.forget(tables, 10, 11)  # position 11 sees 8 and on
    assert tables[0][:2] == [HOLE, HOLE]
    assert kv.num_free == 9
    kv.check([(tables, 11)])
    kv.give_back(tables, num_computed=11)
    assert kv.num_free == 10


def test_a_chunked_group_forgets_a_chunk_at_once() -> None:
    kv = space(10, window=8, chunked=True)
    tables = kv.new_tables()
    kv.cover(tables, 8)
    kv.forget(tables, 0, 7)
    assert kv.num_free == 8
    kv.forget(tables, 7, 8)
    assert kv.num_free == 10
    kv.check([(tables, 8)])


def test_adopted_tables_begin_in_the_window() -> None:
    kv = space(10, window=4)
    tables = kv.new_tables(num_adopted=14)  # position 14 sees 11, 12, 13 and itself
    kv.cover(tables, 14)
    assert tables[0][:2] == [HOLE, HOLE]
    assert len(tables[0]) == 4
    assert kv.num_free == 8
    kv.check([(tables, 14)])


def test_fitting_counts_what_stays_in_the_window_and_what_must_be_spared() -> None:
    kv = space(10)
    assert kv.fits(32, 0, spare=2)
    assert not kv.fits(33, 0, spare=2)
    kv = space(2, window=4)
    assert kv.fits(15, 14, spare=0)  # positions 8 to 15
    assert not kv.fits(15, 14, spare=1)
    assert not kv.fits(15, 0, spare=0)  # computed here, up to four blocks are needed at once
    assert space(4, window=4).fits(15, 0, spare=0)


@pytest.mark.parametrize(
    ("num_blocks", "window", "longest"),
    [
        (10, None, 40),
        (10, 4, sys.maxsize),  # at most 3 + 6 tokens at once, in 4 blocks
        (4, 4, sys.maxsize),
        (3, 4, 12),
    ],
)
def test_longest_sequence(num_blocks: int, window: int | None, longest: int) -> None:
    assert space(num_blocks, window=window).longest == longest


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("window", "chunked"), [(5, False), (5, True), (8, True), (1, False)])
def test_windowed_sequences_never_own_more_than_they_may(
    seed: int, window: int, chunked: bool
) -> None:
    """A pool of just the blocks that make any length fit is enough for any steps."""
    num_blocks = next(n for n in range(100) if space(n, window=window).longest == sys.maxsize)
    kv = space(num_blocks, window=window, chunked=chunked)
    rng = random.Random(seed)
    tables: Tables = kv.new_tables()
    computed = 0
    for _ in range(50):
        end = computed + rng.randint(1, 6)
        assert kv.room(tables) >= end
        kv.cover(tables, end)
        kv.forget(tables, computed, end)
        computed = end
        kv.check([(tables, computed)])
