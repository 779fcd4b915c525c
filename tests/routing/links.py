"""Links over real sockets, and who answers at their ends."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import msgspec
from starlette.applications import Starlette

from routing import wire
from routing.errors import Code, Failure
from routing.link import Link
from routing.link_frames import LinkStats, Pace
from routing.link_server import Stream, link_route

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
