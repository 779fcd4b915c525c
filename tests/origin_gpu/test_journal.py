"""What a front writes down of each request that ends there, and how much of it is kept."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from origin_gpu.journal import DAY_S, open_journal, prune
from origin_gpu.settings import FrontSettings
from routing import wire
from routing.errors import Code, Failure
from routing.rows import by_request, connected, write
from routing.usage import JOURNAL, JournalRow, tenant_of
from tests.fakes.region import MODEL, SECRET, FakeRegion, FakeWorker, Latch, failing, fake_region
from tests.origin_gpu.fronts import answer, code, ids, request
from tests.routing.test_rows import made

LOST = Failure(Code.LOST, "gone")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


@asynccontextmanager
async def region_with(file: Path, num_decode: int = 1) -> AsyncGenerator[FakeRegion, None]:
    """Workers p0, d0, d1, ...; the journal is whole when the block is left."""
    workers = [FakeWorker(f"d{n}", "decode") for n in range(num_decode)]
    async with fake_region(FakeWorker("p0", "prefill"), *workers, journal=file) as region:
        yield region
        await region.wait_idle()


def rows_of(file: Path) -> list[JournalRow]:
    with connected(file, JOURNAL) as connection:
        return list(by_request(connection, JOURNAL))


def told(row: JournalRow) -> tuple[int, int, str]:
    return row.first_token, row.new_tokens, row.outcome


async def test_an_answer_is_a_row(file: Path) -> None:
    before = time.time()
    async with region_with(file) as region:
        await answer(region, request(tenant_salt=b"acme's"))
        await answer(region, request(200, num_tokens=9, stop_ids=(204,)))
    first, second = rows_of(file)
    assert (first.request_id, first.region, first.front) == ("r100", "here", "here-front")
    assert (first.tenant, first.model) == (tenant_of(b"acme's"), MODEL)
    assert first.tenant != second.tenant
    assert (first.prompt_tokens, first.cached_tokens) == (2, 2)
    assert told(first) == (0, 10, "length")
    assert told(second) == (0, 4, "stop")
    assert before - 1 < first.started <= first.ended <= second.ended < before + 60


async def test_a_request_that_goes_on_here_is_a_row_of_what_is_new(file: Path) -> None:
    async with region_with(file) as region:
        await answer(region, request(generated_ids=(101, 102, 103)))
    [row] = rows_of(file)
    assert told(row) == (3, 7, "length")


async def test_a_worker_lost_on_the_way_makes_no_second_row(file: Path) -> None:
    async with region_with(file, num_decode=2) as region:
        region["d0"].gates["token"] = failing(LOST)
        assert ids(await answer(region, request())) == list(range(101, 111))
    [row] = rows_of(file)
    assert told(row) == (0, 10, "length")


async def test_what_came_to_nothing_has_a_row_of_what_was_made(file: Path) -> None:
    async with region_with(file) as region:
        assert code(await answer(region, request(100, tokenizer_digest="old")))
        region["p0"].gates["token"] = region["d0"].gates["token"] = failing(LOST)
        assert code(await answer(region, request(200))) is Code.LOST
        region["d0"].gates["token"] = Latch()
        assert code(await answer(region, request(300, budget_s=0.3))) is Code.TIMEOUT
    assert [told(row) for row in rows_of(file)] == [
        (0, 0, "stale_tokenizer"),
        (0, 1, "lost"),
        (0, 1, "timeout"),
    ]


@pytest.mark.parametrize(("stage", "num_made"), [("prefill", 0), ("collect", 1), ("token", 1)])
async def test_hanging_up_is_a_row_at_every_stage(file: Path, stage: Any, num_made: int) -> None:
    async with region_with(file) as region:
        region["p0" if stage == "prefill" else "d0"].gates[stage] = latch = Latch()
        async with region.edge.open(request()):
            await latch.wait_reached()
    [row] = rows_of(file)
    assert told(row) == (0, num_made, "aborted")


async def test_an_edge_that_is_lost_leaves_a_row_of_each_of_its_requests(file: Path) -> None:
    async with region_with(file) as region:
        region["d0"].gates["token"] = latch = Latch()
        other: Any = type(region.edge)(region.url, SECRET, wire.Event)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(other.run)
            await other.wait_connected()
            for first in (100, 200):
                other.open_nowait(request(first), lambda event: None)
            await latch.wait_reached()
            with anyio.fail_after(10):
                while region["d0"].num_open < 2:
                    await anyio.sleep(0.005)
            tasks.cancel_scope.cancel()
        await region.wait_idle()
    assert [(row.request_id, *told(row)) for row in rows_of(file)] == [
        ("r100", 0, 1, "aborted"),
        ("r200", 0, 1, "aborted"),
    ]


async def test_a_front_that_stops_writes_what_it_has(file: Path) -> None:
    """Its clients are not through, nor is the file written when it is told to stop."""
    async with fake_region(
        FakeWorker("p0", "prefill"), FakeWorker("d0", "decode"), journal=file
    ) as region:
        await answer(region, request(100))
        region["d0"].gates["token"] = latch = Latch()
        region.edge.open_nowait(request(200), lambda event: None)
        await latch.wait_reached()
    first, second = rows_of(file)
    assert told(first) == (0, 10, "length")
    assert told(second) == (0, 1, "aborted")


def written(file: Path, ends: list[float]) -> None:
    with connected(file, JOURNAL) as connection:
        write(connection, JOURNAL, [made(f"r{n}", ended=end) for n, end in enumerate(ends, 1)])


def left(file: Path) -> list[str]:
    return [row.request_id for row in rows_of(file)]


def test_old_rows_are_dropped_and_never_the_last(file: Path) -> None:
    written(file, [1.0, 5.0, 2.0, 6.0, 3.0])
    with connected(file, JOURNAL) as connection:
        assert prune(connection, before=2.0, most=100) == 1
        assert prune(connection, before=5.5, most=100) == 2
        assert prune(connection, before=100.0, most=100) == 1
        assert prune(connection, before=100.0, most=1) == 0
    assert left(file) == ["r5"]


def test_of_too_many_the_first_are_dropped(file: Path) -> None:
    written(file, [9.0] * 5)
    with connected(file, JOURNAL) as connection:
        assert prune(connection, before=0.0, most=5) == 0
        assert prune(connection, before=0.0, most=2) == 3
        assert prune(connection, before=0.0, most=2) == 0
    assert left(file) == ["r4", "r5"]
    written(file, [9.0])  # numbers go on where they were
    with connected(file, JOURNAL) as connection:
        assert connection.execute("SELECT max(rowid) FROM journal").fetchone() == (6,)
        assert prune(connection, before=0.0, most=2) == 1


def test_none_in_an_empty_journal(file: Path) -> None:
    with connected(file, JOURNAL) as connection:
        assert prune(connection, before=100.0, most=1) == 0


def test_a_journal_is_pruned_when_it_is_opened(file: Path) -> None:
    """By the settings of its front: days, and rows at most."""
    written(file, [0.0, 1.5 * DAY_S, 2.0 * DAY_S, 2.5 * DAY_S])

    def open_with(**kept: Any) -> None:
        settings = FrontSettings(
            name="f", region="r", workers=(), secret_file=Path("none"), journal=file, **kept
        )
        open_journal(file, settings, lambda: 3.0 * DAY_S).close()

    open_with()
    assert left(file) == ["r1", "r2", "r3", "r4"]
    open_with(journal_days=2.0)
    assert left(file) == ["r2", "r3", "r4"]
    open_with(journal_rows=2)
    assert left(file) == ["r3", "r4"]
