"""What a front knows of caches: news in, how much of a prompt is where out."""

from __future__ import annotations

import random
from contextlib import ExitStack

import pytest

from infire.prefix import Chain, chain_keys, root
from origin_gpu import cache_news, prefix_index
from origin_gpu.cache_news import CacheMirror, CacheReader
from origin_gpu.handover import CacheNews
from origin_gpu.prefix_index import PrefixIndex

SIZE = 4  # tokens of a block
START = root(b"salt", "model", None)
IDS = tuple(range(100, 120))  # five blocks
KEYS = chain_keys(START, IDS, SIZE)


def found(index: PrefixIndex, *workers: str, ids: tuple[int, ...] = IDS) -> dict[str, int]:
    return index.num_found(workers, Chain(START, SIZE), ids, len(ids) // SIZE)


def told(worker: str, *keys: bytes) -> PrefixIndex:
    index = PrefixIndex()
    assert index.hear(worker, CacheNews(0, keys))
    return index


def test_blocks_count_from_the_first_without_a_gap() -> None:
    index = told("a", *KEYS[:3])
    index.hear("b", CacheNews(0, (KEYS[0], KEYS[1], KEYS[3])))
    index.hear("c", CacheNews(0, KEYS[1:]))
    assert found(index, "a", "b", "c", "d") == {"a": 3, "b": 2, "c": 0, "d": 0}


def test_a_worker_that_has_all_has_all() -> None:
    assert found(told("a", *KEYS), "a") == {"a": 5}


def test_another_tenants_prompt_is_not_known() -> None:
    index = told("a", *KEYS)
    theirs = Chain(root(b"other", "model", None), SIZE)
    assert index.num_found(["a"], theirs, IDS, 5) == {"a": 0}


def test_a_prompt_that_nobody_knows_costs_one_hash() -> None:
    chain = Chain(START, SIZE)
    told("a", b"x" * 16).num_found(["a"], chain, IDS, 5)
    assert len(chain._keys) == 2  # its start, and one


def test_what_is_removed_is_gone() -> None:
    index = told("a", *KEYS)
    index.hear("a", CacheNews(1, (), (KEYS[2],)))
    assert found(index, "a") == {"a": 2}
    index.hear("a", CacheNews(2, (KEYS[2],)))
    assert found(index, "a") == {"a": 5}


def test_number_zero_begins_anew() -> None:
    index = told("a", *KEYS)
    assert index.hear("a", CacheNews(0, (KEYS[0],)))
    assert found(index, "a") == {"a": 1}
    assert index.num_keys == 1


def test_a_gap_is_noticed_and_nothing_is_believed_until_all_is_told_again() -> None:
    index = told("a", *KEYS)
    index.hear("b", CacheNews(0, KEYS[:2]))
    assert not index.hear("a", CacheNews(2, (), KEYS[:1]))
    assert found(index, "a", "b") == {"a": 0, "b": 2}
    assert index.hear("a", CacheNews(1, KEYS))  # late: of before
    assert found(index, "a") == {"a": 0}
    assert index.hear("a", CacheNews(0, KEYS[:3]))
    assert found(index, "a") == {"a": 3}


def test_news_that_come_twice_count_once() -> None:
    index = told("a", *KEYS)
    gone = CacheNews(1, (), (KEYS[4],))
    assert index.hear("a", gone)
    assert index.hear("a", CacheNews(2, (KEYS[4],)))
    assert index.hear("a", gone)
    assert found(index, "a") == {"a": 5}


def test_a_forgotten_worker_leaves_its_place_to_another() -> None:
    index = told("a", *KEYS)
    index.hear("b", CacheNews(0, KEYS[:1]))
    index.forget("a")
    index.forget("a")
    index.hear("c", CacheNews(0, KEYS[:2]))
    index.check()
    assert found(index, "a", "b", "c") == {"a": 0, "b": 1, "c": 2}


def test_a_worker_with_much_is_forgotten_at_once_and_tidied_away_bit_by_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who waits for the front meanwhile waits for a part of it only."""
    monkeypatch.setattr(prefix_index, "FORGET_AT_ONCE", 2)
    index = told("a", *KEYS)
    index.hear("b", CacheNews(0, KEYS[:1]))
    index.forget("a")
    assert index.num_keys in {3, 4}  # two have been looked at, and what "b" has stays
    assert found(index, "a", "b") == {"a": 0, "b": 1}
    index.hear("a", CacheNews(0, KEYS[2:]))  # it is back, under another bit
    index.check()
    assert found(index, "a", "b") == {"a": 0, "b": 1}
    index.hear("b", CacheNews(1))
    index.forget("b")
    index.hear("a", CacheNews(1))
    index.check()
    assert index.num_keys == 3
    index.hear("c", CacheNews(0, KEYS))
    index.check()
    assert found(index, "a", "c") == {"a": 0, "c": 5}
    assert {*index._bit_of.values()} <= {1, 2, 4}


def test_a_worker_that_says_more_than_is_remembered_is_known_in_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("origin_gpu.prefix_index.MOST_KEYS", 3)
    index = told("a", *KEYS)
    index.check()
    assert found(index, "a") == {"a": 3}


def test_a_reader_hears_all_there_is_first() -> None:
    mirror = CacheMirror()
    mirror.change(KEYS[:2], ())
    with mirror.reader() as reader:
        assert reader.take() == CacheNews(0, tuple(KEYS[:2]))
        assert reader.take() is None
        mirror.change(KEYS[2:3], KEYS[:1])
        assert reader.take() == CacheNews(1, (KEYS[2],), (KEYS[0],))


def test_an_empty_cache_is_told_as_such() -> None:
    assert CacheReader(()).take() == CacheNews(0)


def test_what_comes_and_goes_between_two_takes_is_not_told() -> None:
    reader = CacheReader(KEYS[:1])
    reader.take()
    reader.change(KEYS[1:2], ())
    reader.change((), KEYS[:2])
    reader.change(KEYS[:1], ())
    assert reader.take() is None


def test_much_is_told_in_several_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_news, "MOST_AT_ONCE", 2)
    reader, index = CacheReader(KEYS), PrefixIndex()
    told_apart = []
    while news := reader.take():
        told_apart.append(len(news.added))
        assert index.hear("a", news)
    assert told_apart == [2, 2, 1]
    assert found(index, "a") == {"a": 5}


class Walk:
    """Three workers, a front that listens to them, and a way between that loses and repeats."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.index = PrefixIndex()
        self.mirrors = {name: CacheMirror() for name in "abc"}
        self.truth: dict[str, set[bytes]] = {name: set() for name in "abc"}
        self.readers: dict[str, CacheReader] = {}
        self.late: dict[str, list[CacheNews]] = {}
        self.watches = {name: ExitStack() for name in "abc"}
        for name in "abc":
            self.watch(name)

    def watch(self, name: str) -> None:
        """As a front does: what was under way on the last watch never arrives."""
        self.watches[name].close()
        self.readers[name] = self.watches[name].enter_context(self.mirrors[name].reader())
        self.late[name] = []

    def hear(self, name: str, news: CacheNews) -> None:
        if not self.index.hear(name, news):
            self.watch(name)

    def keys(self) -> list[bytes]:
        return [bytes([self.rng.randrange(24)]) * 16 for _ in range(self.rng.randrange(5))]

    def add(self, name: str) -> None:
        keys = self.keys()
        self.mirrors[name].change(keys, ())
        self.truth[name].update(keys)

    def remove(self, name: str) -> None:
        keys = self.keys()
        self.mirrors[name].change((), keys)
        self.truth[name].difference_update(keys)

    def deliver(self, name: str) -> None:
        reader = self.readers[name]
        if news := reader.take():
            for _ in range(self.rng.choice((1, 1, 2))):
                if self.readers[name] is reader:
                    self.hear(name, news)

    def delay(self, name: str) -> None:
        if (news := self.readers[name].take()) and news.number:
            self.late[name].append(news)
        elif news:
            self.hear(name, news)

    def deliver_late(self, name: str) -> None:
        if self.late[name]:
            self.hear(name, self.late[name].pop(self.rng.randrange(len(self.late[name]))))

    def restart_worker(self, name: str) -> None:
        self.mirrors[name].clear()
        self.truth[name].clear()

    def restart_front(self, name: str) -> None:
        self.index = PrefixIndex()
        for each in "abc":
            self.watch(each)

    def say_all(self, name: str) -> None:
        while news := self.readers[name].take():
            self.hear(name, news)


@pytest.mark.parametrize("seed", range(20))
def test_the_index_converges_whatever_is_lost_on_the_way(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 21: news are lost, said twice and out of order; workers and the front start anew."""
    monkeypatch.setattr(cache_news, "MOST_AT_ONCE", 3)
    monkeypatch.setattr(prefix_index, "FORGET_AT_ONCE", 2 if seed % 2 else 1000)
    rng = random.Random(seed)
    walk = Walk(rng)
    acts = [walk.add] * 6 + [walk.remove] * 3 + [walk.deliver] * 9
    acts += [walk.delay, walk.deliver_late] * 2
    for _ in range(400):
        rng.choice(acts)(rng.choice("abc"))
        if rng.random() < 0.02:
            rng.choice((walk.restart_worker, walk.restart_front))(rng.choice("abc"))
        walk.index.check()
    for name in "abc":
        for mark in (b"y" * 16, b"z" * 16):  # what was lost is noticed by what comes after it
            walk.say_all(name)
            walk.mirrors[name].change((mark,), ())
            walk.truth[name].add(mark)
        walk.say_all(name)
        assert walk.index._keys_of[name] == walk.truth[name]
    walk.index.check()
