"""Many streams over HTTP for as little CPU as can be: a process of its own, nobody's measure.

Reads what to ask as one line of JSON on standard input, keeps `num_streams` answers coming until
the input closes, then says on standard output how they went. Looks only at what tells a whole
answer from a broken one.
"""

from __future__ import annotations

import selectors
import socket
import sys
from contextlib import ExitStack

import msgspec
from msgspec import Struct

_RECEIVE_BYTES = 1 << 16
_TAIL_BYTES = 512  # of an answer: its usage, [DONE], the end of the chunked body
_GOOD = b"HTTP/1.1 200 "
_END = b"\r\n0\r\n\r\n"


class Load(Struct, frozen=True, kw_only=True):
    """What to ask of an edge, and how often."""

    host: str
    port: int
    path: str
    key: str  # bearer
    body: dict[str, object]  # but for max_tokens
    num_streams: int
    output_tokens: int  # of an answer


class Outcome(Struct, kw_only=True):
    """How it went."""

    answers: int = 0  # whole ones
    tokens: int = 0  # in them, as their usage says
    events: int = 0  # in them, but for those that a read cuts in their first word
    bad: str = ""  # the last thing seen that is no part of a good answer


class Asking:
    """One connection: one answer after another."""

    def __init__(self, load: Load, outcome: Outcome, first_tokens: int) -> None:
        self._load = load
        self._outcome = outcome
        self.socket = socket.create_connection((load.host, load.port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.ask(first_tokens)

    def ask(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._tail, self._begun, self._events = b"", False, 0
        self.socket.sendall(request(self._load, max_tokens))

    def hear(self) -> bool:
        """Read what has come; whether there is more to hope for."""
        chunk = self.socket.recv(_RECEIVE_BYTES)
        tail = self._tail + chunk
        if not self._begun:
            self._begun = len(tail) >= len(_GOOD)
            chunk = chunk if _GOOD.startswith(tail[: len(_GOOD)]) else b""
        if not chunk:
            self._outcome.bad = repr(tail)
            return False
        self._events += chunk.count(b"data: ")
        self._tail = tail = tail[-_TAIL_BYTES:]
        if not tail.endswith(_END):
            return True
        if b"[DONE]" not in tail or b'"completion_tokens":%d,' % self._max_tokens not in tail:
            self._outcome.bad = repr(tail)
            return False
        self._outcome.answers += 1
        self._outcome.tokens += self._max_tokens
        self._outcome.events += self._events
        self.ask(self._load.output_tokens)
        return True


def request(load: Load, max_tokens: int) -> bytes:
    """One request as HTTP/1.1 has it."""
    body = msgspec.json.encode(load.body | {"max_tokens": max_tokens})
    lines = (
        f"POST {load.path} HTTP/1.1",
        f"host: {load.host}:{load.port}",
        f"authorization: Bearer {load.key}",
        "content-type: application/json",
        f"content-length: {len(body)}",
    )
    return "\r\n".join((*lines, "", "")).encode() + body


def keep_asking(load: Load, told: int) -> Outcome:
    """Ask until the file descriptor `told` is closed at its other end, or an answer is bad.

    The first answers are of all lengths, so that later ones do not all end in the same step.
    """
    outcome = Outcome()
    with ExitStack() as held:
        selector = held.enter_context(selectors.DefaultSelector())
        selector.register(told, selectors.EVENT_READ, None)
        for n in range(load.num_streams):
            first_tokens = max(1, load.output_tokens * (n + 1) // load.num_streams)
            asking = Asking(load, outcome, first_tokens)
            held.enter_context(asking.socket)
            selector.register(asking.socket, selectors.EVENT_READ, asking)
        _hear_all(selector, outcome)
    return outcome


def _hear_all(selector: selectors.BaseSelector, outcome: Outcome) -> None:
    while not outcome.bad:
        for key, _ in selector.select():
            if key.data is None:
                return
            if not key.data.hear():
                break


def main() -> None:
    load = msgspec.json.decode(sys.stdin.buffer.readline(), type=Load)
    outcome = keep_asking(load, sys.stdin.fileno())
    sys.stdout.buffer.write(msgspec.json.encode(outcome))


if __name__ == "__main__":
    main()
