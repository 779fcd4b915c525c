"""Texts to vectors: a worker with a real engine process, and a front between workers that fail."""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path
from typing import Any

import anyio
import httpx2
import msgspec

from routing import wire
from routing.errors import Code, Failure
from tests.fakes.counting_encoder import vector
from tests.fakes.region import ASSETS as FAKE_ASSETS
from tests.fakes.region import (
    MODEL,
    FakeRegion,
    FakeWorker,
    Latch,
    embedded,
    failing,
    fake_region,
)
from tests.origin_gpu.local_workers import MODEL as LOCAL_MODEL
from tests.origin_gpu.local_workers import LocalWorker, local_worker

ENCODER = Path(__file__).parents[1] / "fakes" / "counting_encoder.py"
BOUND_S = 30.0


def texts_for(worker: LocalWorker, *texts: tuple[int, ...], **other: Any) -> wire.Embed:
    fields = {
        "request_id": "r1",
        "tenant_salt": b"",
        "model": LOCAL_MODEL,
        "tokenizer_digest": worker.app.worker.assets_digest,
        "texts": texts,
        "budget_s": BOUND_S,
    }
    return wire.Embed(**(fields | other))


def command(step_s: float = 0.0) -> tuple[str, ...]:
    return (sys.executable, str(ENCODER), "--step-s", str(step_s))


def fault(events: list[Any]) -> wire.Fault:
    [only] = events
    assert isinstance(only, wire.Fault)
    return only


async def test_a_worker_answers_in_one_event(tmp_path: Path) -> None:
    async with local_worker(tmp_path, engine_command=command()) as w:
        assert w.report.models[0].task == "text-embeddings"
        [answer] = await w.ask(texts_for(w, (1, 2), (7,), pooling="cls"))
        assert answer == wire.Embedded(
            vectors=vector((1, 2), "cls") + vector((7,), "cls"),
            width=3,
            pooling="cls",
            prompt_tokens=3,
        )


async def test_a_worker_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    async with local_worker(tmp_path, engine_command=command()) as w:
        for texts, says in (
            ((), "text: there is none"),
            (((1,), ()), "text 1: it has no tokens"),
            (((1,) * 41,), "text 0: its 41 tokens exceed the 40 that one text may have"),
            (((50_000,),), "text 0: 50000 is no token"),
        ):
            told = fault(await w.ask(texts_for(w, *texts)))
            assert (told.code, says in told.detail) == (Code.BAD_INPUT, True), told
        chat = fault(await w.ask(w.generate(65)))
        assert (chat.code, chat.detail) == (
            Code.BAD_INPUT,
            f"model: {LOCAL_MODEL} makes vectors, and no text",
        )
        stale = fault(await w.ask(texts_for(w, (1,), tokenizer_digest="other")))
        assert stale.code is Code.STALE_TOKENIZER


async def test_a_generating_worker_makes_no_vectors(tmp_path: Path) -> None:
    async with local_worker(tmp_path) as w:
        told = fault(await w.ask(texts_for(w, (65,))))
        assert (told.code, told.detail) == (
            Code.BAD_INPUT,
            f"model: {LOCAL_MODEL} makes text, and no vectors",
        )


async def test_texts_count_as_the_steps_they_take(tmp_path: Path) -> None:
    """Ten of 40 tokens are ten steps of 40: with five that wait, another request is refused."""
    more = {"max_step_tokens": 40, "max_waiting": 5}
    async with local_worker(tmp_path, engine_command=command(0.2), **more) as w:
        many = texts_for(w, *[(1,) * 40] * 10)
        async with w.link.open(many) as events:
            await w.until(lambda it: it.waiting >= 10)
            told = fault(await w.ask(texts_for(w, (1,))))
            assert told.code is Code.NO_CAPACITY
            [answer] = [event async for event in events]
            assert isinstance(answer, wire.Embedded)
        # One who hangs up has what is left of it dropped: it is not computed, and counts no more.
        async with w.link.open(many):
            await w.until(lambda it: it.waiting >= 10)
        await w.until(lambda it: it.waiting == it.in_flight == 0)


async def test_the_time_of_a_request_ends_it(tmp_path: Path) -> None:
    async with local_worker(tmp_path, engine_command=command(0.5)) as w:
        told = fault(await w.ask(texts_for(w, (1,), budget_s=0.05)))
        assert told.code is Code.TIMEOUT


REQUEST = wire.Embed(
    request_id="r",
    tenant_salt=b"",
    model=MODEL,
    tokenizer_digest=FAKE_ASSETS.digest,
    texts=((1, 2), (3,)),
    budget_s=BOUND_S,
)


async def ask(region: FakeRegion, request: wire.Embed = REQUEST) -> list[Any]:
    with anyio.fail_after(BOUND_S):
        async with region.edge.open(request) as events:
            return [event async for event in events]


async def test_a_front_passes_texts_to_the_least_loaded_worker(tmp_path: Path) -> None:
    journal = tmp_path / "journal.sqlite"
    a, b, latch = FakeWorker("a", "both"), FakeWorker("b", "both"), Latch()
    a.gates["embed"] = latch
    async with fake_region(a, b, journal=journal) as region:
        async with region.edge.open(REQUEST) as first:
            await latch.wait_reached()
            assert await ask(region) == [embedded(REQUEST)]
            assert (len(a.of(wire.Embed)), len(b.of(wire.Embed))) == (1, 1)
            latch.open()
            assert [event async for event in first] == [embedded(REQUEST)]
        await region.wait_idle()
    with sqlite3.connect(journal) as rows:
        found = rows.execute("SELECT prompt_tokens, new_tokens, outcome FROM journal").fetchall()
    rows.close()
    assert found == [(3, 0, "embedded")] * 2


async def test_a_lost_worker_costs_a_second_try() -> None:
    a, b, latch = FakeWorker("a", "both"), FakeWorker("b", "both"), Latch()
    a.gates["embed"] = latch
    async with fake_region(a, b) as region, region.edge.open(REQUEST) as events:
        await latch.wait_reached()
        await region.kill("a")
        with anyio.fail_after(BOUND_S):
            assert [event async for event in events] == [embedded(REQUEST)]
        assert b.of(wire.Embed)[0].budget_s < REQUEST.budget_s
        await region.wait_idle()


async def test_a_worker_that_drains_costs_no_try_after_one_was_lost() -> None:
    a, b, c = (FakeWorker(name, "both") for name in "abc")
    a.gates["embed"] = failing(Failure(Code.LOST, "its engine is gone"))
    b.gates["embed"] = failing(Failure(Code.DRAINING, "it is being stopped"))
    async with fake_region(a, b, c) as region:
        assert await ask(region) == [embedded(REQUEST)]
        assert [len(it.of(wire.Embed)) for it in (a, b, c)] == [1, 1, 1]


async def test_without_another_there_is_no_second_try() -> None:
    a = FakeWorker("a", "both")
    a.gates["embed"] = failing(Failure(Code.NO_CAPACITY, "full"))
    async with fake_region(a) as region, httpx2.AsyncClient() as client:
        assert fault(await ask(region)).code is Code.NO_CAPACITY
        assert "second_tries_total{" not in (await client.get(f"{region.url}/metrics")).text


async def test_a_refusal_of_the_input_is_passed_on_at_once() -> None:
    a, b = FakeWorker("a", "both"), FakeWorker("b", "both")

    async def refuse(_: Any) -> None:
        raise Failure(Code.BAD_INPUT, "text 0: it has no tokens")

    a.gates["embed"] = refuse
    async with fake_region(a, b) as region:
        assert await ask(region) == [wire.Fault(Code.BAD_INPUT, "text 0: it has no tokens")]
        assert not b.of(wire.Embed)


async def test_hanging_up_reaches_the_worker() -> None:
    a, latch = FakeWorker("a", "both"), Latch()
    a.gates["embed"] = latch
    async with fake_region(a) as region:
        async with region.edge.open(REQUEST):
            await latch.wait_reached()
        await region.wait_idle()


async def test_a_region_without_the_model_says_so() -> None:
    async with fake_region(FakeWorker("a", "both")) as region:
        told = fault(await ask(region, msgspec.structs.replace(REQUEST, model="@cf/no/such")))
        assert told.code is Code.UNAVAILABLE
