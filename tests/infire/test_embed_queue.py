"""The order of texts: by hand, and on seeded walks beside a plain list."""

from __future__ import annotations

import random

import pytest

from infire.embed_queue import EmbedQueue


def test_texts_go_in_the_order_in_which_they_came() -> None:
    queue = EmbedQueue()
    queue.add("a", [4, 4, 4])
    queue.add("b", [2])
    queue.add("c", [3])
    assert queue.take(9) == [("a", 0), ("a", 1)]
    assert (queue.num_requests, queue.num_tokens) == (3, 9)
    assert queue.take(9) == [("a", 2), ("b", 0), ("c", 0)]
    assert (queue.take(9), queue.num_requests, queue.num_tokens) == ([], 0, 0)


def test_a_text_beyond_the_budget_is_a_batch_by_itself() -> None:
    queue = EmbedQueue()
    queue.add("a", [1, 50, 1])
    assert [queue.take(10) for _ in range(3)] == [[("a", 0)], [("a", 1)], [("a", 2)]]


def test_what_is_dropped_is_skipped() -> None:
    queue = EmbedQueue()
    queue.add("a", [6, 6])
    queue.add("b", [6])
    assert queue.take(10) == [("a", 0)]
    queue.drop("a")
    queue.drop("unknown")
    assert queue.num_tokens == 6
    assert queue.take(10) == [("b", 0)]


@pytest.mark.parametrize("seed", range(20))
def test_walks(seed: int) -> None:
    """Each text once, in order, in batches as full as they may be."""
    chance, queue = random.Random(seed), EmbedQueue()
    waiting: list[tuple[str, int, int]] = []  # request, text, tokens
    for n in range(300):
        match chance.randrange(4):
            case 0 | 1:
                lengths = [chance.randint(1, 30) for _ in range(chance.randint(1, 8))]
                queue.add(str(n), lengths)
                waiting += [(str(n), at, length) for at, length in enumerate(lengths)]
            case 2 if waiting:
                gone = chance.choice(waiting)[0]
                queue.drop(gone)
                waiting = [it for it in waiting if it[0] != gone]
            case _:
                budget = chance.randint(1, 60)
                batch = queue.take(budget)
                taken, waiting = waiting[: len(batch)], waiting[len(batch) :]
                assert batch == [(name, at) for name, at, _ in taken]
                total = sum(length for _, _, length in taken)
                assert total <= budget or len(taken) == 1
                assert not waiting or total + waiting[0][2] > budget or not taken
                assert taken or not waiting
        assert queue.num_tokens == sum(length for _, _, length in waiting)
        assert queue.num_requests == len({name for name, _, _ in waiting})
