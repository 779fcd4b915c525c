"""A link's client against servers that say things as no server of ours does, but may."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio
import pytest
from anyio.abc import SocketStream
from websockets.frames import Close, Frame, Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol

from routing.link_bytes import message_frame
from routing.link_socket import Gone, dial
from routing.serving import MAX_FRAME_BYTES, listening_socket
from routing.serving import address as url_of


class Server:
    """Shakes hands with one client, and says what it is told to along with that."""

    def __init__(self, at_once: bytes) -> None:
        self.client: SocketStream
        self.ready = anyio.Event()
        self._at_once = at_once

    async def serve(self, client: SocketStream) -> None:
        protocol = ServerProtocol()
        events: list[object] = []
        while not events:
            protocol.receive_data(await client.receive())
            events += protocol.events_received()
        assert isinstance(events[0], Request)
        protocol.send_response(protocol.accept(events[0]))
        await client.send(b"".join(protocol.data_to_send()) + self._at_once)
        self.client = client
        self.ready.set()
        async with client:
            await anyio.sleep_forever()


@asynccontextmanager
async def served(at_once: bytes = b"") -> AsyncGenerator[tuple[str, Server], None]:
    server = Server(at_once)
    with listening_socket("127.0.0.1", 0) as probe:
        url = url_of(probe)
    listener = await anyio.create_tcp_listener(
        local_host="127.0.0.1", local_port=int(url.rpartition(":")[2]), family=socket.AF_INET
    )
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, server.serve)
        with anyio.fail_after(20):
            yield url, server
        tasks.cancel_scope.cancel()


def frame(opcode: Opcode, data: bytes, *, fin: bool = True) -> bytes:
    return Frame(opcode, data, fin=fin).serialize(mask=False)


CLOSE = frame(Opcode.CLOSE, Close(1001, "").serialize())
MESSAGES = [b"", b"a", bytes(125), bytes(126), b"b" * 70_000, b"c"]
PARTS = frame(Opcode.BINARY, b"in ", fin=False) + frame(Opcode.CONT, b"parts")
ALL = b"".join(map(message_frame, MESSAGES)) + PARTS + message_frame(b"last")
HEARD = [*MESSAGES, b"in parts", b"last"]


async def heard_until_gone(url: str, server: Server, said: bytes) -> tuple[list[bytes], str]:
    """What is heard when the server says this after the handshake, and why it ended."""
    heard: list[bytes] = []
    async with dial(url, {}) as client:
        await server.ready.wait()
        await server.client.send(said)
        with pytest.raises(Gone) as caught:
            await client.read(heard.append)
    return heard, str(caught.value)


async def test_what_comes_along_with_the_handshake_is_heard() -> None:
    async with served(ALL) as (url, server):
        heard, why = await heard_until_gone(url, server, CLOSE)
    assert heard == HEARD
    assert why.startswith("closed by the peer: 1001")


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 2**20])
async def test_messages_are_heard_however_they_are_cut(size: int) -> None:
    said = ALL + CLOSE if size > 3 else b"".join(map(message_frame, [b"", b"ab"])) + PARTS + CLOSE
    heard: list[bytes] = []
    async with served() as (url, server), dial(url, {}) as client:
        await server.ready.wait()

        async def say() -> None:
            for at in range(0, len(said), size):
                await server.client.send(said[at : at + size])
                await anyio.sleep(0.001)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(say)
            with pytest.raises(Gone, match="1001"):
                await client.read(heard.append)
    assert heard == (HEARD if size > 3 else [b"", b"ab", b"in parts"])


async def test_a_ping_is_answered() -> None:
    async with served(message_frame(b"1") + frame(Opcode.PING, b"are you there")) as (url, server):
        async with dial(url, {}):
            await server.ready.wait()
            server_side = ServerProtocol()
            pong = await server.client.receive()
        assert pong[0] == 0x80 | Opcode.PONG
        assert len(pong) == 2 + 4 + len(b"are you there")
        assert server_side.close_code is None


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"\x82\x81abcde", "masked"),
        (b"\xc2\x01a", "not a WebSocket"),
        (b"\x82\x7f" + (MAX_FRAME_BYTES + 1).to_bytes(8, "big"), f"{MAX_FRAME_BYTES + 1} bytes"),
        (frame(Opcode.CONT, b"of nothing"), "not a WebSocket"),
        (frame(Opcode.BINARY, b"", fin=False) + message_frame(b"in between"), "not a WebSocket"),
    ],
)
async def test_what_no_server_may_say_ends_it(said: bytes, why: str) -> None:
    async with served() as (url, server):
        heard, reason = await heard_until_gone(url, server, said)
    assert heard == []
    assert why in reason


async def test_who_hears_may_end_it() -> None:
    def hear(message: bytes) -> None:
        raise Gone("enough")

    async with served() as (url, server), dial(url, {}) as client:
        await server.ready.wait()
        await server.client.send(message_frame(b"1"))
        with pytest.raises(Gone, match="enough"):
            await client.read(hear)
        with pytest.raises(Gone, match="enough"):
            await client.send(b"2")


async def test_a_server_that_hangs_up_is_gone() -> None:
    async with served() as (url, server), dial(url, {}) as client:
        await server.ready.wait()
        await server.client.aclose()
        with pytest.raises(Gone, match=r"closed by the peer|broke"):
            await client.read(lambda message: None)


async def test_a_host_without_address_is_gone() -> None:
    with pytest.raises(Gone, match="cannot find"):
        async with dial("http://no-such-host.invalid/v1/link", {}):
            pass
