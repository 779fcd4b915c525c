"""How the bytes of KV get from one worker to another, once a door has agreed to give them.

A way has two ends: the door's lends a file, the collector's takes it. Which way is gone is agreed
on for every transfer: the collector names those that it has, the door takes the first that it has
too and that works between the two. Where one fails the bytes go over the connection itself, which
works for whoever has reached the door. Knows no tickets and no leases.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from msgspec import Struct

TCP = "tcp"  # over the connection: the last of the ways, and always there


class Said(Struct, frozen=True):
    """A way that a collector has, and what it says of its own end."""

    kind: str
    about: bytes = b""


class Refused(Exception):
    """This way cannot be gone here and now; another may be. The message says why."""


class Way(Protocol):
    """One that is not the connection: `kv_shared.SharedFiles`, `kv_nixl.Nixl`."""

    @property
    def kind(self) -> str:
        """Its name, as settings and messages have it."""

    @property
    def lasting(self) -> bool:
        """Whether what was taken is whole even if the other end let go of it meanwhile."""

    def about(self) -> bytes:
        """What this end says of itself when it collects."""

    def fits(self, about: bytes) -> bool:
        """Whether it may work with an end that says this of itself."""

    def lend(self, path: Path, num_bytes: int, about: bytes) -> AbstractAsyncContextManager[bytes]:
        """Make what lies at `path` reachable for the other end, which said `about`, until the block
        is left; what the other end has to be told. Raises `Refused`."""

    async def take(self, said: bytes, num_bytes: int, into: Path) -> None:
        """Get what the other end lends, as a new file at `into`. Raises `Refused`, after which no
        file is there, and OSError."""


def by_kind(ways: Sequence[Way], kind: str) -> Way | None:
    """The one of that name."""
    return next((way for way in ways if way.kind == kind), None)
