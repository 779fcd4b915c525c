"""Clients that leave, come in masses, or stop reading."""

from __future__ import annotations

import random
import socket
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

import anyio
import httpx2
import msgspec
import pytest

from tests.system.faults import PATIENCE_S, Heard, hear, metric, nothing_in_flight, wait_metric
from tests.system.world import MODEL, Shape, World, counted, world

pytestmark = pytest.mark.system
WORKERS = ("weur-prefill", "weur-decode")
ENDED = "edgefire_edge_requests_total"


async def test_a_client_that_leaves_is_counted_once_and_its_work_ends(tmp_path: Path) -> None:
    """Case 13: the socket closed before the first token and amid them; a few steps later nobody
    computes, and every gauge on the way is back."""
    shape = Shape(step_s=0.05, worker_flags=("--max-step-tokens", "64"))
    async with world(tmp_path, shape) as w:
        for count, (ask, busy, prompt) in enumerate(PHASES, start=1):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ask, w, Heard(), prompt, 80)
                with anyio.fail_after(PATIENCE_S):
                    while not await metric(w, busy, "edgefire_engine_running"):
                        await anyio.sleep(0.002)
                tasks.cancel_scope.cancel()
            left = await steps(w)
            await w.settled(*WORKERS)
            assert await steps(w) - left <= 2 * 5  # what was under way at both, and a word
            await nothing_in_flight(w)
            assert await metric(w, "edge", ENDED, outcome="hung_up") == count
            assert await metric(w, "edge", ENDED) == count
            front = "edgefire_front_requests_total"
            assert await metric(w, "weur-front", front, outcome="aborted") == count
            assert await metric(w, "weur-front", front) == count


async def whole(w: World, heard: Heard, prompt: str, max_tokens: int) -> None:
    heard.status = (await w.raw(prompt, max_tokens)).status_code


LONG = "A" * 6 * 64 + "!"  # prefilled in seven steps
PHASES = [
    (hear, "weur-prefill", LONG),
    (whole, "weur-prefill", LONG),
    (hear, "weur-decode", "!"),
    (whole, "weur-decode", "!"),
]


async def steps(w: World) -> float:
    names = ("edgefire_engine_output_tokens_total", "edgefire_engine_prompt_tokens_computed_total")
    output, prompt = [sum([await metric(w, it, name) for it in WORKERS]) for name in names]
    return output + prompt / 64


@pytest.mark.parametrize(
    "num_requests",
    [1000, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])],
)
async def test_cancel_churn_leaks_no_slot(tmp_path: Path, num_requests: int) -> None:
    """Case 15: requests given up after random short times, 10 at a time; then all is as before."""
    shape = Shape(step_s=0.001, worker_flags=("--kv-tokens", "65536"))
    async with world(tmp_path, shape) as w:
        chance = random.Random(15)
        patience_s = iter([chance.uniform(0.0, 0.03) for _ in range(num_requests)])
        kinds = iter([chance.random() < 0.5 for _ in range(num_requests)])

        async def give_up_again_and_again() -> None:
            async with httpx2.AsyncClient(timeout=60, trust_env=False) as client:
                for limit_s in patience_s:
                    body = {"prompt": "!", "raw": True, "max_tokens": 20, "stream": next(kinds)}
                    with anyio.move_on_after(limit_s):
                        await client.post(w.run_url(), json=body, headers=w.headers())

        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(give_up_again_and_again)
        await nothing_in_flight(w)
        await w.settled(*WORKERS)
        assert await metric(w, "edge", ENDED, outcome="hung_up") > num_requests / 10
        async with httpx2.AsyncClient(timeout=PATIENCE_S, trust_env=False) as client:
            body = {"prompt": "A", "raw": True, "max_tokens": 5}
            for _ in range(20):
                answer = await client.post(w.run_url(), json=body, headers=w.headers())
                assert answer.json()["result"]["response"] == "BCDEF"
        await w.settled(*WORKERS)
        assert await metric(w, "edge", "edgefire_edge_failed_tries_total") == 0


async def test_a_reader_that_stops_holds_up_nobody(tmp_path: Path) -> None:
    """Case 16: 20 clients that never read; a neighbour's answer comes, and when they are gone
    nothing is left."""
    flags = ("--kv-tokens", "262144", "--max-step-tokens", "4096")
    async with world(tmp_path, Shape(worker_flags=flags)) as w:
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                await tasks.start(never_read, w)
            for _ in range(10):
                heard = Heard()
                with anyio.fail_after(PATIENCE_S):
                    await hear(w, heard, "!", 60)
                assert (heard.text, heard.num_done) == (counted("!", 60), 1)
            tasks.cancel_scope.cancel()
        await nothing_in_flight(w)
        await w.settled(*WORKERS, within_s=PATIENCE_S)


@pytest.mark.slow
async def test_a_reader_that_has_stopped_for_too_long_is_hung_up_on(tmp_path: Path) -> None:
    """Case 16: its idle time over, all that it held is free, though it never closes."""
    shape = Shape(
        worker_flags=("--kv-tokens", "262144", "--max-step-tokens", "4096"),
        edge_flags=("--stalled-reader-s", "1"),
    )
    async with world(tmp_path, shape) as w, anyio.create_task_group() as tasks:
        # Some 2 kB a token: what both kernels take of a stream would hold a short one.
        fields = {"model": MODEL, "messages": [{"role": "user", "content": "!"}]}
        fields |= {"logprobs": True, "top_logprobs": 20}
        for _ in range(20):
            await tasks.start(never_read, w, w.v1_url(), fields)
        heard = Heard()
        await hear(w, heard, "!", 60)
        assert (heard.text, heard.num_done) == (counted("!", 60), 1)
        await wait_metric(w, "edge", ENDED, 20, outcome="stalled")
        await nothing_in_flight(w)
        await w.settled(*WORKERS)
        tasks.cancel_scope.cancel()


async def never_read(
    w: World,
    url: str = "",
    more: Mapping[str, object] = MappingProxyType({"prompt": "!", "raw": True}),
    *,
    task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Ask for a stream of 8,000 tokens, and take what a small socket buffer takes of it.

    By a bare socket: one of an event loop is read whether anybody asks for it or not.
    """
    fields = {"max_tokens": 8000, "stream": True, "ignore_eos": True, **more}
    body = msgspec.json.encode(fields)
    lines = [f"POST {urlsplit(url or w.run_url()).path} HTTP/1.1", "host: edge"]
    lines += [f"{name}: {value}" for name, value in w.headers().items()]
    lines += [f"content-length: {len(body)}", "", ""]
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        parts = urlsplit(w.edge.url)
        sock.connect((parts.hostname, parts.port))
        sock.sendall("\r\n".join(lines).encode() + body)
        task_status.started()
        await anyio.sleep_forever()


async def test_gauges_are_back_after_a_mixed_crowd(tmp_path: Path) -> None:
    """Case 13: clients that stay and clients that leave, at once: who stays has the right text."""
    flags = ("--kv-tokens", "65536")
    async with world(tmp_path, Shape(step_s=0.005, worker_flags=flags)) as w:
        stay = [Heard() for _ in range(30)]

        async def leave(after: int) -> None:
            heard = Heard()
            async with anyio.create_task_group() as group:
                group.start_soon(hear, w, heard, "!", 90)
                await heard.until(after)
                group.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            for n, heard in enumerate(stay):
                tasks.start_soon(hear, w, heard, chr(33 + n), 60)
                tasks.start_soon(leave, n + 1)
        for n, heard in enumerate(stay):
            assert (heard.text, heard.num_done) == (counted(chr(33 + n), 60), 1)
        await nothing_in_flight(w)
        await w.settled(*WORKERS)
        await wait_metric(w, "edge", ENDED, 30, outcome="ok")
        assert await metric(w, "edge", ENDED) == 60
