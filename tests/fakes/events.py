"""Server-sent events of the native API, read as a client does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx2
import msgspec


async def frames(response: httpx2.Response) -> AsyncIterator[dict[str, Any] | str]:
    """The data of each event, decoded; "[DONE]" as it is."""
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else msgspec.json.decode(data)


async def read_all(response: httpx2.Response) -> tuple[str, dict[str, int], bool]:
    """Text, usage, and whether the stream ended as it should."""
    text, usage, done = "", {}, False
    async for frame in frames(response):
        if isinstance(frame, str):
            done = True
        else:
            assert not done
            text += frame["response"]
            usage = frame.get("usage", usage)
    return text, usage, done
