"""A way that KV goes, with something done to it at the collector's end."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import anyio
import anyio.lowlevel

from origin_gpu.kv_ways import Way

Take: TypeAlias = Callable[[], Awaitable[None]]  # what would have been done
Act: TypeAlias = Callable[[Take, Path], Awaitable[None]]  # what is: with that, and where it goes


@dataclass
class Faulty:
    """Another way; `act` is called where it would take."""

    way: Way
    act: Act

    @property
    def kind(self) -> str:
        return self.way.kind

    @property
    def lasting(self) -> bool:
        return self.way.lasting

    def about(self) -> bytes:
        return self.way.about()

    def fits(self, about: bytes) -> bool:
        return self.way.fits(about)

    @asynccontextmanager
    async def lend(self, path: Path, num_bytes: int, about: bytes) -> AsyncGenerator[bytes, None]:
        async with self.way.lend(path, num_bytes, about) as said:
            yield said

    async def take(self, said: bytes, num_bytes: int, into: Path) -> None:
        async def take() -> None:
            await self.way.take(said, num_bytes, into)

        await self.act(take, into)


class Turns:
    """All wait until each has come; then they go on in another order."""

    def __init__(self, order: Sequence[int]) -> None:
        self._order = tuple(order)
        self._came: set[int] = set()
        self._all = anyio.Event()
        self._gone = {who: anyio.Event() for who in order}

    async def wait(self, who: int) -> None:
        """Until it is the turn of `who`."""
        self._came.add(who)
        if len(self._came) == len(self._order):
            self._all.set()
        await self._all.wait()
        place = self._order.index(who)
        if place:
            await self._gone[self._order[place - 1]].wait()
        self._gone[who].set()


async def scatters(take: Take, into: Path) -> None:
    """The file is there at once, as long as it will be; its pieces land one by one, in any order.

    As memory is written over a network. Whoever looks before the end sees wrong KV.
    """
    await take()
    content = into.read_bytes()
    into.unlink()  # a link is the giver's file too
    size = max(1, len(content) // 7)
    starts = list(range(0, len(content), size))
    random.Random(len(content)).shuffle(starts)
    with into.open("xb") as file:
        file.truncate(len(content))
        for start in starts:
            file.seek(start)
            file.write(content[start : start + size])
            file.flush()
            await anyio.lowlevel.checkpoint()
