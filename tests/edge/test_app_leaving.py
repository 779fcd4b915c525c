"""Clients that leave, and clients that stop reading: real connections, and what the region sees."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import anyio
import msgspec
import pytest
from anyio.abc import SocketStream

from routing import wire
from tests.fakes.counting_region import CountingRegion, Steps
from tests.fakes.edge_client import EdgeClient, edge_over
from tests.fakes.events import read_all

ENDED = "edgefire_edge_requests_total"


def body(*, stream: bool, max_tokens: int = 50) -> bytes:
    asked = {"prompt": "!", "raw": True, "stream": stream, "max_tokens": max_tokens}
    return msgspec.json.encode(asked)


async def read_to_the_end(stream: SocketStream) -> int:
    """Bytes that still came before the connection was found cut."""
    count = 0
    with suppress(anyio.BrokenResourceError, anyio.EndOfStream):
        while True:
            count += len(await stream.receive())
    return count


async def until_waiting_at(steps: Steps, index: int) -> None:
    with anyio.fail_after(10):
        while steps.waiting_at != index:
            await anyio.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["queue", "prefill", "decode"])
async def test_hanging_up_is_cancel_at_every_phase(
    edge: EdgeClient, region: CountingRegion, phase: str, stream: bool
) -> None:
    """The region waits for ever unless it is told; afterwards it answers nobody."""
    steps = Steps(allowed=3 if phase == "decode" else 0)
    if phase == "queue":
        region.started_gate = steps
    else:
        region.gate = steps
    async with await edge.connect(body(stream=stream)):
        await until_waiting_at(steps, 3 if phase == "decode" else 0)
        assert region.num_open == 1
    await region.wait_idle()
    await edge.wait_metric(ENDED, 1, outcome="hung_up")
    assert await edge.metric("edgefire_edge_in_flight") == 0


async def test_leaving_before_the_body_is_whole(edge: EdgeClient, region: CountingRegion) -> None:
    async with await edge.connect(b"{", content_length=100):
        pass
    await edge.wait_metric(ENDED, 1, outcome="aborted")
    assert region.asked == []


async def test_a_neighbour_is_not_disturbed(edge: EdgeClient, region: CountingRegion) -> None:
    region.gate = steps = Steps(allowed=2)
    async with edge.stream("A", 6) as response:
        async with await edge.connect(body(stream=True)):
            await region.wait_asked(2)
        with anyio.fail_after(10):
            while region.num_open > 1:
                await anyio.sleep(0.005)
        steps.allow(100)
        text = (await response.aread()).decode()
    assert text.count('"response"') == 7
    assert text.endswith("data: [DONE]\n\n")


async def test_a_stop_string_hangs_up_on_the_region(
    edge: EdgeClient, region: CountingRegion
) -> None:
    region.gate = Steps(allowed=5)  # of 50: the region would wait for ever
    answer = await edge.raw("A", 50, stop=["DE"])
    assert answer.json()["result"]["response"] == "BC"
    await region.wait_idle()


async def test_a_client_that_takes_nothing_is_hung_up_on(
    tmp_path: Path, region: CountingRegion
) -> None:
    """Its stream blocks on full socket buffers; the other one goes on all the while."""

    async def step(request: wire.Generate, index: int) -> None:
        await anyio.sleep(0.001)  # as an engine's: what comes all at once is merged into one write

    region.window, region.burst, region.gate = 1_000_000, 500, step
    asked = body(stream=True, max_tokens=900_000)  # 2 MB of events
    async with (
        edge_over(tmp_path, [region.region], send_bytes=8192, stalled_reader_s=0.5) as edge,
        await edge.connect(asked, receive_bytes=4096) as stream,
    ):
        await region.wait_asked()
        assert (await edge.raw("A", 5)).json()["result"]["response"] == "BCDEF"
        await edge.wait_metric(ENDED, 1, outcome="stalled")
        await region.wait_idle()
        assert await read_to_the_end(stream) < 1_000_000


async def test_the_second_request_on_a_connection_waits_its_turn(
    edge: EdgeClient, region: CountingRegion
) -> None:
    """Sent while the first answer is streamed; nothing of one gets into the other."""
    region.gate = steps = Steps(allowed=2)
    asked = body(stream=True, max_tokens=6)
    async with await edge.connect(asked) as stream:
        await until_waiting_at(steps, 2)
        head = f"POST {edge.run_url.removeprefix(edge.url)} HTTP/1.1\r\nhost: edge\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in edge.headers().items())
        await stream.send(f"{head}content-length: {len(asked)}\r\n\r\n".encode() + asked)
        for allowed in range(3, 7):
            steps.allow(allowed)
            if allowed < 6:
                await until_waiting_at(steps, allowed)
        told = b""
        with anyio.fail_after(10):
            while told.count(b"[DONE]") < 2:
                told += await stream.receive()
    first, second = told.split(b"HTTP/1.1 200 OK")[1:]
    for answer in (first, second):
        parts = [line for line in answer.splitlines() if line.startswith(b'data: {"response":')]
        texts = [msgspec.json.decode(part.removeprefix(b"data: "))["response"] for part in parts]
        assert "".join(texts) == "\"#$%&'"


@pytest.mark.parametrize("stops", [[], ["DE"], ["EX", "DEF"]])
async def test_token_by_token_or_at_once_the_answer_is_the_same(
    edge: EdgeClient, region: CountingRegion, stops: list[str]
) -> None:
    whole = (await edge.raw("A", 6, stop=stops)).json()["result"]
    region.gate = steps = Steps(allowed=1)  # the status comes with the first text
    async with edge.stream("A", 6, stop=stops) as response:
        for allowed in range(2, 7):
            with anyio.fail_after(10):
                while steps.waiting_at != allowed - 1 and region.num_open:
                    await anyio.sleep(0.005)
            steps.allow(allowed)
        text, usage, done = await read_all(response)
    assert (text, done) == (whole["response"], True)
    assert usage == whole["usage"]


async def test_hang_ups_leave_no_task_and_no_connection(
    edge: EdgeClient, region: CountingRegion
) -> None:
    region.gate = steps = Steps(allowed=1)
    for _ in range(100):
        async with await edge.connect(body(stream=True)):
            pass
    with anyio.fail_after(20):
        while await edge.metric(ENDED) < 100 or region.num_open:
            await anyio.sleep(0.01)
    assert await edge.metric("edgefire_edge_in_flight") == 0
    steps.allow(10)
    assert (await edge.raw("A", 5)).json()["result"]["response"] == "BCDEF"
