"""What the two ends of a link say to each other. No sockets.

Client to server: one frame is a list of acts. Server to client: one frame is a `Frame`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import Struct

PATH = "/v1/link"

Req = TypeVar("Req")
Ev = TypeVar("Ev")


class Open(Struct, Generic[Req], frozen=True, array_like=True, tag=0):
    id: int  # chosen by the client, never used again on this connection
    window: int  # events that may be sent before any credit
    request: Req


class Cancel(Struct, frozen=True, array_like=True, tag=1):
    id: int


class Credit(Struct, frozen=True, array_like=True, tag=2):
    id: int
    num_events: int  # more that may be sent


class Batch(Struct, Generic[Ev], frozen=True, array_like=True, gc=False):
    """What one stream has to say in one frame. (In no cycle: the collector need not follow it.)"""

    id: int
    events: tuple[Ev, ...]
    ended: bool


class Frame(Struct, Generic[Ev], frozen=True, array_like=True):
    """What all streams have to say in one tick of the server, or for what has reached it together.

    In most of them a stream says one token and nothing else: `wire.Tokens` of one id, without
    logprobs. Those go in two columns, which cost a small part of what events cost to make and read.
    A stream is in the columns or in `batches`, and at most once.
    """

    streams: list[int]  # that say one token
    ids: list[int]  # the token of each
    batches: list[Batch[Ev]]  # of the others


def acts_decoder(requests: Any) -> msgspec.msgpack.Decoder[list[Any]]:
    """Reads a client's frames; `requests` is the union of what streams may ask."""
    return msgspec.msgpack.Decoder(list[Open[requests] | Cancel | Credit])


def frame_decoder(events: Any) -> msgspec.msgpack.Decoder[Frame[Any]]:
    """Reads a server's frames; `events` is the union of what streams may answer."""
    return msgspec.msgpack.Decoder(Frame[events])


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How soon a link notices things, in seconds. Both ends must go by the same."""

    beat_s: float = 2.5  # a frame goes out at least this often
    silence_s: float = 10.0  # a peer not heard for so long is gone
    stall_s: float = 60.0  # a reader that takes nothing for so long loses its stream


@dataclass(slots=True)
class LinkStats:
    """What has passed through one end since it began, and what is open there now."""

    frames_sent: int = 0
    frames_received: int = 0
    num_open: int = 0  # streams whose last word has not gone out; counted by the answering end
