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
        self.collected = anyio.Event()
        self.withdrawn = False
        self._settled = anyio.Event()
        self._lease: anyio.CancelScope | None = None

    def exported(self) -> None:
        """Its files are there."""
        self._settled.set()

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
        """Nobody can collect any more; transfers that have begun go on."""
        self.withdrawn = True
        self._settled.set()

    async def wait_settled(self) -> None:
        """Until the file is there, or never will be."""
        await self._settled.wait()
