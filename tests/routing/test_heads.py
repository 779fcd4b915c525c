"""What a server process takes of clients that have not asked anything yet, over real sockets."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio
import pytest
from anyio.abc import SocketStream
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from routing import heads
from tests.fakes.serving import serving

PART = b"x" * 65_536


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(await request.body())


async def wait(socket: WebSocket) -> None:
    await socket.accept()
    await socket.receive()


@asynccontextmanager
async def connected() -> AsyncGenerator[SocketStream, None]:
    """A bare connection to an app that says what it is told."""
    routes = [Route("/", echo, methods=["GET", "POST"]), WebSocketRoute("/", wait)]
    async with serving(Starlette(routes=routes)) as url:
        host, port = url.removeprefix("http://").split(":")
        async with await anyio.connect_tcp(host, int(port)) as stream:
            with anyio.fail_after(20):
                yield stream


async def heard(stream: SocketStream) -> bytes:
    """All that comes until the server hangs up."""
    told = b""
    try:
        async for part in stream:
            told += part
    except anyio.BrokenResourceError:
        pass
    return told


async def taken(stream: SocketStream, most: int) -> int:
    """How many more parts are taken of this client."""
    for at in range(most):
        try:
            await stream.send(PART)
        except anyio.BrokenResourceError:
            return at
    return most


async def answered(stream: SocketStream, body: bytes) -> bytes:
    """The head of an answer that ends with `body`."""
    told = b""
    while not told.endswith(body):
        told += await stream.receive()
    return told


@pytest.mark.parametrize(
    "begin",
    [
        b"GET /",
        b"GET / HTTP/1.1\r\na: ",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1;a=",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\na: ",
    ],
)
async def test_a_head_without_an_end_is_not_taken(begin: bytes) -> None:
    async with connected() as stream:
        await stream.send(begin)
        assert await taken(stream, 1000) < 1000


async def test_what_is_too_long_is_said() -> None:
    async with connected() as stream:
        await stream.send(b"GET / HTTP/1.1\r\na: " + b"x" * heads.MOST_HEAD_BYTES)
        told = await heard(stream)
    assert told.startswith(b"HTTP/1.1 400 ")
    assert told.endswith(b"may have 65536 bytes.")


async def test_long_bodies_are_no_heads() -> None:
    """Also in small chunks, and with requests one behind the other."""
    small = b"1\r\nx\r\n" * 50_000 + b"0\r\n\r\n"
    length = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(PART)
    async with connected() as stream:
        for _ in range(3):
            await stream.send(length + PART)
            assert (await answered(stream, PART)).startswith(b"HTTP/1.1 200 ")
        await stream.send(
            b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n" + small
        )
        assert (await answered(stream, b"x" * 50_000)).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("begin", [b"", b"GET / HTTP/1.1\r\na: "])
async def test_who_does_not_come_to_the_end_of_a_head_is_hung_up_on(
    monkeypatch: pytest.MonkeyPatch, begin: bytes
) -> None:
    monkeypatch.setattr(heads, "HEAD_S", 0.2)
    async with connected() as stream:
        await stream.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n" if begin else b"")
        await stream.send(begin)
        told = await heard(stream)
    assert told.startswith(b"HTTP/1.1 200 " if begin else b"")


async def test_a_slow_answer_is_no_slow_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "HEAD_S", 0.2)
    async with connected() as stream:
        await stream.send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n1")
        await anyio.sleep(0.5)
        await stream.send(b"2")
        assert (await answered(stream, b"12")).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("body_apart", [False, True])
async def test_a_body_comes_through_where_http_2_is_offered(*, body_apart: bool) -> None:
    """Java's client does so on every connection without TLS."""
    head = (
        b"POST / HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nContent-Length: 5\r\n"
        b"Host: a\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\nUpgrade: h2c\r\nUser-Agent: Java\r\n\r\n"
    )
    async with connected() as stream:
        for _ in range(2):
            await stream.send(head if body_apart else head + b"hello")
            if body_apart:
                await anyio.sleep(0.05)
                await stream.send(b"hello")
            assert (await answered(stream, b"hello")).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("offer", "body", "told"),
    [
        (b"\r\nUpgrade: h2c\r\n", b"hello", b"hello"),
        (b"\r\nUpgrade: websocket\r\n", b"", b"101 Switching Protocols"),
    ],
)
async def test_an_offer_may_come_in_two_parts(offer: bytes, body: bytes, told: bytes) -> None:
    key = b"dGhlIHNhbXBsZSBub25jZQ=="
    head = (
        b"%b / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: %b\r\nContent-Length: %d%bUser-Agent: x\r\n\r\n"
    ) % (b"POST" if body else b"GET", key, len(body), offer)
    at = head.index(offer)
    for cut in (at + 1, at + 2, at + 6, at + 10, at + 14, at + len(offer) - 1):
        async with connected() as stream:
            await stream.send(head[:cut])
            await anyio.sleep(0.005)
            await stream.send(head[cut:] + body)
            heard = b""
            while told not in heard:
                heard += await stream.receive()


async def test_no_handshake_is_waited_for_that_cannot_be_one() -> None:
    async with connected() as stream:
        await stream.send(
            b"GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
            b"content-length: 5\r\n\r\nhello"
        )
        assert await heard(stream) == b""
