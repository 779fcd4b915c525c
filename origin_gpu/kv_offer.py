"""KV on offer: what it is, where it lies, and how long it is held. Knows no connection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import anyio

from origin_gpu.handover import KVTicket


class Offer:
    """KV of one request, from its ticket to the end of its hold."""

    def __init__(self, ticket: KVTicket, paths: Sequence[Path]) -> None:
        self.ticket = ticket
        self.files = tuple(zip(ticket.parts, paths, strict=True))
        self.held = False  # computed, and nothing left to do but to be collected
        self.whole = False  # all of it is in its files
        self.piece_ends: list[int] = []  # tokens, of the pieces that are in its one file
        self.collected = anyio.Event()
        self.withdrawn = False
        self._num_bytes = 0  # that are in its one file
        self._news = anyio.Event()
        self._lease: anyio.CancelScope | None = None

    def wrote(self, num_bytes: int, num_tokens: int) -> None:
        """So much is in its one file."""
        self.piece_ends.append(num_tokens)
        self._num_bytes = num_bytes
        if num_tokens == self.ticket.num_tokens:
            self.exported()
        else:
            self._tell()

    def exported(self) -> None:
        """All of it is in its files."""
        self.whole = True
        self._tell()

    @contextmanager
    def leased(self) -> Iterator[None]:
        """A block that is left when the lease ends: that long after a collector last gave a sign
        of life, or after the beginning."""
        with anyio.move_on_after(self.ticket.lease_s) as self._lease:
            yield

    def renew(self) -> None:
        """A collector is at it."""
        if self._lease is not None:
            self._lease.deadline = anyio.current_time() + self.ticket.lease_s

    def withdraw(self) -> None:
        """Nobody can collect any more; transfers of what is whole go on."""
        self.withdrawn = True
        self._tell()

    async def wait_whole(self) -> None:
        """Until all of it is there. ConnectionError if it never will be."""
        while not self.whole:
            await self._wait()
        self._check()

    async def wait_begun(self) -> None:
        """Until some of it is there, or all. ConnectionError if it never will be."""
        while not (self.whole or self._num_bytes):
            await self._wait()
        self._check()

    async def wait_beyond(self, num_bytes: int) -> int:
        """Bytes of its one file, once they are more than so many. ConnectionError if they never
        will be."""
        while self._num_bytes <= num_bytes:
            await self._wait()
        return self._num_bytes

    async def _wait(self) -> None:
        self._check()
        await self._news.wait()

    def _check(self) -> None:
        if self.withdrawn:
            raise ConnectionError(f"KV of {self.ticket.request_id} is not held here any more")

    def _tell(self) -> None:
        self._news.set()
        self._news = anyio.Event()
