"""Two edges over one store: jobs outlive whoever works on them, and so does what else is kept."""

from __future__ import annotations

import socket
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest

from edge.store import Store
from tests.routing.test_rows import ledger_rows
from tests.system.world import Process, Shape, World, counted, edge_words, start, world

pytestmark = [pytest.mark.system, pytest.mark.slow]

IN_FLIGHT = 4
SLOW = Shape(step_s=0.02, edge_flags=("--batch-in-flight", str(IN_FLIGHT)))


async def another_edge(w: World) -> Process:
    """An edge like the first, ready."""
    words = [*edge_words(w, w.home / "fleet.toml"), "--batch-in-flight", str(IN_FLIGHT)]
    process = start(w, "edge-2", words)
    with anyio.fail_after(30):
        while True:
            with suppress(httpx2.TransportError):
                if (await w.client.get(f"{process.url}/ready")).status_code == 200:
                    return process
            await anyio.sleep(0.05)


async def start_again(w: World, killed: Process) -> None:
    """At the same port, once nothing that the killed one has left behind is there any more."""
    port = int(killed.url.rpartition(":")[2])
    with anyio.fail_after(30):
        while True:
            with closing(socket.socket()) as sock, suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(("127.0.0.1", port))
                break
            await anyio.sleep(0.05)
    start(w, killed.name, killed.words, port)


async def ask(
    w: World, edge: Process, body: object, query: str = "", **headers: str
) -> httpx2.Response:
    url = w.run_url().replace(w.edge.url, edge.url) + query
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await w.client.post(url, json=body, headers={**w.headers(), **named})


async def queued(w: World, edge: Process, count: int, max_tokens: int = 10) -> str:
    """The id of a job of so many requests: "A", "B", ..."""
    requests = [
        {"prompt": chr(65 + n % 26), "raw": True, "max_tokens": max_tokens, "temperature": 0,
         "external_reference": f"r{n}"}
        for n in range(count)
    ]  # fmt: skip
    answer = await ask(w, edge, {"requests": requests}, "?queueRequest=true")
    assert answer.status_code == 200, answer.text
    return str(answer.json()["result"]["request_id"])


async def stands(w: World, edge: Process, job: str) -> dict[str, Any]:
    answer = await ask(w, edge, {"request_id": job}, "?queueRequest=true")
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()["result"]
    return result


async def done(w: World, edge: Process, job: str, within_s: float = 60) -> list[dict[str, Any]]:
    with anyio.fail_after(within_s):
        while "responses" not in (result := await stands(w, edge, job)):
            await anyio.sleep(0.05)
    return list(result["responses"])


async def num_answered(w: World) -> int:
    """How many requests of jobs have an answer in the store."""
    store = Store(w.usage / "store.sqlite")
    query = "SELECT count(*) FROM items WHERE status IS NOT NULL"
    try:
        return int(await store.read(lambda db: db.execute(query).fetchone()[0]))
    finally:
        store.close()


async def wait_answered(w: World, count: int) -> int:
    with anyio.fail_after(30):
        while (found := await num_answered(w)) < count:
            await anyio.sleep(0.02)
    return found


def check_answers(responses: list[dict[str, Any]], count: int, max_tokens: int = 10) -> None:
    assert [it["id"] for it in responses] == list(range(count))
    for n, it in enumerate(responses):
        assert it["success"] is True
        assert it["result"]["response"] == counted(chr(65 + n % 26), max_tokens)
        assert it["external_reference"] == f"r{n}"


async def test_an_edge_that_is_killed_in_mid_job(tmp_path: Path) -> None:
    """Queued at the first, asked for at the second; the one that works on it is killed, and the
    other goes on without what is answered already."""
    count = 40
    async with world(tmp_path, SLOW) as w:
        first, second = w.edge, await another_edge(w)
        second.pause()  # so that the first has the job
        job = await queued(w, first, count)
        await wait_answered(w, 8)
        second.go_on()
        assert (await stands(w, second, job))["status"] == "running"
        first.kill()
        had = await num_answered(w)
        assert 8 <= had < count
        check_answers(await done(w, second, job), count)
        usage = (await stands(w, second, job))["usage"]
        assert usage == {
            "prompt_tokens": count, "completion_tokens": 10 * count, "total_tokens": 11 * count
        }  # fmt: skip
        # Each request of a job has a row of its own. What the killed edge had answered in its last
        # moments may be in the ledger and not in the store, or the other way round.
        rows = [row for row in ledger_rows(w.usage / "ledger.sqlite") if row.outcome == "ok"]
        assert count - had <= len(rows) <= count + IN_FLIGHT
        await w.settled("weur-prefill", "weur-decode")


async def test_an_edge_that_is_stopped_hands_its_job_over(tmp_path: Path) -> None:
    """It ends what it has asked, and the other goes on at once: nothing is asked twice."""
    count = 40
    async with world(tmp_path, SLOW) as w:
        first, second = w.edge, await another_edge(w)
        second.pause()
        job = await queued(w, first, count)
        await wait_answered(w, 4)
        second.go_on()
        assert await anyio.to_thread.run_sync(first.stop) == 0
        check_answers(await done(w, second, job), count)
        rows = ledger_rows(w.usage / "ledger.sqlite")
        assert len([row for row in rows if row.outcome == "ok"]) == count
        assert {row.outcome for row in rows} <= {"ok", "no_capacity"}  # then it is asked again


async def test_a_job_outlives_every_process(tmp_path: Path) -> None:
    count = 30
    async with world(tmp_path, SLOW) as w:
        job = await queued(w, w.edge, count)
        await wait_answered(w, 4)
        stopped = dict(w.processes)
        for process in stopped.values():
            process.kill()
        had = await num_answered(w)
        assert had < count
        for process in stopped.values():
            await start_again(w, process)
        with anyio.fail_after(30):
            while True:
                with suppress(httpx2.TransportError):
                    if (await w.client.get(f"{w.edge.url}/ready")).status_code == 200:
                        break
                await anyio.sleep(0.05)
        check_answers(await done(w, w.edge, job), count)


async def wait_in_flight(w: World, count: int) -> None:
    """Until so many are being answered."""
    with anyio.fail_after(30):
        while (await w.worker("weur-decode")).in_flight < count:
            await anyio.sleep(0.01)


async def test_who_waits_for_an_edge_that_is_killed(tmp_path: Path) -> None:
    """One request is cached, another has an idempotency key; the edge that asks for both is killed
    at it. Whoever waits for the first asks in its place, and the key may be used again."""
    body = {"prompt": "A", "raw": True, "max_tokens": 60}
    async with world(tmp_path, Shape(step_s=0.05)) as w:
        first, second = w.edge, await another_edge(w)
        said: list[httpx2.Response] = []

        async def at_first(**headers: str) -> None:
            with suppress(httpx2.TransportError):
                await ask(w, first, body, **headers)

        async def at_second() -> None:
            said.append(await ask(w, second, body, cf_aig_cache_ttl="60"))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: at_first(cf_aig_cache_ttl="60"))
            tasks.start_soon(lambda: at_first(idempotency_key="k"))
            await wait_in_flight(w, 2)
            assert (await ask(w, second, body, idempotency_key="k")).status_code == 409
            tasks.start_soon(at_second)
            await anyio.sleep(0.3)
            first.kill()
        [answer] = said
        assert answer.status_code == 200
        assert answer.json()["result"]["response"] == counted("A", 60)
        again = await ask(w, second, body, cf_aig_cache_ttl="60")
        assert again.headers["cf-aig-cache-status"] == "HIT"
        with anyio.fail_after(30):
            while (answer := await ask(w, second, body, idempotency_key="k")).status_code == 409:
                await anyio.sleep(0.2)
        assert answer.json()["result"]["response"] == counted("A", 60)
        assert "idempotent-replayed" not in answer.headers
        again = await ask(w, second, body, idempotency_key="k")
        assert again.headers["idempotent-replayed"] == "true"


async def test_clients_go_first(tmp_path: Path) -> None:
    """A job takes what is left: with an engine that has little room, clients are not refused."""
    flags = ("--max-running", "2", "--max-waiting", "8")
    shape = Shape(step_s=0.02, worker_flags=flags, edge_flags=("--batch-in-flight", "8"))
    async with world(tmp_path, shape) as w:
        job = await queued(w, w.edge, 40)
        await wait_answered(w, 1)
        for _ in range(5):
            answer = await w.raw("A", 5)
            assert answer.status_code == 200, answer.text
            assert answer.json()["result"]["response"] == counted("A", 5)
        assert "responses" not in await stands(w, w.edge, job)
        check_answers(await done(w, w.edge, job), 40)
