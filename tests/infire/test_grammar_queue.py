"""Whose grammar is checked next: by hand, by walks at random, and with checks that hang."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest

from infire.grammar import read_templates
from infire.grammar_check import Checker
from infire.grammar_queue import GrammarQueue
from infire.grammars import Grammars, Ready
from infire.request import Grammar, Sequence
from tests.fakes.counting_engine import counting_engine
from tests.fakes.model_folder import make_counting_folder
from tests.fakes.sequences import sequence
from tests.infire.grammars import BYTES_SIZE


def asked(name: str, tenant: bytes, source: str | None = None) -> Sequence:
    made = sequence(name)
    made.cache_salt, made.grammar = tenant, Grammar("regex", source or name)
    return made


def taken(queue: GrammarQueue) -> str | None:
    found = queue.take()
    return None if found is None else found.request_id


def test_tenants_take_turns() -> None:
    queue = GrammarQueue(1)
    for name in ("a1", "a2", "a3", "b1"):
        queue.put(asked(name, name[:1].encode()))
    order = []
    while (found := queue.take()) is not None:
        order.append(found.request_id)
        queue.done(found)
    assert order == ["a1", "b1", "a2", "a3"]
    assert len(queue) == 0


def test_one_lane_is_left_to_others() -> None:
    queue = GrammarQueue(2)
    first, second, other = asked("a1", b"a"), asked("a2", b"a"), asked("b1", b"b")
    queue.put(first)
    queue.put(second)
    assert taken(queue) == "a1"
    assert taken(queue) is None  # though there is a lane
    queue.put(other)
    assert taken(queue) == "b1"
    queue.done(first)
    assert taken(queue) == "a2"


def test_one_grammar_is_checked_once_at_a_time() -> None:
    queue = GrammarQueue(3)
    first = asked("a1", b"a", "x")
    for one in (first, asked("b1", b"b", "x"), asked("b2", b"b", "y")):
        queue.put(one)
    assert taken(queue) == "a1"
    assert taken(queue) == "b2"
    assert taken(queue) is None
    queue.done(first)
    assert taken(queue) == "b1"


def test_what_is_dropped_waits_no_more() -> None:
    queue = GrammarQueue(1)
    for name in ("a1", "a2", "b1"):
        queue.put(asked(name, name[:1].encode()))
    for name in ("a1", "b1", "unknown"):
        queue.drop(name)
    assert len(queue) == 1
    assert taken(queue) == "a2"
    queue.drop("a2")  # it is being checked: `done` is to be told all the same
    assert taken(queue) is None
    assert len(queue) == 0


@pytest.mark.parametrize("seed", range(20))
def test_a_walk_at_random(seed: int) -> None:
    """All are taken once; no tenant has every lane; nobody waits while a lane is theirs to take."""
    chance = random.Random(seed)
    lanes = chance.randint(1, 4)
    queue = GrammarQueue(lanes)
    put: list[str] = []
    out: list[str] = []
    running: list[Sequence] = []
    for step in range(400):
        if chance.random() < 0.4:
            tenant = chance.choice([b"a", b"b", b"c"])
            put.append(f"{step}")
            queue.put(asked(put[-1], tenant, f"g{chance.randrange(6)}"))
        elif running and chance.random() < 0.5:
            queue.done(running.pop(chance.randrange(len(running))))
        elif len(running) < lanes and (found := queue.take()) is not None:
            running.append(found)
            out.append(found.request_id)
        held = Counter(one.cache_salt for one in running)
        assert max(held.values(), default=0) <= max(1, lanes - 1)
        assert len({one.grammar for one in running}) == len(running)
        assert len(queue) == len(put) - len(out)
    while running or len(queue):
        while running:
            queue.done(running.pop())
        while len(running) < lanes and (found := queue.take()) is not None:
            running.append(found)
            out.append(found.request_id)
    assert sorted(out) == sorted(put)


class SlowChecker(Checker):
    """Hangs at grammars that begin with "slow", until it is let go."""

    def __init__(self, folder: Path, go: Event) -> None:
        super().__init__(folder, BYTES_SIZE)
        self.go = go

    def check(self, grammar: Grammar) -> str:
        if grammar.source.startswith("slow"):
            assert self.go.wait(60)
            return "it was slow"
        return ""

    def warm(self) -> None:
        """There is no child."""


@pytest.fixture
def go() -> Iterator[Event]:
    made = Event()
    yield made
    made.set()


def test_hostile_grammars_of_one_tenant_hold_up_nobody_else(tmp_path: Path, go: Event) -> None:
    folder = make_counting_folder(tmp_path)
    templates = read_templates(folder, BYTES_SIZE)
    assert templates is not None
    grammars = Grammars(templates, [SlowChecker(folder, go) for _ in range(2)])
    try:
        for n in range(5):
            grammars.want(asked(f"bad{n}", b"bad", f"slow{n}"))
        for n in range(5):
            grammars.want(asked(f"good{n}", b"good", f"x{n}"))
        found = ready(grammars, 5)
        assert {one.request_id for one in found} == {f"good{n}" for n in range(5)}
        assert all(one.template is not None for one in found)
        go.set()
        refused = ready(grammars, 5)
        assert {one.request_id for one in refused} == {f"bad{n}" for n in range(5)}
        assert all("it was slow" in one.detail for one in refused)
    finally:
        go.set()
        grammars.close()
    assert "grammars" not in {thread.name for thread in threading.enumerate()}


def test_a_request_that_goes_is_checked_no_more(tmp_path: Path, go: Event) -> None:
    folder = make_counting_folder(tmp_path)
    templates = read_templates(folder, BYTES_SIZE)
    assert templates is not None
    grammars = Grammars(templates, [SlowChecker(folder, go)])
    _, engine = counting_engine()
    engine._grammars = grammars
    try:
        engine.submit(asked("first", b"a", "slow"))
        engine.submit(asked("gone", b"a", "slow too"))
        engine.submit(asked("last", b"a", "x"))
        engine.drop("gone")
        go.set()
        assert {one.request_id for one in ready(grammars, 2)} == {"first", "last"}
    finally:
        go.set()
        grammars.close()
    assert not templates.fault(Grammar("regex", "slow too"))


def test_a_lane_that_was_woken_for_another_is_not_counted_on(tmp_path: Path, go: Event) -> None:
    """One thread rests; two grammars come before it is awake: the second has a thread, too."""
    folder = make_counting_folder(tmp_path)
    templates = read_templates(folder, BYTES_SIZE)
    assert templates is not None
    grammars = Grammars(templates, [SlowChecker(folder, go) for _ in range(2)])
    try:
        grammars.want(asked("first", b"good", "x"))
        ready(grammars, 1)
        with grammars._changed:  # the thread cannot come to itself
            grammars.want(asked("bad", b"bad", "slow"))
            grammars.want(asked("good", b"good", "y"))
        assert [one.request_id for one in ready(grammars, 1)] == ["good"]
    finally:
        go.set()
        grammars.close()


def ready(grammars: Grammars, count: int) -> list[Ready]:
    found: list[Ready] = []
    until = time.monotonic() + 30
    while len(found) < count:
        assert time.monotonic() < until
        found += grammars.take_ready()
        time.sleep(0.005)
    return found
