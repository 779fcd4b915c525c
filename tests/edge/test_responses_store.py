"""Stored responses: two processes' worth of stores on one file, accounts apart, and bounds."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
import pytest
from msgspec.structs import replace

from edge.responses_store import Bounds, ResponsesStore, Stored, prune
from edge.store import Store

DAY_S = 86400.0


@dataclass
class Clock:
    now: float = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "store.sqlite"


@pytest.fixture
def stores(path: Path, clock: Clock) -> Iterator[tuple[ResponsesStore, ResponsesStore]]:
    bounds = Bounds(days=30, most=3, most_bytes=10_000, each=1)
    files = Store(path), Store(path)
    yield ResponsesStore(files[0], clock, bounds), ResponsesStore(files[1], clock, bounds)
    for file in files:
        file.close()


def turn(name: str, previous: str | None = None, text: str = "x") -> Stored:
    response = {"id": name, "output": [{"id": f"o{name}", "type": "message", "content": text}]}
    return Stored(id=name, previous=previous, response=response, input=[{"id": f"i{name}"}])


async def test_another_process_finds_it_and_another_account_does_not(
    stores: tuple[ResponsesStore, ResponsesStore],
) -> None:
    one, other = stores
    await one.put("a", turn("r1"))
    assert await other.get("a", "r1") == turn("r1")
    assert await other.get("b", "r1") is None
    assert await other.chain("b", "r1") is None
    assert not await other.delete("b", "r1")
    assert await other.delete("a", "r1")
    assert await one.get("a", "r1") is None
    assert not await one.delete("a", "r1")


async def test_a_conversation_is_oldest_first_and_whole_or_not_there(
    stores: tuple[ResponsesStore, ResponsesStore],
) -> None:
    one, other = stores
    turns = [turn("r1"), turn("r2", "r1"), turn("r3", "r2")]
    for number, made in enumerate(turns):
        await stores[number % 2].put("a", made)
    await one.put("b", turn("r4"))  # another account's
    await one.put("a", turn("r5", "r4"))
    assert await other.chain("a", "r5") is None
    for last in (3, 2):
        found = await other.chain("a", f"r{last}")
        assert found is not None
        told = [(one.id, one.previous, one.items) for one in found]
        wanted = turns[:last]
        assert told == [(it.id, it.previous, it.input + it.response["output"]) for it in wanted]
    await one.delete("a", "r1")
    assert await other.chain("a", "r3") is None


async def test_a_conversation_takes_no_memory_for_what_its_answers_repeat(
    path: Path, clock: Clock
) -> None:
    with closing(Store(path)) as file:
        store = ResponsesStore(file, clock)
        for name, previous in (("r1", None), ("r2", "r1"), ("r3", "r2")):
            made = turn(name, previous)
            tools = [{"type": "function", "name": "f", "x": [[]] * 100_000}]
            await store.put("a", replace(made, response=made.response | {"tools": tools}))
        tracemalloc.start()
        try:
            assert await store.chain("a", "r3")
            assert tracemalloc.get_traced_memory()[1] < 4_000_000  # all of it would be 19 MB
        finally:
            tracemalloc.stop()


async def test_what_is_not_used_for_a_month_goes(
    stores: tuple[ResponsesStore, ResponsesStore], path: Path, clock: Clock
) -> None:
    one, _ = stores
    await one.put("a", turn("r1"))
    await one.put("b", turn("r0"))
    clock.now += 20 * DAY_S
    assert await one.chain("a", "r1")  # used
    clock.now += 20 * DAY_S
    assert await one.get("a", "r1") is not None
    assert await one.get("b", "r0") is None
    store = Store(path)
    assert await store.write(partial(prune, now=clock(), most=9)) == 1
    assert await store.write(partial(prune, now=clock() + 31 * DAY_S, most=9)) == 1
    store.close()


async def test_the_oldest_of_too_many_go_of_that_account_alone(
    stores: tuple[ResponsesStore, ResponsesStore], clock: Clock
) -> None:
    one, _ = stores
    await one.put("b", turn("other"))
    for number in range(5):
        clock.now += 1
        await one.put("a", turn(f"r{number}"))
    kept = [number for number in range(5) if await one.get("a", f"r{number}")]
    assert kept == [2, 3, 4]
    assert await one.get("b", "other") is not None


async def test_each_account_has_its_oldest_looked_at(path: Path, clock: Clock) -> None:
    """Whoever else stores between, and by as many processes as there were one after another."""
    store = Store(path)
    for number in range(12):
        if number % 3 == 0:  # a process that is started anew
            one = ResponsesStore(store, clock, Bounds(most=3, each=2))
        clock.now += 1
        await one.put("a", turn(f"a{number}"))
        await one.put("b", turn(f"b{number}"))
    for account in ("a", "b"):
        kept = [n for n in range(12) if await one.get(account, f"{account}{n}")]
        assert 3 <= len(kept) <= 5, kept
    store.close()


async def test_what_is_put_at_once_is_looked_at_too(path: Path, clock: Clock) -> None:
    store = Store(path)
    one = ResponsesStore(store, clock, Bounds(most=3, each=2))
    for number in range(10):
        clock.now += 1
        async with anyio.create_task_group() as tasks:
            for name in "xy":
                tasks.start_soon(one.put, "a", turn(f"{name}{number}"))
    names = [f"{name}{number}" for number in range(10) for name in "xy"]
    assert len([name for name in names if await one.get("a", name)]) <= 3 + 2
    store.close()


async def test_the_oldest_of_too_much_go(
    stores: tuple[ResponsesStore, ResponsesStore], clock: Clock
) -> None:
    one, _ = stores
    for number in range(3):
        clock.now += 1
        await one.put("a", turn(f"r{number}", text="x" * 4000))
    kept = [number for number in range(3) if await one.get("a", f"r{number}")]
    assert kept == [1, 2]


async def test_without_a_store_nothing_is_kept(clock: Clock) -> None:
    store = ResponsesStore(None, clock)
    await store.put("a", turn("r1"))
    assert await store.get("a", "r1") is None
    assert await store.chain("a", "r1") is None
    assert not await store.delete("a", "r1")
