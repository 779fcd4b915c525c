"""What waits at the two ends of a link, and for how long. No sockets, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar

import anyio

from routing import wire
from routing.link_frames import Batch

Ev = TypeVar("Ev")


class Wake:
    """Lets one task wait until there is something for it to do; any number of calls are one."""

    def __init__(self) -> None:
        self._event = anyio.Event()
        self._is_set = False  # asked a thousand times a step, where the event would be slow

    def set(self) -> None:
        if not self._is_set:
            self._is_set = True
            self._event.set()

    async def wait(self) -> None:
        await self._event.wait()
        self._event = anyio.Event()
        self._is_set = False


class Patience:
    """Counts periods without a sign, up to a limit.

    It asks no clock, so a process that was itself stopped for an hour blames nobody for it.
    """

    def __init__(self, limit_s: float, period_s: float) -> None:
        self._limit = limit_s / period_s
        self._periods = 0

    def sign(self) -> None:
        self._periods = 0

    def lost(self) -> bool:
        """To be asked once a period."""
        self._periods += 1
        return self._periods > self._limit


class Inbox(Generic[Ev]):
    """The events of one stream for one reader, who takes them at its own speed."""

    def __init__(self, on_read: Callable[[], None]) -> None:
        self._on_read = on_read
        self._events: deque[Ev | None] = deque()  # no longer than the window, the end apart
        self._wake = Wake()

    def put(self, event: Ev | None) -> None:
        self._events.append(event)
        self._wake.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Ev:
        while not self._events:
            await self._wake.wait()
        event = self._events[0]
        if event is None:  # stays, so that every later call ends as well
            raise StopAsyncIteration
        self._events.popleft()
        self._on_read()
        return event


class Outbox(Generic[Ev]):
    """What one stream still has to say, and how much of it its reader has given credit for."""

    __slots__ = ("_credit", "_ended", "_number", "_on_news", "_patience", "_waiting")

    def __init__(
        self, number: int, credit: int, patience: Patience, on_news: Callable[[int], None]
    ) -> None:
        self._number = number
        self._credit = credit  # events that may go out
        self._patience = patience
        self._on_news = on_news
        self._waiting: list[Any] = []
        self._ended = False

    def put(self, event: Ev) -> None:
        """Queue `event`; without credit, `Tokens` join those that wait already."""
        if self._ended:
            return
        if len(self._waiting) > self._credit and isinstance(event, wire.Tokens):
            last = self._waiting[-1]
            if isinstance(last, wire.Tokens):
                self._waiting[-1] = wire.merge(last, event)
                return
        self._waiting.append(event)
        self._on_news(self._number)

    def end(self) -> None:
        self._ended = True
        self._on_news(self._number)

    def grant(self, num_events: int) -> None:
        self._credit += num_events
        self._patience.sign()
        if self._waiting:
            self._on_news(self._number)

    def stalled(self) -> bool:
        """Whether something has waited for credit too long. To be asked once a period."""
        if self._credit or not self._waiting:
            self._patience.sign()
            return False
        return self._patience.lost()

    def cut(self, fault: wire.Fault) -> None:
        """End at once, with `fault` in the place of all that waits, whatever the credit."""
        self._waiting = [fault]
        self._credit = 1
        self.end()

    def lone_id(self) -> int | None:
        """The token that is all there is to say, if it may go out now; else None: ask `batch`."""
        waiting = self._waiting
        if len(waiting) != 1 or self._ended or not self._credit:
            return None
        event = waiting[0]
        if not isinstance(event, wire.Tokens) or event.logprobs or len(event.ids) != 1:
            return None
        waiting.clear()
        self._credit -= 1
        return event.ids[0]

    def batch(self) -> Batch[Ev] | None:
        """What may go out now; None if nothing."""
        events = tuple(self._waiting[: self._credit])
        del self._waiting[: self._credit]
        self._credit -= len(events)
        ended = self._ended and not self._waiting
        return Batch(self._number, events, ended) if events or ended else None
