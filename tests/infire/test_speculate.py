from __future__ import annotations

import random

import pytest

from infire.speculate import Drafter, PairIndex


def propose(token_ids: list[int], most: int = 6, max_ids: int = 12) -> tuple[int, ...]:
    """The first proposal of a drafter, which is up to half of `max_ids` long."""
    return Drafter(max_ids).propose(token_ids, most)


def test_what_followed_last_time_is_proposed() -> None:
    quoted = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert propose([*quoted, 0, *quoted[:4]]) == (5, 6, 7, 8, 9, 10)
    assert propose([*quoted, 0, *quoted[:4]], most=2) == (5, 6)


def test_a_longer_match_earns_a_longer_proposal() -> None:
    quoted = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert propose([*quoted, 0, *quoted[2:4]]) == (5, 6)
    assert propose([*quoted, 0, *quoted[1:4]]) == (5, 6, 7, 8)


def test_one_id_that_recurs_proposes_nothing() -> None:
    assert propose([1, 2, 3, 1]) == ()
    assert propose([1]) == ()


def test_of_several_places_the_longest_match_counts_then_the_latest() -> None:
    assert propose([7, 1, 2, 50, 8, 1, 2, 60, 9, 7, 1, 2], most=1) == (50,)
    assert propose([1, 2, 50, 8, 1, 2, 60, 9, 1, 2], most=1) == (60,)


def test_a_text_that_repeats_itself_goes_on_repeating() -> None:
    assert propose([5, 5, 5, 5, 5]) == (5, 5, 5, 5, 5, 5)
    assert propose([1, 2, 3, 1, 2, 3, 1, 2]) == (3, 1, 2, 3, 1, 2)


@pytest.mark.parametrize("seed", range(5))
def test_the_index_finds_what_a_search_finds(seed: int) -> None:
    """As long as a pair has occurred at most 8 times; grown by odd steps, as prompts are."""
    rng = random.Random(seed)
    index = PairIndex()
    ids: list[int] = []
    num_found = 0
    while len(ids) < 300:
        ids += rng.choices(range(12), k=rng.choice((1, 1, 2, 7)))
        index.extend(ids)
        best = (0, 0)
        places = [p for p in range(2, len(ids)) if ids[p - 2 : p] == ids[-2:]][-8:]
        for place in places:
            length = max(n for n in (2, 3, 4) if place >= n and ids[place - n : place] == ids[-n:])
            if length >= best[1]:
                best = (place, length)
        assert index.longest_match(ids) == best
        num_found += best[1] > 2
    assert num_found > 5


def num_proposed(drafter: Drafter, ids: list[int], num_right: int, steps: int) -> list[int]:
    """Lengths of proposals, when so many ids of each are right, and one more is said."""
    lengths = []
    for _ in range(steps):
        draft = drafter.propose(ids, 6)
        ids += [1] * (min(len(draft), num_right) + 1)  # the text is all ones: matches are longest
        if draft:
            drafter.learn(len(ids), len(draft), min(len(draft), num_right))
        lengths.append(len(draft))
    return lengths


def test_proposals_grow_where_they_are_right() -> None:
    lengths = num_proposed(Drafter(6), [1] * 10, num_right=6, steps=9)
    assert lengths[0] == 3
    assert lengths == sorted(lengths)
    assert lengths[-1] == 6


def test_proposals_shrink_and_pause_where_they_are_wrong() -> None:
    drafter, ids = Drafter(6), [1] * 10
    lengths = num_proposed(drafter, ids, num_right=0, steps=2000)
    assert lengths[:8] == [3, 3, 2, 2, 2, 0, 0, 0]
    assert sum(lengths) < 40  # of 2,000
    assert sum(lengths[1000:]) > 0  # but it never gives up


def test_a_probe_that_is_right_brings_proposals_back() -> None:
    drafter, ids = Drafter(6), [1] * 10
    num_proposed(drafter, ids, num_right=0, steps=20)
    lengths = num_proposed(drafter, ids, num_right=6, steps=60)
    assert lengths[-5:] == [6] * 5
