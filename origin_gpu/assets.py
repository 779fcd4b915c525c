"""A region's text assets, by digest: fetched from a worker once, then kept. Knows no tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import httpx2
import msgspec

from routing import wire
from routing.logs import log

logger = logging.getLogger(__name__)

NUM_KEPT = 8  # about as many models as a region serves; some MB each


class Assets:
    """The last `NUM_KEPT` that were asked for."""

    def __init__(self, client: httpx2.AsyncClient) -> None:
        self._client = client
        self._kept: dict[str, bytes] = {}  # by digest, least lately asked for first

    async def get(self, digest: str, urls: Sequence[str]) -> bytes | None:
        """MessagePack of the `wire.TextAssets` with this digest, from the first of `urls` that has
        it; None if none has."""
        found = self._kept.pop(digest, None)
        for url in urls:
            if found is not None:
                break
            found = await self._fetch(f"{url}/v1/assets/{digest}", digest)
        if found is not None:
            self._kept[digest] = found
            while len(self._kept) > NUM_KEPT:
                del self._kept[next(iter(self._kept))]
        return found

    async def _fetch(self, url: str, digest: str) -> bytes | None:
        try:
            response = await self._client.get(url)
            response.raise_for_status()
            assets = msgspec.msgpack.decode(response.content, type=wire.TextAssets)
        except (httpx2.HTTPError, msgspec.DecodeError) as exc:
            log(logger, "assets not fetched", url=url, reason=str(exc))
            return None
        if assets.digest != digest:
            log(logger, "assets not fetched", url=url, reason=f"their digest is {assets.digest}")
            return None
        return response.content
