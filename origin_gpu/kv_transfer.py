"""Move the KV of one sequence from one worker to another: a file here becomes a file there.

One TCP connection a transfer; frames are 4 bytes of little-endian length and MessagePack:

    collector                                         door
    Wanted(secret, request, epoch, layout, ways)  ->
                                                  <-  Granted(num_bytes, way, said) | Denied
    BUSY, each second, while it takes it          ->
    DONE, once all of it is there                 ->
    or INSTEAD: this way does not work            ->
                                                  <-  num_bytes of KV
    DONE                                          ->

Where the way is the connection itself, its bytes follow Granted at once. The KV stays on offer
until its arrival has been acknowledged: a transfer that breaks off can be tried again. Both ends
name the life of the engine that computed the KV and the digest of its layout, so KV is never taken
for something that it is not. Knows no engine.
"""

from __future__ import annotations

import hmac
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

import anyio
import msgspec
from msgspec import Struct

from origin_gpu.handover import KVTicket, Peer
from origin_gpu.kv_socket import STALL_S, Connection, dial
from origin_gpu.kv_warm import WarmFiles
from origin_gpu.kv_ways import TCP, Refused, Said, Way, by_kind
from routing.errors import Code, Failure
from routing.logs import log
from routing.serving import listening_socket

logger = logging.getLogger(__name__)

_DONE, _INSTEAD, _BUSY = b"\x06", b"\x15", b"\x16"
BUSY_EVERY_S = 1.0
_ACCEPT_AGAIN_S = 0.1  # when out of file descriptors


class Wanted(Struct, frozen=True, kw_only=True):
    """What a collector says first."""

    secret: str
    request_id: str
    epoch: str
    layout_digest: str
    ways: tuple[Said, ...] = ()  # the one it likes best first; over the connection it always can


class Granted(Struct, frozen=True, tag="granted"):
    num_bytes: int
    way: str = TCP
    said: bytes = b""  # to the collector's end of the way


class Denied(Struct, frozen=True, tag="denied"):
    reason: Literal["secret", "unknown", "epoch", "layout"]
    detail: str


class Offer:
    """KV of one request, from its ticket to the end of its hold."""

    def __init__(self, ticket: KVTicket, path: Path) -> None:
        self.ticket = ticket
        self.path = path
        self.held = False  # computed, and nothing left to do but to be collected
        self.part_ends: list[int] = []  # tokens, of the parts that are in the file
        self.collected = anyio.Event()
        self.withdrawn = False
        self._num_bytes = 0  # that are in the file
        self._whole = False
        self._news = anyio.Event()
        self._lease: anyio.CancelScope | None = None

    def wrote(self, num_bytes: int, num_tokens: int) -> None:
        """So much is in the file."""
        self.part_ends.append(num_tokens)
        self._num_bytes = num_bytes
        if num_tokens == self.ticket.num_tokens:
            self._whole = True
        self._tell()

    def exported(self) -> None:
        """All of it is in the file."""
        self.wrote(self.path.stat().st_size, self.ticket.num_tokens)

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
        self._tell()

    async def wait_whole(self) -> int:
        """Bytes of the file, once all are there. OSError if they never will be."""
        while not self._whole:
            await self._wait()
        self._check()
        return self._num_bytes

    async def wait_begun(self) -> int:
        """Bytes that the file will have, once the first are there. OSError if they never will."""
        await self.wait_beyond(0)
        return self._num_bytes if self._whole else self.ticket.num_bytes

    async def wait_beyond(self, num_bytes: int) -> int:
        """Bytes that are there, once they are more than so many. OSError if they never will be."""
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


class KVDoor:
    """Where other workers collect the KV on offer. Listens until closed, answers in `run`."""

    def __init__(
        self,
        host: str,
        secret: str,
        *,
        ways: Sequence[Way] = (),
        denied: Callable[[str], None] = lambda _: None,
        stall_s: float = STALL_S,
    ) -> None:
        """`denied` is called with the reason whenever KV is not given."""
        self._ways = ways
        self._denied = denied
        self._listener = listening_socket(host, 0)
        self._listener.setblocking(False)
        self._secret = secret
        self._stall_s = stall_s
        self._offers: dict[str, Offer] = {}
        found, port = self._listener.getsockname()[:2]
        self.address = f"[{found}]:{port}" if ":" in found else f"{found}:{port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    @property
    def num_offers(self) -> int:
        return len(self._offers)

    @property
    def num_held(self) -> int:
        """Offers of what is computed."""
        return sum(offer.held for offer in self._offers.values())

    @contextmanager
    def offer(self, ticket: KVTicket, path: Path) -> Iterator[Offer]:
        """Offer what is going to lie at `path`, for the length of the block."""
        offer = self._offers[ticket.request_id] = Offer(ticket, path)
        try:
            yield offer
        finally:
            offer.withdraw()
            del self._offers[ticket.request_id]

    async def run(self) -> None:
        """Answer until cancelled."""
        async with anyio.create_task_group() as tasks:
            while True:
                tasks.start_soon(self._answer, await self._accept())

    async def _accept(self) -> socket.socket:
        while True:
            await anyio.wait_readable(self._listener)
            try:
                return self._listener.accept()[0]
            except (BlockingIOError, ConnectionError):  # gone before it was answered
                continue
            except OSError as exc:
                logger.warning("KV door", extra={"fields": {"reason": str(exc)}})
                await anyio.sleep(_ACCEPT_AGAIN_S)

    async def _answer(self, sock: socket.socket) -> None:
        request_id = "unknown"
        with sock:
            try:
                connection = Connection(sock, stall_s=self._stall_s)
                wanted: Wanted = await connection.receive_message(Wanted)
                request_id = wanted.request_id
                found = self._find(wanted)
                if isinstance(found, Denied):
                    self._denied(found.reason)
                    log(logger, "KV denied", request_id=request_id, reason=found.detail)
                    await connection.send_message(found)
                else:
                    await self._hand_over(connection, found, wanted.ways)
            except (OSError, msgspec.DecodeError) as exc:
                log(logger, "KV not handed over", request_id=request_id, reason=str(exc))

    def _find(self, wanted: Wanted) -> Offer | Denied:
        """What is wanted, whether all of it is there yet or not."""
        if not hmac.compare_digest(wanted.secret.encode(), self._secret.encode()):
            return Denied("secret", "the fleet's secret is needed here")
        offer = self._offers.get(wanted.request_id)
        if offer is None:
            return Denied("unknown", f"KV of {wanted.request_id} is not held here")
        ticket = offer.ticket
        if wanted.epoch != ticket.epoch:
            detail = f"KV of life {wanted.epoch} is wanted, here is life {ticket.epoch}"
            return Denied("epoch", detail)
        if wanted.layout_digest != (digest := ticket.layout.digest):
            detail = f"KV of layout {digest[:12]} is wanted as {wanted.layout_digest[:12]}"
            return Denied("layout", detail)
        return offer

    async def _hand_over(self, connection: Connection, offer: Offer, asked: Sequence[Said]) -> None:
        """The first way that works, then the connection: over it, also what is still computed."""
        offer.renew()
        found = [(by_kind(self._ways, said.kind), said) for said in asked]
        ways = [(way, said) for way, said in found if way and way.fits(said.about)]
        try:
            num_bytes = await (offer.wait_whole() if ways else offer.wait_begun())
        except ConnectionError as exc:
            await connection.send_message(Denied("unknown", str(exc)))
            return
        for way, said in ways:
            try:
                async with way.lend(offer.path, num_bytes, said.about) as told:
                    await connection.send_message(Granted(num_bytes, way.kind, told))
                    if await _wait_taken(connection, offer):
                        offer.collected.set()
                        return
            except Refused as exc:
                log(logger, "KV way refused", request_id=offer.ticket.request_id, reason=str(exc))
                continue
            break  # the collector wants it over the connection
        else:
            await connection.send_message(Granted(num_bytes))
        await _send(connection, offer, num_bytes)
        if await connection.receive_exactly(1) == _DONE:
            offer.collected.set()


class DoorTransport:
    """Collects from the KV doors of other workers, by the first of `ways` that both ends have."""

    def __init__(
        self,
        secret: str,
        *,
        ways: Sequence[Way] = (),
        warm: WarmFiles | None = None,
        stall_s: float = STALL_S,
    ) -> None:
        self._secret = secret
        self._ways = ways
        self._warm = WarmFiles() if warm is None else warm
        self._stall_s = stall_s

    async def collect(self, ticket: KVTicket, peer: Peer, into: Path) -> str:
        """Get the KV of `ticket` as a new file at `into`; the way it went. Failure: LOST or
        INCOMPATIBLE.

        Its address is that of `peer`, which the caller has from its own table. What a failure
        leaves of the file is the caller's to remove.
        """
        try:
            with await dial(*door_address(peer)) as sock:
                stall_s = self._stall_s
                if ticket.num_ready is not None:  # the next part may take a while
                    stall_s = max(stall_s, ticket.lease_s)
                connection = Connection(sock, stall_s=stall_s)
                return await self._collect(connection, ticket, into)
        except (OSError, msgspec.DecodeError) as exc:
            detail = f"KV of {ticket.request_id} cannot be had from {peer.name}: {exc}"
            raise Failure(Code.LOST, detail) from exc

    async def _collect(self, connection: Connection, ticket: KVTicket, into: Path) -> str:
        await connection.send_message(
            Wanted(
                secret=self._secret,
                request_id=ticket.request_id,
                epoch=ticket.epoch,
                layout_digest=ticket.layout.digest,
                ways=tuple(Said(way.kind, way.about()) for way in self._ways),
            )
        )
        # The other engine may be in a long step before it can export; past the lease it never will.
        answer: Granted | Denied = await connection.receive_message(
            Granted | Denied, within_s=ticket.lease_s
        )
        if isinstance(answer, Denied):
            # A wrong secret too is between the two workers, and not the client's to be told of.
            code = Code.INCOMPATIBLE if answer.reason == "layout" else Code.LOST
            raise Failure(code, answer.detail)
        if answer.num_bytes != ticket.num_bytes:
            detail = f"KV of {answer.num_bytes} bytes, where the ticket says {ticket.num_bytes}"
            raise Failure(Code.INCOMPATIBLE, detail)
        way = by_kind(self._ways, answer.way)
        if way is not None and await _taken(connection, way, answer, into):
            return way.kind
        with self._warm.new(into, answer.num_bytes) as room:
            if room is None:
                await connection.receive_file(into, answer.num_bytes)
            else:
                await connection.receive_whole(room)
        await connection.send(_DONE)
        return TCP


def door_address(peer: Peer) -> tuple[str, int]:
    """Host and port of a worker's KV door.

    One that listens on every address of its machine is reached where the worker itself is.
    """
    parts = urlsplit(f"//{peer.kv_address}")
    host, port = parts.hostname, parts.port
    if host in {"0.0.0.0", "::"}:
        host = urlsplit(peer.url).hostname
    if host is None or port is None:
        raise OSError(f"{peer.kv_address!r} is not the address of a KV door")
    return host, port


async def _taken(connection: Connection, way: Way, granted: Granted, into: Path) -> bool:
    """Whether it got here that way; if not, it has been asked for over the connection."""
    failed: Refused | OSError | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_say_busy, connection)
        try:
            await way.take(granted.said, granted.num_bytes, into)
            if (size := os.stat(into).st_size) != granted.num_bytes:
                failed = OSError(f"{size} of {granted.num_bytes} bytes came by {way.kind}")
        except (Refused, OSError) as exc:
            failed = exc
        tasks.cancel_scope.cancel()
    if isinstance(failed, OSError):
        raise failed
    if failed is not None:
        logger.warning("KV way failed", extra={"fields": {"way": way.kind, "reason": str(failed)}})
    await connection.send(_INSTEAD if failed else _DONE)
    return failed is None


async def _say_busy(connection: Connection) -> None:
    """The door need not give up on one that takes its time."""
    with suppress(OSError):  # which whoever sends next is told
        while True:
            await anyio.sleep(BUSY_EVERY_S)
            await connection.send(_BUSY)


async def _wait_taken(connection: Connection, offer: Offer) -> bool:
    """Whether the collector has it; if not, it wants the bytes."""
    while (said := await connection.receive_exactly(1)) == _BUSY:
        offer.renew()
    offer.renew()
    if said not in {_DONE, _INSTEAD}:
        raise ConnectionError(f"the collector said {said!r}")
    return said == _DONE


async def _send(connection: Connection, offer: Offer, num_bytes: int) -> None:
    ready = await offer.wait_beyond(0)
    handle = os.open(offer.path, os.O_RDONLY)
    try:
        sent = 0
        while sent < num_bytes:
            await connection.send_file(handle, sent, ready, offer.renew)
            sent = ready
            if sent < num_bytes:
                ready = await offer.wait_beyond(sent)
    finally:
        os.close(handle)
