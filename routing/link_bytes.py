"""WebSocket frames as bytes (RFC 6455, 5.2): only what both ends of a link do once a token.

Handshakes, control frames and messages in parts are left to the `websockets` library.
"""

from __future__ import annotations

_BINARY = 0x82  # the first byte of a whole binary message
_TWO_BYTES, _EIGHT_BYTES = 126, 127  # where the size would be, which then follows
_HEADS = [bytes((_BINARY, size)) for size in range(_TWO_BYTES)]


def message_frame(message: bytes) -> bytes:
    """What a server sends to say one binary message."""
    size = len(message)
    if size < _TWO_BYTES:
        return _HEADS[size] + message
    if size < 2**16:
        return bytes((_BINARY, _TWO_BYTES)) + size.to_bytes(2, "big") + message
    return bytes((_BINARY, _EIGHT_BYTES)) + size.to_bytes(8, "big") + message


def small_message(received: bytes) -> bytes | None:
    """The message, if what has arrived is one frame with one of a few bytes, and no more."""
    size = len(received) - 2
    return received[2:] if 0 <= size < _TWO_BYTES and received[:2] == _HEADS[size] else None


def span(received: bytearray) -> tuple[int, int] | None:
    """Where the payload of a server's first frame begins and ends; None: its head is not here yet.

    ValueError when it is masked, which servers' frames are not.
    """
    if len(received) < 2:
        return None
    size = received[1]
    if size < _TWO_BYTES:
        return 2, 2 + size
    if size > _EIGHT_BYTES:
        raise ValueError("a server's frame is masked")
    begin = 4 if size == _TWO_BYTES else 10
    if len(received) < begin:
        return None
    return begin, begin + int.from_bytes(received[2:begin], "big")


def is_message(frame: bytes | bytearray) -> bool:
    """Whether a frame is a binary message, and all of it."""
    return frame[0] == _BINARY
