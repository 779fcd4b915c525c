"""What an engine says of its prefix cache: every key that comes, and every one that goes."""

from __future__ import annotations

import random

from infire.blocks import BlockPool


def key(number: int) -> bytes:
    return bytes([number]) * 16


def test_what_came_and_what_went_is_told_once() -> None:
    pool = BlockPool(2)
    [first] = pool.take(1) or ()
    pool.name(first, key(1))
    assert pool.take_news() == ((key(1),), ())
    assert pool.take_news() == ((), ())
    pool.give_back([first])
    taken = pool.take(2) or ()
    assert pool.take_news() == ((), (key(1),))
    pool.name(taken[0], key(2))
    pool.give_back(taken)
    pool.take(2)
    assert pool.take_news() == ((), (key(2),))  # it came and went unheard, which does no harm


def test_whoever_adds_up_the_news_knows_what_is_there() -> None:
    rng = random.Random(3)
    pool, held, known = BlockPool(6), [], set()
    for number in range(500):
        if held and rng.random() < 0.5:
            pool.give_back([held.pop(rng.randrange(len(held)))])
        elif taken := pool.take(1):
            pool.name(taken[0], key(rng.randrange(12)))
            held += taken
        if number == 250:
            pool.forget()
        if rng.random() < 0.3:
            came, went = pool.take_news()
            assert not {*came} & {*went}
            known = (known | {*came}) - {*went}
            assert known == {it for it in map(key, range(12)) if pool.find(it) is not None}
