"""A way that KV goes, with something done to it at the collector's end."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

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

    @asynccontextmanager
    async def lend(self, path: Path, num_bytes: int, about: bytes) -> AsyncGenerator[bytes, None]:
        async with self.way.lend(path, num_bytes, about) as said:
            yield said

    async def take(self, said: bytes, num_bytes: int, into: Path) -> None:
        async def take() -> None:
            await self.way.take(said, num_bytes, into)

        await self.act(take, into)
