"""Server-sent events as bytes (WHATWG HTML, 9.2). Pure; knows no API."""

from __future__ import annotations

from typing import Any

import msgspec

MEDIA_TYPE = "text/event-stream"
DONE = b"data: [DONE]\n\n"

encode = msgspec.json.Encoder().encode  # a value as JSON


def around(data: Any, name: str) -> tuple[bytes, bytes]:
    """One event in two parts, to make many that differ in one text only.

    `data` has the empty text in its last member called `name`; between the parts goes the JSON of
    what should be there instead.
    """
    head, member, tail = event(data).rpartition(b'"%b":""' % name.encode())
    assert member
    return head + member[:-2], tail


def event(data: Any, name: str = "") -> bytes:
    """One event whose data is JSON on one line; without a name it is a plain message."""
    head = f"event: {name}\n".encode() if name else b""
    return b"%bdata: %b\n\n" % (head, encode(data))
