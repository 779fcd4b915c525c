"""How other commands reach the launcher of a running fleet: a line of JSON there, a line back.

It listens on loopback, and takes only what names the fleet's secret.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable

import anyio
import msgspec
from anyio.abc import SocketAttribute, SocketStream, TaskStatus
from anyio.streams.buffered import BufferedByteReceiveStream
from msgspec import Struct

from routing.scale import CannotScale

MOST_BYTES = 1 << 16  # of a line
HEAR_S = 10.0  # for a line that has begun


_UNHEARD = (msgspec.DecodeError, TimeoutError, anyio.IncompleteRead, anyio.DelimiterNotFound)


class Asked(Struct, frozen=True, kw_only=True):
    """`fleet scale`."""

    secret: str
    region: str
    counts: dict[str, int]


class Answered(Struct, frozen=True, kw_only=True):
    counts: dict[str, int] = {}  # workers by role, as there are now
    error: str | None = None


Scale = Callable[[str, dict[str, int]], Awaitable[dict[str, int]]]


async def listen(
    scale: Scale, secret: str, *, task_status: TaskStatus[str] = anyio.TASK_STATUS_IGNORED
) -> None:
    """Until cancelled. Says host:port once it listens."""

    async def serve(stream: SocketStream) -> None:
        async with stream:
            try:
                answer = await _answer(stream, scale, secret)
                await stream.send(msgspec.json.encode(answer) + b"\n")
            except (anyio.BrokenResourceError, anyio.EndOfStream, anyio.ClosedResourceError):
                pass  # whoever asked is gone

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener:
        task_status.started(f"127.0.0.1:{listener.extra(SocketAttribute.local_port)}")
        await listener.serve(serve)


async def ask(address: str, asked: Asked) -> Answered:
    """What the launcher at `address` answers, however long it takes. OSError when it is gone."""
    host, _, port = address.rpartition(":")
    try:
        connected = await anyio.connect_tcp(host, int(port))
    except OSError as exc:
        raise OSError(f"the launcher does not answer at {address}: start it by fleet up") from exc
    async with connected as stream:
        await stream.send(msgspec.json.encode(asked) + b"\n")
        try:
            line = await BufferedByteReceiveStream(stream).receive_until(b"\n", MOST_BYTES)
        except (anyio.IncompleteRead, anyio.BrokenResourceError) as exc:
            raise OSError("the launcher was gone before it had answered") from exc
    return msgspec.json.decode(line, type=Answered)


async def _answer(stream: SocketStream, scale: Scale, secret: str) -> Answered:
    try:
        with anyio.fail_after(HEAR_S):
            line = await BufferedByteReceiveStream(stream).receive_until(b"\n", MOST_BYTES)
        asked = msgspec.json.decode(line, type=Asked)
    except _UNHEARD as exc:
        return Answered(error=f"not understood: {exc}")
    if not hmac.compare_digest(asked.secret.encode(), secret.encode()):
        return Answered(error="the fleet's secret is needed here")
    try:
        return Answered(counts=await scale(asked.region, asked.counts))
    except CannotScale as exc:
        return Answered(error=str(exc))
