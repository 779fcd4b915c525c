"""Server-sent events as bytes (WHATWG HTML, 9.2). Pure; knows no API."""

from __future__ import annotations

from typing import Any

import msgspec

MEDIA_TYPE = "text/event-stream"
DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


def event(data: Any, name: str = "") -> bytes:
    """One event whose data is JSON on one line; without a name it is a plain message."""
    head = f"event: {name}\n".encode() if name else b""
    return b"%bdata: %b\n\n" % (head, _encode(data))
