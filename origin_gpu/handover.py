"""What a front and its workers say to each other, and what passes between prefill and decode."""

from __future__ import annotations

from msgspec import Struct

from infire.kv_layout import KVLayout
from routing import wire
from routing.region import ProcessReport, Role


class KVTicket(Struct, frozen=True, kw_only=True):
    """Where computed KV waits to be collected, what it covers, and for how long."""

    worker: str  # name in the collector's own pool table, which alone says what address to call
    url: str  # must equal that table's entry: an address in a message is never dialled
    request_id: str
    epoch: str  # life of the worker that computed it
    num_tokens: int
    num_bytes: int  # of all parts
    layout: KVLayout  # of any rank of its engine
    lease_s: float  # after which a hold ends by itself: from its beginning, or a collector's sign
    num_ready: int | None = None  # tokens that were there when it was given; None: all
    parts: tuple[int, ...] = (0,)  # ranks whose exports it is, each as long as the others

    def __post_init__(self) -> None:
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ValueError(f"parts {self.parts} of KV")
        if not 0 <= min(self.parts) <= max(self.parts) < self.layout.tp_size:
            raise ValueError(f"parts {self.parts} of KV of {self.layout.tp_size} ranks")

    @property
    def part_bytes(self) -> int:
        """Of one part."""
        return self.num_bytes // len(self.parts)


class Prefill(Struct, frozen=True, tag="prefill"):
    """Front to prefill worker. The stream stays open while KV is held; hanging up ends the hold."""

    request: wire.Generate


class Computing(Struct, frozen=True, tag="computing"):
    """Prefill worker to front: the KV of a long prompt may be collected as it is computed."""

    ticket: KVTicket


class Prefilled(Struct, frozen=True, kw_only=True, tag="prefilled"):
    """Prefill worker to front: the first token, and the ticket to go on with."""

    first: wire.Tokens
    cached_tokens: int = 0
    finish: wire.Finish | None = None  # ended at its first token: there is no ticket
    ticket: KVTicket | None = None
    piece_ends: tuple[int, ...] = ()  # tokens, of the parts that the KV was written in


class Collected(Struct, frozen=True, tag="collected"):
    """Last event of `Prefill`: the KV was fetched and its blocks are free."""


class Resume(Struct, frozen=True, tag="resume"):
    """Front to decode worker: go on from here."""

    request: wire.Generate
    prefilled: Prefilled


class Fetch(Struct, frozen=True, tag="fetch"):
    """Front to decode worker: begin to collect this; a `Resume` with it is to come. What was
    collected is kept as long as the stream is open, which says nothing."""

    ticket: KVTicket


class Peer(Struct, frozen=True, kw_only=True):
    """A worker of the same region, as its front knows it."""

    name: str
    role: Role
    url: str
    kv_address: str  # host:port of its KV door


class Watch(Struct, frozen=True, tag="watch"):
    """Front to worker: these are your peers; tell me how you are, on change and every second."""

    peers: tuple[Peer, ...]


class Watched(Struct, frozen=True, tag="watched"):
    report: ProcessReport
    kv_address: str
    layout_digest: str
    block_tokens: int = 0  # of what its prefix cache finds; 0: it has none


class CacheNews(Struct, frozen=True, tag="cache", gc=False):
    """Worker to front, on a `Watch`: what came into its prefix cache, and what went.

    Keys are of `infire.prefix`. Number 0 begins anew: all that was said before is void.
    """

    number: int  # one more than that of the last
    added: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()


# What a worker's link takes and gives. `wire.Generate` itself: prefill and decode here (role both).
WorkerRequest = wire.Generate | wire.Embed | Prefill | Fetch | Resume | Watch
WorkerEvent = (
    wire.Started
    | wire.Tokens
    | wire.Finish
    | wire.Embedded
    | wire.Fault
    | Computing
    | Prefilled
    | Collected
    | Watched
    | CacheNews
)
