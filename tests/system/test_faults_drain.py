"""Processes are told to stop while there is work: what has begun ends, and nothing new is lost."""

from __future__ import annotations

import signal
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from urllib.parse import urlsplit

import anyio
import httpx2
import msgspec
import pytest

from origin_gpu.handover import Prefill, Prefilled
from routing import wire
from routing.errors import Code
from tests.fakes.events import read_all
from tests.system.faults import (
    PATIENCE_S,
    Heard,
    hear,
    is_free,
    metric,
    nothing_in_flight,
    request_to,
    sse_error,
    status_of,
    wait_served,
)
from tests.system.procs import linked, wait_ready, worker_processes
from tests.system.world import Process, Shape, World, counted, start, world

pytestmark = pytest.mark.system
NUM_STREAMS, NUM_TOKENS, LONG = 8, 60, 90
GRACE_S = 30.0  # the default
CUT_S = 5 * 5.0  # a process that is cut is gone within 5 s


async def told(process: Process, number: int = signal.SIGTERM) -> None:
    """It has been told to stop, and has heard it: it is not ready any more."""
    process.popen.send_signal(number)
    with anyio.fail_after(PATIENCE_S):
        while await ready(process) == 200:
            await anyio.sleep(0.002)


async def ready(process: Process) -> int | None:
    """What `/ready` answers to a new connection; None: nobody is there."""
    try:
        # Certificates take 20 ms to read, in which the streams beside this are not read.
        async with httpx2.AsyncClient(timeout=PATIENCE_S, trust_env=False, verify=False) as client:
            return (await client.get(f"{process.url}/ready")).status_code
    except httpx2.TransportError:
        return None


async def gone(process: Process, within_s: float) -> int:
    """Its exit code, once it has ended."""
    with anyio.fail_after(within_s):
        while (code := process.popen.poll()) is None:
            await anyio.sleep(0.01)
    return code


async def again(w: World, name: str) -> Process:
    """Another process where `name` was, which is gone; once it is ready."""
    former = w.processes[name]
    port = urlsplit(former.url).port
    assert port is not None
    with anyio.fail_after(PATIENCE_S):
        while not is_free(port):
            await anyio.sleep(0.01)
    process = start(w, name, former.words, port)
    await wait_ready(w, process)
    return process


@asynccontextmanager
async def streams(w: World, num_tokens: int = NUM_TOKENS) -> AsyncGenerator[Sequence[Heard], None]:
    """Some, each with text; when the block is left they have ended."""
    heard = [Heard() for _ in range(NUM_STREAMS)]
    async with anyio.create_task_group() as tasks:
        for one in heard:
            tasks.start_soon(hear, w, one, "!", num_tokens)
        for one in heard:
            await one.until(3)
        yield heard


def assert_whole(heard: Sequence[Heard], num_tokens: int = NUM_TOKENS) -> None:
    for one in heard:
        assert (one.text, one.errors, one.num_done) == (counted("!", num_tokens), [], 1)
        assert one.usage["completion_tokens"] == num_tokens


@pytest.mark.parametrize(
    "name",
    ["weur-decode", *(pytest.param(it, marks=pytest.mark.slow) for it in ("weur-front", "edge"))],
)
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
async def test_streams_end_whole_and_then_their_process(
    tmp_path: Path, name: str, number: int
) -> None:
    """Case 17: whichever process of theirs is told to stop; and it says at once that it is not
    ready, and not gone."""
    async with world(tmp_path, Shape(step_s=0.02)) as w:
        process = w.processes[name]
        async with streams(w) as heard:
            await told(process, number)
            assert await ready(process) == 503
        assert_whole(heard)
        assert await gone(process, GRACE_S) == 0
        if name != "edge":
            assert await metric(w, "edge", "edgefire_edge_failed_tries_total") == 0
        await again(w, name)
        await wait_served(w)
        await w.settled("weur-prefill", "weur-decode")
        await nothing_in_flight(w)


@pytest.mark.slow
async def test_all_told_at_once_end_what_has_begun(tmp_path: Path) -> None:
    """Case 17: as when a machine is shut down, and nobody minds the order."""
    async with world(tmp_path, Shape(step_s=0.02)) as w:
        async with streams(w) as heard:
            for process in w.processes.values():
                process.popen.send_signal(signal.SIGTERM)
        assert_whole(heard)
        for process in w.processes.values():
            assert await gone(process, GRACE_S) == 0, process.name


@pytest.mark.slow
async def test_unread_kv_is_served_after_its_worker_was_told_to_stop(tmp_path: Path) -> None:
    """Case 17: nothing is computed twice, and once the KV was read the worker goes."""
    async with world(tmp_path, Shape(step_s=0.01)) as w:
        prefill, decode = w.processes["weur-prefill"], w.processes["weur-decode"]
        heard = [Heard() for _ in range(4)]
        async with anyio.create_task_group() as tasks:
            decode.pause()
            for one in heard:
                tasks.start_soon(hear, w, one, "!", NUM_TOKENS)
            with anyio.fail_after(PATIENCE_S):
                while (await w.worker("weur-prefill")).held < len(heard):
                    await anyio.sleep(0.002)
            await told(prefill)
            assert (await w.worker("weur-prefill")).held == len(heard)
            decode.go_on()
        assert_whole(heard)
        assert await gone(prefill, GRACE_S) == 0
        assert await metric(w, "weur-front", "edgefire_front_second_tries_total") == 0
        await w.settled("weur-decode")
        await nothing_in_flight(w)


async def test_kv_that_nobody_reads_keeps_its_worker_for_its_lease(tmp_path: Path) -> None:
    """Case 17: and no longer, whatever the grace."""
    flags = ("--lease-s", "2", "--grace-s", "600")
    shape = Shape(roles=("prefill",), worker_flags=flags)
    async with worker_processes(tmp_path, shape) as made, linked(made, "weur-prefill") as prefill:
        asked = await request_to(made, "weur-prefill", num_prompt=20, max_tokens=5)
        process = made.processes["weur-prefill"]
        async with prefill.open(Prefill(asked)) as held:
            events = aiter(held)
            assert isinstance(await anext(events), Prefilled)
            await told(process)
            async with prefill.open(Prefill(asked)) as refused:
                refusal = await anext(aiter(refused))
            assert isinstance(refusal, wire.Fault)
            assert refusal.code is Code.DRAINING
            with anyio.fail_after(PATIENCE_S):
                ended = await anext(events)
            assert isinstance(ended, wire.Fault)
            assert ended.code is Code.LOST
        assert await gone(process, PATIENCE_S) == 0


@pytest.mark.slow
async def test_the_only_worker_refuses_what_is_new_with_a_time_to_come_back(
    tmp_path: Path,
) -> None:
    """Case 17: there is nobody else: 503, never a hang; what has begun ends."""
    async with world(tmp_path, Shape(roles=("both",), step_s=0.05)) as w:
        process = w.processes["weur-both"]
        async with streams(w) as heard:
            await told(process)
            for _ in range(5):
                with anyio.fail_after(PATIENCE_S):
                    refused = await w.raw("A", 5)
                assert await status_of(refused) == (503, 7009)
                assert int(refused.headers["retry-after"]) >= 1
            assert process.popen.poll() is None
        assert_whole(heard)
        assert await gone(process, GRACE_S) == 0
        await again(w, "weur-both")
        await wait_served(w)
        await w.settled("weur-both")
        await nothing_in_flight(w)


@pytest.mark.slow
async def test_while_one_of_two_regions_stops_the_other_serves(tmp_path: Path) -> None:
    """Case 17: from the first request on, and the breaker is left alone."""
    async with world(tmp_path, Shape(regions=("weur", "enam"), roles=("both",), step_s=0.02)) as w:
        front = w.processes["weur-front"]
        async with streams(w) as heard:
            front.popen.send_signal(signal.SIGTERM)
            for _ in range(10):
                with anyio.fail_after(PATIENCE_S):
                    answer = await w.raw("A", 5)
                assert answer.json()["result"]["response"] == "BCDEF"
            assert answer.headers["x-served-by"] == "enam"
            is_open = await metric(w, "edge", "edgefire_edge_region_breaker_open", region="weur")
            assert is_open == 0
        assert_whole(heard)
        assert await gone(front, GRACE_S) == 0


@pytest.mark.slow
async def test_an_edge_that_stops_takes_leave_of_its_clients(tmp_path: Path) -> None:
    """Case 17: who asks over a connection that is there, or over a new one, is told to go."""
    async with world(tmp_path, Shape(step_s=0.02)) as w:
        edge, kept = w.processes["edge"], httpx2.Limits(max_keepalive_connections=1)
        body = {"prompt": "A", "raw": True, "max_tokens": 5}
        slow = {"prompt": "!", "raw": True, "max_tokens": NUM_TOKENS}
        whole: list[httpx2.Response] = []

        async def ask() -> None:
            whole.append(await w.client.post(w.run_url(), json=slow, headers=w.headers()))

        async with httpx2.AsyncClient(timeout=60, limits=kept, trust_env=False) as client:
            first = await client.post(w.run_url(), json=body, headers=w.headers())
            assert first.status_code == 200
            assert "connection" not in first.headers
            async with streams(w, LONG) as heard, anyio.create_task_group() as tasks:
                tasks.start_soon(ask)
                with anyio.fail_after(PATIENCE_S):
                    while (await w.worker("weur-decode")).in_flight <= NUM_STREAMS:
                        await anyio.sleep(0.002)
                await told(edge)
                for _ in range(2):  # over the old connection, over a new one
                    refused = await client.post(w.run_url(), json=body, headers=w.headers())
                    assert await status_of(refused) == (503, 7009)
                    assert refused.headers["connection"] == "close"
                    assert int(refused.headers["retry-after"]) >= 1
        assert whole[0].json()["result"]["response"] == counted("!", NUM_TOKENS)
        assert whole[0].headers["connection"] == "close"
        assert_whole(heard, LONG)
        assert await gone(edge, GRACE_S) == 0
        await w.settled("weur-prefill", "weur-decode")


@pytest.mark.slow
@pytest.mark.parametrize("why", ["told again", pytest.param("grace over", marks=pytest.mark.slow)])
async def test_a_worker_that_is_cut_costs_no_token_where_there_is_another(
    tmp_path: Path, why: str
) -> None:
    """Case 17: the streams go on there, to the letter."""
    flags = ("--grace-s", "600" if why == "told again" else "0.5")
    shape = Shape(copies=2, step_s=0.05, worker_flags=flags)
    async with world(tmp_path, shape) as w:
        process = w.processes["weur-decode"]
        async with streams(w) as heard:
            assert (await w.worker("weur-decode")).in_flight
            await told(process)
            if why == "told again":
                process.popen.send_signal(signal.SIGTERM)
            assert await gone(process, CUT_S) == 0
        assert_whole(heard)
        assert await metric(w, "weur-front", "edgefire_front_second_tries_total") > 0
        await w.settled("weur-prefill", "weur-prefill-2", "weur-decode-2")
        await nothing_in_flight(w)


@pytest.mark.parametrize("why", ["told again", pytest.param("grace over", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["edge", pytest.param("weur-front", marks=pytest.mark.slow)])
async def test_streams_that_are_cut_end_in_one_error(tmp_path: Path, name: str, why: str) -> None:
    """Case 17: where nobody goes on with them; a whole answer is refused, with a time."""
    flags = ("--grace-s", "600" if why == "told again" else "0.5")
    shape = Shape(step_s=0.05, edge_flags=flags, front_flags=flags)
    async with world(tmp_path, shape) as w:
        process, whole = w.processes[name], list[httpx2.Response]()

        async def ask() -> None:
            whole.append(await w.raw("!", 500))

        async with streams(w, 500) as heard, anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            with anyio.fail_after(PATIENCE_S):
                while (await w.worker("weur-decode")).in_flight <= NUM_STREAMS:
                    await anyio.sleep(0.002)
            await told(process)
            if why == "told again":
                process.popen.send_signal(signal.SIGINT)
            assert await gone(process, CUT_S) == 0
        for one in heard:
            assert "please try again" in sse_error(one)
            assert one.num_done == 0
            assert counted("!", 500).startswith(one.text)
        assert await status_of(whole[0]) == (503, 7009)
        assert int(whole[0].headers["retry-after"]) >= 1
        await w.settled("weur-prefill", "weur-decode")


@dataclass
class Traffic:
    """Clients that ask one after the other, half of them for streams. All answers must be right."""

    w: World
    num_right: int = 0
    num_refused: int = 0  # by an edge that was being stopped, or not there: asked again
    told_at: float | None = None  # when the edge was told to stop
    over: bool = False

    @asynccontextmanager
    async def flowing(
        self, num_clients: int, *, patient: bool = False
    ) -> AsyncGenerator[None, None]:
        async with anyio.create_task_group() as tasks:
            for n in range(num_clients):
                tasks.start_soon(partial(self._client, n, patient=patient))
            await self.until(num_clients)
            yield
            await self.until(num_clients)
            self.over = True

    async def until(self, num_more: int) -> None:
        """Until so many more were answered."""
        enough = self.num_right + num_more
        with anyio.fail_after(PATIENCE_S):
            while self.num_right < enough:
                await anyio.sleep(0.01)

    async def _client(self, n: int, *, patient: bool) -> None:
        anew = httpx2.Limits(max_keepalive_connections=0)  # a connection for each request
        async with httpx2.AsyncClient(timeout=PATIENCE_S, limits=anew, trust_env=False) as http:
            while not self.over:
                if await self._answered(http, n):
                    self.num_right += 1
                else:
                    assert patient, "nobody was there"
                    self.num_refused += 1
                    await anyio.sleep(0.02)

    async def _answered(self, http: httpx2.AsyncClient, n: int) -> bool:
        """False: it was refused, before anything was begun."""
        prompt, num_tokens = "A" * n + "!", 20 + n
        body = {"prompt": prompt, "raw": True, "max_tokens": num_tokens, "stream": n % 2 == 0}
        began = monotonic()
        try:
            async with http.stream(
                "POST", self.w.run_url(), json=body, headers=self.w.headers()
            ) as response:
                if response.status_code == 503:
                    assert "retry-after" in response.headers
                    assert response.headers["connection"] == "close", await response.aread()
                    return False
                assert response.status_code == 200, await response.aread()
                if body["stream"]:
                    text, _, done = await read_all(response)
                    assert done
                else:
                    text = msgspec.json.decode(await response.aread())["result"]["response"]
        except httpx2.ConnectError:
            return False
        except httpx2.TransportError:
            # The kernel had made the connection, and the process had not taken it when it went.
            assert self.told_at is not None
            assert self.told_at < began
            return False
        assert text == counted(prompt, num_tokens)
        return True


@pytest.mark.slow
async def test_a_rolling_restart_under_load_fails_no_request(tmp_path: Path) -> None:
    """Case 17: every worker of a region in turn, then its front, with 8 requests at any time."""
    shape = Shape(regions=("weur", "enam"), copies=2, step_s=0.01)
    async with world(tmp_path, shape) as w:
        traffic = Traffic(w)
        async with traffic.flowing(8):
            for name in ("prefill", "prefill-2", "decode", "decode-2", "front"):
                process = w.processes[f"weur-{name}"]
                epoch = await epoch_of(w, process)
                await told(process)
                assert await gone(process, GRACE_S) == 0, name
                await traffic.until(8)
                await again(w, f"weur-{name}")
                assert await epoch_of(w, w.processes[f"weur-{name}"]) != epoch
                await wait_workers(w, "weur", 4)
                await traffic.until(8)
            with anyio.fail_after(PATIENCE_S):
                while (await w.raw("A", 1)).headers["x-served-by"] != "weur":
                    await anyio.sleep(0.05)
        for region in shape.regions:
            names = [f"{region}-{role}" for role in ("prefill", "decode", "prefill-2", "decode-2")]
            await w.settled(*names)
            await nothing_in_flight(w, region)


@pytest.mark.slow
async def test_a_restart_of_the_edge_fails_no_request_that_it_took(tmp_path: Path) -> None:
    """Case 17: who is refused asks again, and is answered by the next."""
    async with world(tmp_path, Shape(step_s=0.01)) as w:
        traffic = Traffic(w)
        async with traffic.flowing(8, patient=True):
            for _ in range(2):
                edge = w.processes["edge"]
                edge.popen.send_signal(signal.SIGTERM)
                traffic.told_at = monotonic()
                assert await gone(edge, GRACE_S) == 0
                await again(w, "edge")
                await traffic.until(16)
        assert traffic.num_refused
        await w.settled("weur-prefill", "weur-decode")
        await nothing_in_flight(w)


async def epoch_of(w: World, process: Process) -> str:
    report = await w.client.get(f"{process.url}/v1/report", headers=w.internal())
    return str(report.json()["epoch"])


async def wait_workers(w: World, region: str, num_workers: int) -> None:
    """Until the region's front would give work to so many."""
    with anyio.fail_after(PATIENCE_S):
        while await metric(w, f"{region}-front", "edgefire_front_worker_up") != num_workers:
            await anyio.sleep(0.02)
