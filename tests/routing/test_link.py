"""A link between two processes: streams in order, together in frames, hung up."""

from __future__ import annotations

import random

import anyio
import pytest
from starlette.types import Scope

from routing import wire
from routing.abort import PromptProtocol
from routing.errors import Code
from routing.link_frames import Pace
from tests.fakes.serving import serving
from tests.routing.links import Answerer, Ask, Heard, finish, linked


@pytest.mark.parametrize("num_streams", [1, 200, 1000])
async def test_every_stream_gets_all_of_its_tokens_in_order_and_no_others(num_streams: int) -> None:
    server = Answerer(pace=Pace())
    async with serving(server.app) as url, linked(url, pace=Pace()) as link:
        heard = [Heard() for _ in range(num_streams)]
        for number, sink in enumerate(heard):
            link.open_nowait(Ask(first=1000 * number, num_tokens=50 + number % 7), sink)
        for number, sink in enumerate(heard):
            assert await sink.wait() == finish(50 + number % 7)
            assert sink.ids == list(range(1000 * number, 1000 * number + 50 + number % 7))
        assert link.num_open == 0
        assert not server.running


async def test_what_cannot_be_written_at_once_is_said_by_a_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As for a client that is slow to read: what comes meanwhile waits, and joins it."""
    chance, write = random.Random(5), PromptProtocol._write_nowait
    said: list[bool] = []

    def sometimes(self: PromptProtocol, scope: Scope, data: bytes) -> bool:
        said.append(chance.random() < 0.5 and write(self, scope, data))
        return said[-1]

    monkeypatch.setattr(PromptProtocol, "_write_nowait", sometimes)
    server = Answerer(pace=Pace())
    async with serving(server.app) as url, linked(url, pace=Pace()) as link:
        heard = [Heard() for _ in range(50)]
        for number, sink in enumerate(heard):
            link.open_nowait(Ask(first=1000 * number, num_tokens=50), sink)
        for number, sink in enumerate(heard):
            assert await sink.wait() == finish(50)
            assert sink.ids == list(range(1000 * number, 1000 * number + 50))
    assert {True, False} == set(said)


async def test_what_all_streams_say_in_one_tick_is_one_frame() -> None:
    tick = anyio.Event()

    async def gate() -> None:
        await tick.wait()

    server = Answerer(pace=Pace(), gate=gate)
    async with serving(server.app) as url, linked(url, pace=Pace()) as link:
        heard = [Heard() for _ in range(100)]
        for number, sink in enumerate(heard):
            link.open_nowait(Ask(first=10 * number, num_tokens=1), sink)
        await server.wait_started(100)
        assert (link.stats.frames_sent, server.stats.frames_sent) == (1, 0)
        tick.set()
        for sink in heard:
            await sink.wait()
        assert (server.stats.frames_sent, link.stats.frames_received) == (1, 1)


async def test_requests_too_large_for_one_frame_go_in_several() -> None:
    server = Answerer(pace=Pace())
    async with serving(server.app) as url, linked(url, pace=Pace()) as link:
        heard = [Heard() for _ in range(20)]
        for number, sink in enumerate(heard):  # 100 MB in one tick: no server takes such a frame
            ask = Ask(first=10 * number, num_tokens=2, ballast=bytes(5_000_000))
            link.open_nowait(ask, sink)
        for number, sink in enumerate(heard):
            assert await sink.wait() == finish(2)
            assert sink.ids == [10 * number, 10 * number + 1]


async def test_hanging_up_cancels_the_answer_and_nothing_more_is_heard() -> None:
    server = Answerer()
    async with serving(server.app) as url, linked(url) as link:
        heard = Heard()
        call = link.open_nowait(Ask(first=0, num_tokens=3, then="hang"), heard)
        while len(heard.ids) < 3:
            await anyio.sleep(0.005)
        call.cancel()
        call.cancel()
        await server.wait_idle()
        assert server.cancelled == [0]
        assert (link.num_open, heard.ends) == (0, 0)


async def test_a_sink_may_hang_up_from_inside() -> None:
    server = Answerer()
    async with serving(server.app) as url, linked(url) as link:
        heard: list[wire.Event | None] = []

        def sink(event: wire.Event | None) -> None:
            heard.append(event)
            call.cancel()

        call = link.open_nowait(Ask(first=0, num_tokens=1000, then="hang"), sink)
        await server.wait_cancelled()
        assert heard == [wire.Tokens((0,))]


async def test_leaving_the_block_hangs_up() -> None:
    server = Answerer()
    async with serving(server.app) as url, linked(url) as link:
        async with link.open(Ask(first=0, num_tokens=1000, then="hang")) as events:
            async for event in events:
                assert event == wire.Tokens((0,))
                break
        await server.wait_idle()
        assert server.cancelled == [0]


async def test_a_reader_that_stops_holds_a_window_of_events_and_later_gets_every_token() -> None:
    server = Answerer(pace=Pace())
    async with serving(server.app) as url, linked(url, window=8) as link:
        async with link.open(Ask(first=0, num_tokens=5000)) as events:
            await server.wait_started(1)
            await server.wait_idle()  # it did not wait for the reader
            with anyio.fail_after(10):
                while len(events._events) < 8:  # type: ignore[attr-defined]
                    await anyio.sleep(0.005)
            read = [event async for event in events]
        tokens = [event for event in read if isinstance(event, wire.Tokens)]
        assert [i for event in tokens for i in event.ids] == list(range(5000))
        assert len(tokens) == 9  # the window, and all the rest in one
        assert read[-1] == finish(5000)
        assert link.num_open == 0


async def test_a_reader_that_never_reads_on_loses_its_stream() -> None:
    server = Answerer()
    async with serving(server.app) as url, linked(url, window=4) as link:
        async with link.open(Ask(first=0, num_tokens=100, then="hang")) as events:
            await server.wait_cancelled()
            read = [event async for event in events]
        assert [event.ids for event in read[:4]] == [(0,), (1,), (2,), (3,)]  # type: ignore[union-attr]
        assert isinstance(read[4], wire.Fault)
        assert read[4].code is Code.ABORTED
        assert len(read) == 5
