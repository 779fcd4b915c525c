"""WebSocket frames, against the library that knows the whole protocol."""

from __future__ import annotations

import pytest
from websockets.frames import Frame, Opcode

from routing.link_bytes import is_message, message_frame, small_message, span

SIZES = [0, 1, 125, 126, 127, 2**16 - 1, 2**16, 2**16 + 1]


@pytest.mark.parametrize("size", SIZES)
def test_a_message_is_framed_as_the_library_does_it_and_found_again(size: int) -> None:
    message = bytes(size % 251 for size in range(size))
    frame = message_frame(message)
    assert frame == Frame(Opcode.BINARY, message).serialize(mask=False)
    found = span(bytearray(frame + b"more"))
    assert found is not None
    assert frame[slice(*found)] == message
    assert is_message(frame)
    assert small_message(frame) == (message if size < 126 else None)


@pytest.mark.parametrize("size", SIZES)
def test_a_head_that_is_not_whole_is_none(size: int) -> None:
    frame = message_frame(bytes(size))
    head = len(frame) - size
    assert [span(bytearray(frame[:n])) is not None for n in range(head + 1)] == [False] * head + [
        True
    ]


@pytest.mark.parametrize(
    "received",
    [
        b"",
        b"\x82",
        b"\x82\x02a",
        b"\x82\x02abc",
        b"\x02\x02ab",  # a part of a message
        b"\x81\x02ab",  # text
        b"\x89\x02ab",  # a ping
        b"\xc2\x02ab",  # compressed
        b"\x82\x82\1\2\3\4ab",  # masked
    ],
)
def test_anything_else_is_no_small_message(received: bytes) -> None:
    assert small_message(received) is None


def test_a_masked_frame_is_no_servers() -> None:
    for size in SIZES:
        with pytest.raises(ValueError, match="masked"):
            span(bytearray(Frame(Opcode.BINARY, bytes(size)).serialize(mask=True)))
