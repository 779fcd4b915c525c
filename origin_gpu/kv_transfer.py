"""Move the KV of one sequence from one worker to another: a file here becomes a file there.

One TCP connection a transfer; frames are 4 bytes of little-endian length and MessagePack:

    collector                                         door
    Wanted(secret, request, epoch, layout, ways)  ->
                                                  <-  Granted(num_bytes, way, ...) | Denied
    BUSY, each second, while it takes it          ->
    DONE(number), once all of it is there         ->
                                                  <-  KEPT, where the way needs it
    or INSTEAD(number): this way does not work    ->
                                                  <-  num_bytes of KV
    DONE(number)                                  ->

Where the way is the connection itself, its bytes follow Granted at once. The KV stays on offer
until its arrival has been acknowledged: a transfer that breaks off can be tried again. KV of some
ranks comes in as many parts, each named by its rank, in any order: after DONE follows the next
Granted. It has been collected once all were acknowledged on one connection, each by the number that
its Granted had: an acknowledgement out of turn frees nothing. KEPT says that nothing was let go of
while it was being taken, as the door may have given the collector up. Both ends name the life
of the engine that computed the KV and the digest of its layout, so KV is never taken for something
that it is not. Knows no engine.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import socket
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

import anyio
import msgspec
from msgspec import Struct

from origin_gpu.handover import KVTicket, Peer
from origin_gpu.kv_offer import Offer
from origin_gpu.kv_socket import STALL_S, Connection, dial
from origin_gpu.kv_warm import WarmFiles
from origin_gpu.kv_ways import TCP, Refused, Said, Way, by_kind
from routing.errors import Code, Failure
from routing.logs import log
from routing.serving import listening_socket

logger = logging.getLogger(__name__)

_DONE, _INSTEAD, _BUSY, _KEPT = b"\x06", b"\x15", b"\x16", b"\x07"
_NUMBER_BYTES = 4  # after DONE and INSTEAD
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
    part: int = 0  # the rank whose KV it is
    number: int = 0  # what its acknowledgement says again


class Denied(Struct, frozen=True, tag="denied"):
    reason: Literal["secret", "unknown", "epoch", "layout"]
    detail: str


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
    def offer(self, ticket: KVTicket, *paths: Path) -> Iterator[Offer]:
        """Offer what is going to lie at `paths`, one a part, for the length of the block."""
        offer = self._offers[ticket.request_id] = Offer(ticket, paths)
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
                found = await self._find(wanted)
                if isinstance(found, Denied):
                    self._denied(found.reason)
                    log(logger, "KV denied", request_id=request_id, reason=found.detail)
                    await connection.send_message(found)
                else:
                    await self._hand_over(connection, found, wanted.ways)
            except (OSError, msgspec.DecodeError) as exc:
                log(logger, "KV not handed over", request_id=request_id, reason=str(exc))

    async def _find(self, wanted: Wanted) -> Offer | Denied:
        """What is wanted, once it can be given."""
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
        try:
            await (offer.wait_whole() if self._fits(wanted.ways) else offer.wait_begun())
        except ConnectionError as exc:
            return Denied("unknown", str(exc))
        return offer

    def _fits(self, ways: Sequence[Said]) -> bool:
        """Whether any of these may be gone; if not, it goes over the connection, and what is there
        can go while the rest is computed."""
        found = ((by_kind(self._ways, said.kind), said.about) for said in ways)
        return any(way is not None and way.fits(about) for way, about in found)

    async def _hand_over(self, connection: Connection, offer: Offer, ways: Sequence[Said]) -> None:
        """All parts, one after the other."""
        offer.renew()
        for part, path in offer.files:
            if not await self._give(connection, offer, part, path, ways):
                return
        offer.collected.set()

    async def _give(
        self, connection: Connection, offer: Offer, part: int, path: Path, ways: Sequence[Said]
    ) -> bool:
        """One part, by the first way that works, then over the connection; whether it arrived."""
        num_bytes = os.stat(path).st_size if offer.whole else offer.ticket.part_bytes
        number = secrets.randbits(8 * _NUMBER_BYTES)
        for said in ways if offer.whole else ():
            way = by_kind(self._ways, said.kind)
            if way is None:
                continue
            try:
                async with way.lend(path, num_bytes, said.about) as told:
                    granted = Granted(num_bytes, way.kind, told, part, number)
                    await connection.send_message(granted)
                    if await _wait_taken(connection, offer, number):
                        if not way.lasting:
                            await connection.send(_KEPT)
                        return True
            except Refused as exc:
                log(logger, "KV way refused", request_id=offer.ticket.request_id, reason=str(exc))
                continue
            break  # the collector wants it over the connection
        else:
            await connection.send_message(Granted(num_bytes, part=part, number=number))
        await _send(connection, offer, path, num_bytes)
        return await _wait_taken(connection, offer, number)


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

    async def collect(self, ticket: KVTicket, peer: Peer, *into: Path) -> str:
        """Get the parts of `ticket` as new files at `into`; the way the last went. Failure: LOST or
        INCOMPATIBLE.

        Its address is that of `peer`, which the caller has from its own table. What a failure
        leaves of the files is the caller's to remove.
        """
        missing = dict(zip(ticket.parts, into, strict=True))
        try:
            with await dial(*door_address(peer)) as sock:
                stall_s = self._stall_s
                if ticket.num_ready is not None:  # the next piece may take a while
                    stall_s = max(stall_s, ticket.lease_s)
                connection = Connection(sock, stall_s=stall_s)
                await self._ask(connection, ticket)
                way = TCP
                while missing:
                    granted = await _granted(connection, ticket, missing)
                    way = await self._take(connection, granted, missing.pop(granted.part))
                return way
        except (OSError, msgspec.DecodeError) as exc:
            detail = f"KV of {ticket.request_id} cannot be had from {peer.name}: {exc}"
            raise Failure(Code.LOST, detail) from exc

    def being_read(self, *paths: Path) -> AbstractContextManager[None]:
        """A block in which what was collected there is read; see `WarmFiles.being_read`."""
        return self._warm.being_read(*paths)

    async def _ask(self, connection: Connection, ticket: KVTicket) -> None:
        await connection.send_message(
            Wanted(
                secret=self._secret,
                request_id=ticket.request_id,
                epoch=ticket.epoch,
                layout_digest=ticket.layout.digest,
                ways=tuple(Said(way.kind, way.about()) for way in self._ways),
            )
        )

    async def _take(self, connection: Connection, granted: Granted, into: Path) -> str:
        """One part, its arrival acknowledged; the way it went."""
        way = by_kind(self._ways, granted.way)
        if way is not None and await _taken(connection, way, granted, into):
            return way.kind
        with self._warm.new(into, granted.num_bytes) as room:
            if room is None:
                await connection.receive_file(into, granted.num_bytes)
            else:
                await connection.receive_whole(room)
        await connection.send(_DONE + _bytes(granted.number))
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


async def _granted(connection: Connection, ticket: KVTicket, missing: Collection[int]) -> Granted:
    """What the door gives next, which must be one of the parts that are missing."""
    # The other engine may be in a long step before it can export; past the lease it never will.
    answer: Granted | Denied = await connection.receive_message(
        Granted | Denied, within_s=ticket.lease_s
    )
    if isinstance(answer, Denied):
        # A wrong secret too is between the two workers, and not the client's to be told of.
        code = Code.INCOMPATIBLE if answer.reason == "layout" else Code.LOST
        raise Failure(code, answer.detail)
    if answer.part not in missing:
        detail = f"KV of rank {answer.part} came, where that of {sorted(missing)} is missing"
        raise Failure(Code.LOST, detail)
    if answer.num_bytes != ticket.part_bytes:
        detail = f"KV of {answer.num_bytes} bytes, where the ticket says {ticket.part_bytes}"
        raise Failure(Code.INCOMPATIBLE, detail)
    return answer


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
    await connection.send((_INSTEAD if failed else _DONE) + _bytes(granted.number))
    if failed is None and not way.lasting:
        await _wait_kept(connection)
    return failed is None


async def _wait_kept(connection: Connection) -> None:
    """Until the door says that it had not let go; where it has, it closed the connection."""
    if (said := await connection.receive_exactly(1)) != _KEPT:
        raise ConnectionError(f"the door said {said!r}")


def _bytes(number: int) -> bytes:
    return number.to_bytes(_NUMBER_BYTES, "little")


async def _say_busy(connection: Connection) -> None:
    """The door need not give up on one that takes its time."""
    with suppress(OSError):  # which whoever sends next is told
        while True:
            await anyio.sleep(BUSY_EVERY_S)
            await connection.send(_BUSY)


async def _wait_taken(connection: Connection, offer: Offer, number: int) -> bool:
    """Whether the collector has what was granted as `number`; if not, it wants the bytes."""
    while (said := await connection.receive_exactly(1)) == _BUSY:
        offer.renew()
    offer.renew()
    if said not in {_DONE, _INSTEAD}:
        raise ConnectionError(f"the collector said {said!r}")
    if await connection.receive_exactly(_NUMBER_BYTES) != _bytes(number):
        raise ConnectionError("the collector acknowledged what it was not granted")
    return said == _DONE


async def _send(connection: Connection, offer: Offer, path: Path, num_bytes: int) -> None:
    handle = os.open(path, os.O_RDONLY)
    sent = 0
    try:
        while sent < num_bytes:
            ready = num_bytes if offer.whole else await offer.wait_beyond(sent)
            await connection.send_file(handle, sent, ready, offer.renew)
            sent = ready
    finally:
        os.close(handle)
