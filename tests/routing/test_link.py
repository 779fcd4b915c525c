"""Links over real sockets: who gets what, in what order, in how many frames, and what ends it."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import anyio
import httpx2
import msgspec
import pytest
from starlette.applications import Starlette
from starlette.types import Scope

from routing import wire
from routing.abort import PromptProtocol
from routing.errors import Code, Failure
from routing.link import Link
from routing.link_frames import LinkStats, Open, Pace
from routing.link_server import Stream, link_route
from routing.link_socket import Gone, Socket, dial
from routing.secret import bearer
from routing.serving import listening_socket
from tests.fakes.serving import serving

SECRET = "fleet-secret"
BRISK = Pace(beat_s=0.05, silence_s=0.5, stall_s=0.4)


class Ask(msgspec.Struct, frozen=True):
    """Send `num_tokens` tokens: first, first + 1, ..."""

    first: int
    num_tokens: int
    then: str = "finish"  # or: fail, break, hang
    ballast: bytes = b""


class Answerer:
    """A server that counts, and knows which of its streams are still being answered."""

    def __init__(self, *, pace: Pace = BRISK, gate: Callable[[], Any] | None = None) -> None:
        self.running: set[int] = set()
        self.started = 0
        self.cancelled: list[int] = []
        self.stats = LinkStats()
        self.gate = gate or anyio.lowlevel.checkpoint
        route = link_route(self.answer, requests=Ask, secret=SECRET, pace=pace, stats=self.stats)
        self.app = Starlette(routes=[route], lifespan=None)

    async def answer(self, stream: Stream[Ask, wire.Event]) -> None:
        ask = stream.request
        self.running.add(ask.first)
        self.started += 1
        try:
            for token_id in range(ask.first, ask.first + ask.num_tokens):
                await self.gate()
                stream.send(wire.Tokens((token_id,)))
            if ask.then == "hang":
                await anyio.sleep_forever()
            if ask.then == "fail":
                raise Failure(Code.NO_CAPACITY, "full", retry_after_s=2.5)
            if ask.then == "break":
                raise ZeroDivisionError("a bug")
            stream.send(finish(ask.num_tokens))
        except anyio.get_cancelled_exc_class():
            self.cancelled.append(ask.first)
            raise
        finally:
            self.running.remove(ask.first)

    async def wait_started(self, num_streams: int) -> None:
        with anyio.fail_after(10):
            while self.started < num_streams:
                await anyio.sleep(0.005)

    async def wait_cancelled(self) -> None:
        with anyio.fail_after(10):
            while not self.cancelled:
                await anyio.sleep(0.005)

    async def wait_idle(self) -> None:
        with anyio.fail_after(10):
            while self.running:
                await anyio.sleep(0.005)


async def read_until_gone(socket: Socket) -> NoReturn:
    await socket.read(lambda message: None)
    raise AssertionError("reading ends with Gone")


def finish(num_tokens: int) -> wire.Finish:
    return wire.Finish("stop", wire.Usage(prompt_tokens=1, completion_tokens=num_tokens))


@asynccontextmanager
async def linked(url: str, **options: Any) -> AsyncGenerator[Link[wire.Event], None]:
    options.setdefault("pace", BRISK)
    link: Link[wire.Event] = Link(url, SECRET, wire.Event, **options)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(link.run)
        with anyio.fail_after(10):
            await link.wait_connected()
        yield link
        tasks.cancel_scope.cancel()


@dataclass
class Heard:
    """A sink that keeps what it gets."""

    events: list[wire.Event] = field(default_factory=list)
    ends: int = 0
    over: anyio.Event = field(default_factory=anyio.Event)

    def __call__(self, event: wire.Event | None) -> None:
        assert not self.ends, "nothing comes after the end"
        if event is None:
            self.ends += 1
            self.over.set()
        else:
            self.events.append(event)

    @property
    def ids(self) -> list[int]:
        return [i for event in self.events if isinstance(event, wire.Tokens) for i in event.ids]

    async def wait(self) -> wire.Event:
        with anyio.fail_after(30):
            await self.over.wait()
        return self.events[-1]


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


async def test_a_failure_is_told_as_it_is_and_a_bug_as_internal() -> None:
    server = Answerer()
    async with serving(server.app) as url, linked(url) as link:
        failed, broke, fine = Heard(), Heard(), Heard()
        link.open_nowait(Ask(first=0, num_tokens=1, then="fail"), failed)
        link.open_nowait(Ask(first=10, num_tokens=1, then="break"), broke)
        link.open_nowait(Ask(first=20, num_tokens=1), fine)
        assert await failed.wait() == wire.Fault(Code.NO_CAPACITY, "full", 2.5)
        last = await broke.wait()
        assert isinstance(last, wire.Fault)
        assert last.code is Code.INTERNAL
        assert "division" not in last.detail
        assert await fine.wait() == finish(1)


async def test_a_sink_with_a_bug_loses_its_own_stream_only() -> None:
    server = Answerer()

    heard: list[wire.Event | None] = []

    def sink(event: wire.Event | None) -> None:
        heard.append(event)
        raise ZeroDivisionError

    async with serving(server.app) as url, linked(url) as link:
        fine = Heard()
        link.open_nowait(Ask(first=0, num_tokens=1, then="hang"), sink)
        link.open_nowait(Ask(first=10, num_tokens=100), fine)
        assert await fine.wait() == finish(100)
        await server.wait_cancelled()
        assert server.cancelled == [0]
    assert heard == [wire.Tokens((0,)), None]  # whoever waits for its end need not wait for ever


async def test_columns_of_unequal_length_lose_the_link() -> None:
    link: Link[wire.Event] = Link("http://nowhere", SECRET, wire.Event)
    with pytest.raises(Gone, match="1 tokens of 2 streams"):
        link._decoded(msgspec.msgpack.encode([[1, 2], [3], []]))


@pytest.mark.parametrize("headers", [{}, bearer("another"), {"authorization": SECRET}])
async def test_without_the_secret_the_upgrade_is_refused_with_401(headers: dict[str, str]) -> None:
    async with serving(Answerer().app) as url, httpx2.AsyncClient() as client:
        upgrade = {
            "connection": "upgrade",
            "upgrade": "websocket",
            "sec-websocket-version": "13",
            "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==",
        }
        response = await client.get(f"{url}/v1/link", headers=upgrade | headers)
        assert response.status_code == 401
        with pytest.raises(Gone, match="401"):
            async with dial(f"{url}/v1/link", headers):
                pass


async def test_opening_without_a_connection_is_a_failure() -> None:
    link: Link[wire.Event] = Link("http://127.0.0.1:9", SECRET, wire.Event)
    with pytest.raises(Failure) as caught:
        link.open_nowait(Ask(first=0, num_tokens=1), Heard())
    assert caught.value.code is Code.LOST
    assert link.num_open == 0


async def test_when_the_client_goes_its_answers_are_cancelled() -> None:
    server = Answerer()
    async with serving(server.app) as url:
        heard = [Heard() for _ in range(20)]
        async with linked(url) as link:
            for number, sink in enumerate(heard):
                link.open_nowait(Ask(first=number, num_tokens=1, then="hang"), sink)
            await server.wait_started(20)
        await server.wait_idle()
        assert sorted(server.cancelled) == list(range(20))
        for sink in heard:  # and this end was told as well
            assert isinstance(await sink.wait(), wire.Fault)


async def test_when_the_server_goes_every_sink_hears_so_and_the_link_comes_back() -> None:
    listener = listening_socket("127.0.0.1", 0)
    port = listener.getsockname()[1]
    first, second = Answerer(), Answerer()
    heard = [Heard() for _ in range(20)]
    async with anyio.create_task_group() as tasks:
        async with serving(first.app, listener) as url:
            link: Link[wire.Event] = Link(url, SECRET, wire.Event, pace=BRISK)
            tasks.start_soon(link.run)
            await link.wait_connected()
            for number, sink in enumerate(heard):
                link.open_nowait(Ask(first=number, num_tokens=1, then="hang"), sink)
            await first.wait_started(20)
        for sink in heard:
            last = await sink.wait()
            assert isinstance(last, wire.Fault)
            assert last.code is Code.LOST
            assert sink.ends == 1
        assert (link.connected, link.num_open) == (False, 0)
        async with serving(second.app, listening_socket("127.0.0.1", port)):
            with anyio.fail_after(10):
                await link.wait_connected()
            again = Heard()
            link.open_nowait(Ask(first=0, num_tokens=5), again)
            assert await again.wait() == finish(5)
        tasks.cancel_scope.cancel()


async def test_a_sink_that_asks_again_when_it_loses_its_stream_is_told_that_nobody_is_there() -> (
    None
):
    server = Answerer()
    codes = []

    def sink(event: wire.Event | None) -> None:
        if isinstance(event, wire.Fault):
            with pytest.raises(Failure) as caught:
                link.open_nowait(Ask(first=1, num_tokens=1), sink)
            codes.append(caught.value.code)

    async with serving(server.app) as url, linked(url) as link:
        link.open_nowait(Ask(first=0, num_tokens=1, then="hang"), sink)
        await server.wait_started(1)
    assert codes == [Code.LOST]


async def test_a_client_that_falls_silent_loses_its_streams() -> None:
    """As when its process is stopped: the connection stays up, and nothing is read from it."""
    server = Answerer()
    async with serving(server.app) as url, dial(f"{url}/v1/link", bearer(SECRET)) as silent:
        opened = [
            (0, number, 2**30, Ask(first=10**7 * number, num_tokens=0, then="hang"))
            for number in range(9)
        ]
        await silent.send(msgspec.msgpack.encode(opened))
        await server.wait_started(9)
        await server.wait_idle()
        assert len(server.cancelled) == 9


async def test_a_server_that_falls_silent_is_given_up() -> None:
    """As when its process is stopped: the kernel still takes what is sent."""
    quiet = link_route(
        Answerer().answer, requests=Ask, secret=SECRET, pace=Pace(beat_s=1000, stall_s=10**6)
    )
    async with serving(Starlette(routes=[quiet])) as url, linked(url) as link:
        heard = Heard()
        link.open_nowait(Ask(first=0, num_tokens=1, then="hang"), heard)
        last = await heard.wait()
        assert isinstance(last, wire.Fault)
        assert last.code is Code.LOST
        assert "silent" in last.detail


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"not msgpack",
        msgspec.msgpack.encode({"id": 1}),
        msgspec.msgpack.encode([[0, 1, 2, "?"]]),
    ],
)
async def test_a_malformed_frame_closes_its_connection_and_no_other(frame: bytes) -> None:
    server = Answerer()
    async with serving(server.app) as url, linked(url) as link:
        heard = Heard()
        link.open_nowait(Ask(first=0, num_tokens=1, then="hang"), heard)
        async with dial(f"{url}/v1/link", bearer(SECRET)) as odd:
            await odd.send(frame)
            with anyio.fail_after(10), pytest.raises(Gone):
                await read_until_gone(odd)
        assert link.connected
        assert server.running == {0}


async def test_a_malformed_frame_from_the_server_loses_the_link_with_its_reason() -> None:
    async def answer(stream: Stream[Ask, Any]) -> None:
        stream.send(Ask(first=0, num_tokens=0))  # no event of ours
        await anyio.sleep_forever()

    route = link_route(answer, requests=Ask, secret=SECRET)
    async with serving(Starlette(routes=[route])) as url, linked(url) as link:
        heard = Heard()
        link.open_nowait(Ask(first=0, num_tokens=1), heard)
        last = await heard.wait()
        assert isinstance(last, wire.Fault)
        assert "malformed" in last.detail


async def test_something_else_at_the_address_is_no_link() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/link"
        async with anyio.create_task_group() as tasks:

            async def talk_nonsense() -> None:
                taken, _ = await anyio.to_thread.run_sync(listener.accept)
                with taken:
                    taken.sendall(b"220 mail.example ESMTP\r\n")

            tasks.start_soon(talk_nonsense)
            with pytest.raises(Gone):
                async with dial(url, {}):
                    pass


@pytest.mark.parametrize("seed", range(3))
async def test_no_stream_is_left_behind_whatever_is_opened_sent_and_hung_up(seed: int) -> None:
    rng = random.Random(seed)
    server = Answerer(pace=Pace())
    async with serving(server.app) as url, linked(url, window=rng.choice([1, 3, 32])) as link:
        calls, sinks, expected = {}, {}, {}
        for number in range(300):
            act = rng.random()
            if act < 0.6:
                first, num_tokens = 100_000 * number, rng.randrange(0, 80)
                then = rng.choice(["finish", "finish", "fail", "hang"])
                sinks[number] = Heard()
                expected[number] = (first, num_tokens, then)
                calls[number] = link.open_nowait(Ask(first, num_tokens, then), sinks[number])
            elif act < 0.85 and calls:
                calls.pop(rng.choice(list(calls))).cancel()
            else:
                await anyio.sleep(rng.choice([0, 0, 0.002]))
        for number, call in list(calls.items()):
            first, num_tokens, then = expected[number]
            if then == "hang":
                call.cancel()
            else:
                await sinks[number].wait()
                assert sinks[number].ids == list(range(first, first + num_tokens))
        for number, sink in sinks.items():  # also what was hung up got only its own, in order
            first = expected[number][0]
            assert sink.ids == list(range(first, first + len(sink.ids)))
            assert sink.ends <= 1
        await server.wait_idle()
        assert link.num_open == 0


async def test_a_stream_is_open_until_its_last_word_has_gone_out() -> None:
    """Not only until it was said: its reader may be behind."""
    server = Answerer(pace=Pace())
    async with serving(server.app) as url, linked(url, pace=Pace(), window=1) as link:
        async with link.open(Ask(100, 5)) as events:
            await server.wait_started(1)
            await server.wait_idle()
            assert server.stats.num_open == 1
            assert [event async for event in events][-1] == finish(5)
            assert server.stats.num_open == 0
        async with link.open(Ask(200, 5, then="hang")):
            await server.wait_started(2)
            assert server.stats.num_open == 1
        await server.wait_cancelled()
        assert server.stats.num_open == 0
        async with dial(f"{url}/v1/link", bearer(SECRET)) as other:
            act = Open(7, 32, Ask(300, 1, then="hang"))
            await other.send(msgspec.msgpack.encode([act]))
            await server.wait_started(3)
            assert server.stats.num_open == 1
        with anyio.fail_after(10):
            while server.stats.num_open:
                await anyio.sleep(0.005)


async def test_a_lasting_stream_is_no_work() -> None:
    stats, begun = LinkStats(), anyio.Event()

    async def last(stream: Stream[Ask, wire.Event]) -> None:
        begun.set()
        await anyio.sleep_forever()

    route = link_route(last, requests=Ask, secret=SECRET, pace=BRISK, stats=stats, lasting=Ask)
    app = Starlette(routes=[route])
    async with serving(app) as url, linked(url) as link, link.open(Ask(1, 1)):
        await begun.wait()
        assert stats.num_open == 0
