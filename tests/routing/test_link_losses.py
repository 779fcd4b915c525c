"""A link whose other end fails, falls silent, goes or talks nonsense."""

from __future__ import annotations

import random
import socket
from typing import Any, NoReturn

import anyio
import httpx2
import msgspec
import pytest
from starlette.applications import Starlette

from routing import wire
from routing.errors import Code, Failure
from routing.link import Link
from routing.link_frames import LinkStats, Open, Pace
from routing.link_server import Stream, link_route
from routing.link_socket import Gone, Socket, dial
from routing.secret import bearer
from routing.serving import listening_socket
from tests.fakes.serving import serving
from tests.routing.links import BRISK, SECRET, Answerer, Ask, Heard, finish, linked


async def read_until_gone(socket: Socket) -> NoReturn:
    await socket.read(lambda message: None)
    raise AssertionError("reading ends with Gone")


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
