"""How answers begin and go out over ASGI: events, or one JSON body. Knows no API."""

from __future__ import annotations

from starlette.types import Send

from edge.sse import MEDIA_TYPE

JSON = "application/json"  # exactly: workerd compares the whole value, parameters included
Headers = list[tuple[bytes, bytes]]

_STREAM_HEADERS: Headers = [
    (b"content-type", MEDIA_TYPE.encode()),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would gather events otherwise
]


async def start_events(send: Send, region: str) -> None:
    await _start(send, [*_STREAM_HEADERS, (b"x-served-by", region.encode())])


async def send_whole(send: Send, data: bytes, region: str) -> None:
    """A whole body of JSON, with status 200."""
    await _start(
        send,
        [
            (b"content-type", JSON.encode()),
            (b"content-length", str(len(data)).encode()),
            (b"x-served-by", region.encode()),
        ],
    )
    await send({"type": "http.response.body", "body": data})


async def _start(send: Send, headers: Headers) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": headers})
