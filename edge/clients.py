"""The client at the other end of a request: its body, its leaving, and its taking nothing.

Hanging up is how a client cancels, so whoever serves it runs inside `attend`. Knows ASGI, no API.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

import anyio
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from routing.abort import abort_of
from routing.errors import Code, Failure

Left = Literal["hung_up", "stalled"]


@dataclass(slots=True, eq=False)
class _Client:
    send: Send
    abort: Callable[[], None]
    writing_since: float | None = None  # on anyio's clock; None: nothing is being sent
    left: Left | None = None

    async def write(self, message: Message) -> None:
        """Send, which takes as long as the client takes to make room."""
        self.writing_since = anyio.current_time()
        await self.send(message)
        self.writing_since = None


class Clients:
    """All who are being answered. One task looks after those who take nothing: a deadline for
    each write would cost more than the write."""

    def __init__(self, stalled_s: float) -> None:
        self._stalled_s = stalled_s
        self._clients: set[_Client] = set()

    async def run(self) -> None:
        """Drop the connections of clients that have taken nothing for too long, until cancelled."""
        while True:
            await anyio.sleep(self._stalled_s / 4)
            latest = anyio.current_time() - self._stalled_s
            for client in self._clients:
                if client.writing_since is not None and client.writing_since < latest:
                    client.left = "stalled"
                    client.abort()

    async def attend(
        self, scope: Scope, receive: Receive, send: Send, work: Callable[[Send], Awaitable[None]]
    ) -> Left | None:
        """Run `work` to its end, or until its client has left: then says how."""
        client = _Client(send, abort_of(scope))
        failure: Failure | None = None
        done = False

        async def notice() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            if not done:
                client.left = client.left or "hung_up"
                tasks.cancel_scope.cancel()

        self._clients.add(client)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(notice)
                try:
                    await work(client.write)
                except Failure as exc:
                    failure = exc  # raised below: out of here it would be an ExceptionGroup
                done = True
                tasks.cancel_scope.cancel()
        finally:
            self._clients.discard(client)
        if failure is not None:
            raise failure
        return client.left


async def read_body(scope: Scope, receive: Receive, *, limit_bytes: int, stalled_s: float) -> bytes:
    """The whole body. Failure when it is too large, comes no further, or its client leaves."""
    stated = Headers(scope=scope).get("content-length", "")
    if stated.isdecimal() and int(stated) > limit_bytes:
        raise _too_large(f"{int(stated)} bytes", limit_bytes)
    body = bytearray()
    more = True
    while more:
        message = await _receive(receive, stalled_s)
        if message["type"] == "http.disconnect":
            raise Failure(Code.ABORTED, "the client left before its request was whole")
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > limit_bytes:
            raise _too_large(f"more than {limit_bytes} bytes", limit_bytes)
    return bytes(body)


async def _receive(receive: Receive, stalled_s: float) -> Message:
    try:
        with anyio.fail_after(stalled_s):
            return await receive()
    except TimeoutError:
        says = f"nothing of the body arrived for {stalled_s:g} s"
        raise Failure(Code.TIMEOUT, says) from None


def _too_large(size: str, limit_bytes: int) -> Failure:
    return Failure(Code.TOO_LARGE, f"body of {size} exceeds the limit of {limit_bytes} bytes")
