"""What an edge knows of its regions: reports, round trips, breakers, and where assets come from."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import httpx2
import msgspec
import pytest

from edge.texts import TextStore
from edge.watch import Watch
from routing.choose import STALE_S
from routing.errors import Code, Failure
from routing.health import State
from routing.wire import TextAssets
from tests.fakes.counting_region import ASSETS, MODEL, OTHER_ASSETS, SECRET, CountingRegion, running


class Clock:
    """Stands still unless told otherwise."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def watching(
    *regions: CountingRegion, secret: str = SECRET, clock: Clock | None = None
) -> AsyncIterator[Watch]:
    async with httpx2.AsyncClient(trust_env=False) as client, anyio.create_task_group() as tasks:
        places = [region.region for region in regions]
        watch = Watch(places, secret, client, clock or Clock())
        tasks.start_soon(watch.run)
        yield watch
        tasks.cancel_scope.cancel()


async def until_connected(watch: Watch) -> None:
    with anyio.fail_after(10):
        while not all(known.connected and known.report for known in watch.known()):
            await anyio.sleep(0.005)


async def test_a_report_is_fetched_and_timed() -> None:
    region, clock = CountingRegion(room=3), Clock()
    async with running(region), watching(region, clock=clock) as watch:
        await until_connected(watch)
        [known] = watch.known()
        assert known.report is not None
        assert (known.report.room, known.reported_at, known.rtt_ms) == (3, 1000.0, 0.0)
        assert watch.ready()
        region.room = 1
        clock.now += 2
        await watch.refresh()
        [known] = watch.known()
        assert known.report is not None
        assert (known.report.room, known.reported_at) == (1, 1002.0)


async def test_a_model_that_a_region_no_longer_names_is_remembered() -> None:
    region = CountingRegion()
    async with running(region), watching(region) as watch:
        await until_connected(watch)
        region.serves = False
        await watch.refresh()
        [known] = watch.known()
        assert known.report is not None
        assert (known.report.models, known.served) == ((), {MODEL})


async def test_a_region_that_is_being_stopped_is_not_asked_until_it_says_that_it_serves() -> None:
    region = CountingRegion()
    async with running(region), watching(region) as watch:
        await until_connected(watch)
        watch.failed(region.region.name)
        watch.draining(region.region.name, "another")
        assert watch.known()[0].model(MODEL)
        watch.draining(region.region.name, MODEL)
        [known] = watch.known()
        assert (known.model(MODEL), known.served) == (None, {MODEL})
        assert known.breaker.failures == 1  # no more than there were
        await watch.refresh()
        assert watch.known()[0].model(MODEL)


async def test_who_comes_before_the_regions_are_known_waits_for_them_and_not_for_ever() -> None:
    there, away, clock = CountingRegion(name="there"), CountingRegion(name="away"), Clock()
    settled = anyio.Event()

    async def wait(watch: Watch) -> None:
        await watch.wait_settled()
        settled.set()

    async with running(there) as serving, watching(there, away, clock=clock) as watch:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait, watch)
            with anyio.fail_after(10):
                await watch.link("there").wait_connected()
                while not watch.known()[0].report:
                    await anyio.sleep(0.005)
            assert not settled.is_set()
            clock.now += 6
        assert settled.is_set()
        await there.stop()
        await watch.wait_settled()  # later it is told at once that nobody is there
        await away.start(serving)
        await away.stop()
    async with watching(away, clock=clock) as watch:
        clock.now += 6
        await watch.wait_settled()


async def test_a_silent_region_keeps_its_last_report_and_grows_stale() -> None:
    region, clock = CountingRegion(), Clock()
    async with running(region), watching(region, clock=clock) as watch:
        await until_connected(watch)
        await region.stop()
        clock.now += STALE_S + 1
        await watch.refresh()
        [known] = watch.known()
        assert known.report is not None
        assert clock.now - known.reported_at > STALE_S
        assert not watch.ready()


async def test_who_waits_for_a_region_is_woken_by_its_report() -> None:
    region, clock = CountingRegion(), Clock()
    async with running(region), watching(region, clock=clock) as watch:
        await until_connected(watch)
        await watch.wait_reached(clock.now - 1)
        woken = anyio.Event()

        async def wait() -> None:
            await watch.wait_reached(1000.0)
            woken.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await watch.refresh()  # at the very moment of the loss: it may be of before
            assert not woken.is_set()
            clock.now += 1
            await watch.refresh()
            with anyio.fail_after(10):
                await woken.wait()


async def test_a_new_edge_waits_a_little_for_all_its_regions() -> None:
    there, away, clock = CountingRegion(name="there"), CountingRegion(name="away"), Clock()
    async with running(there) as tasks, watching(there, away, clock=clock) as watch:
        with anyio.fail_after(10):
            while not watch.known()[0].report:
                await anyio.sleep(0.005)
        await watch.link("there").wait_connected()
        assert not watch.ready()
        clock.now += 6
        assert watch.ready()
        await away.start(tasks)
        await away.stop()


async def test_a_wrong_secret_is_told_nothing() -> None:
    region = CountingRegion()
    async with running(region), watching(region, secret="wrong") as watch:
        await watch.refresh()
        assert watch.known()[0].report is None
        assert not watch.ready()


async def test_another_life_of_a_region_closes_its_breaker() -> None:
    region = CountingRegion()
    async with running(region), watching(region) as watch:
        await until_connected(watch)
        for _ in range(3):
            watch.failed("weur")
        assert watch.known()[0].breaker.state(watch.now()) is State.OPEN
        await watch.refresh()
        assert watch.known()[0].breaker.state(watch.now()) is State.OPEN
        region.epoch = "2"
        await watch.refresh()
        assert watch.known()[0].breaker.state(watch.now()) is State.CLOSED


async def test_assets_come_from_any_region_that_has_them() -> None:
    wrong = CountingRegion(name="wrong", assets=OTHER_ASSETS, reported=ASSETS)
    right = CountingRegion(name="right")
    async with running(wrong, right), watching(wrong, right) as watch:
        await until_connected(watch)
        assert await watch.text_assets(ASSETS.digest) == ASSETS
        assert (wrong.fetched, right.fetched) == (1, 1)
        assert watch.tokenizer_digests() == {ASSETS.digest}
        with pytest.raises(Failure) as raised:
            await watch.text_assets("0" * 64)
        assert raised.value.code is Code.UNAVAILABLE


class Source:
    """Where a text store fetches from."""

    def __init__(self, assets: TextAssets = ASSETS) -> None:
        self.assets = assets
        self.fetched = 0
        self.gate = anyio.Event()
        self.gate.set()

    async def fetch(self, digest: str) -> TextAssets:
        self.fetched += 1
        await self.gate.wait()
        if digest != self.assets.digest:
            raise Failure(Code.UNAVAILABLE, "away")
        return self.assets


async def test_assets_are_fetched_once_and_outlive_the_process(tmp_path: Path) -> None:
    source = Source()
    store = TextStore(tmp_path / "assets", source.fetch)
    assert await store.get(ASSETS.digest) is await store.get(ASSETS.digest)
    later = TextStore(tmp_path / "assets", source.fetch)
    assert (await later.get(ASSETS.digest)).stop_ids == ASSETS.stop_ids
    assert source.fetched == 1
    assert [path.name for path in (tmp_path / "assets").iterdir()] == [ASSETS.digest]


@pytest.mark.parametrize("damage", [b"", b"nonsense", msgspec.msgpack.encode(OTHER_ASSETS)])
async def test_a_damaged_file_is_fetched_again(tmp_path: Path, damage: bytes) -> None:
    source = Source()
    (tmp_path / ASSETS.digest).write_bytes(damage)
    await TextStore(tmp_path, source.fetch).get(ASSETS.digest)
    assert source.fetched == 1
    assert msgspec.msgpack.decode((tmp_path / ASSETS.digest).read_bytes(), type=TextAssets)


async def test_a_disk_that_takes_nothing_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = TextStore(tmp_path / "file" / "assets", Source().fetch)
    assert (await store.get(ASSETS.digest)).stop_ids == ASSETS.stop_ids


async def test_many_wait_for_one_fetch(tmp_path: Path) -> None:
    source = Source()
    source.gate = anyio.Event()
    store = TextStore(tmp_path, source.fetch)
    got: list[object] = []

    async def want() -> None:
        got.append(await store.get(ASSETS.digest))

    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(want)
        await anyio.wait_all_tasks_blocked()
        source.gate.set()
    assert source.fetched == 1
    assert len({id(one) for one in got}) == 1


async def test_who_waits_goes_on_when_the_fetcher_is_cancelled(tmp_path: Path) -> None:
    source = Source()
    source.gate = anyio.Event()
    store = TextStore(tmp_path, source.fetch)
    first = anyio.CancelScope()

    async def leave() -> None:
        with first:
            await store.get(ASSETS.digest)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(leave)
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(store.get, ASSETS.digest)
        await anyio.wait_all_tasks_blocked()
        first.cancel()
        source.gate.set()
    assert source.fetched == 2


@pytest.mark.parametrize("digest", ["../../etc/passwd", "", "A" * 64, "0" * 63])
async def test_what_is_no_digest_touches_no_file(tmp_path: Path, digest: str) -> None:
    source = Source()
    with pytest.raises(Failure):
        await TextStore(tmp_path, source.fetch).get(digest)
    assert source.fetched == 0


async def test_assets_that_nobody_understands_are_an_unavailable_model(tmp_path: Path) -> None:
    source = Source(TextAssets(tokenizer_json=b"{}", chat_template=""))
    store = TextStore(tmp_path, source.fetch)
    with pytest.raises(Failure) as raised:
        await store.get(source.assets.digest)
    assert raised.value.code is Code.UNAVAILABLE
    assert not await store.warm([source.assets.digest])
