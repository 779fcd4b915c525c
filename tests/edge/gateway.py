"""Two edges over one store, and requests with headers."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest

from edge import keys
from edge.app import unix_time
from tests.fakes.counting_region import CountingRegion
from tests.fakes.edge_client import ACCOUNT, EdgeClient, edge_over

OTHER = "globex"


@pytest.fixture
async def edges(
    tmp_path: Path, region: CountingRegion
) -> AsyncGenerator[tuple[EdgeClient, EdgeClient], None]:
    async with AsyncExitStack() as stack:
        first, second = [
            await stack.enter_async_context(
                edge_over(tmp_path, [region.region], store=tmp_path / "store.sqlite")
            )
            for _ in range(2)
        ]
        yield first, second


@pytest.fixture
def edge(edges: tuple[EdgeClient, EdgeClient]) -> EdgeClient:
    return edges[0]


def asked(prompt: str = "A", **fields: object) -> dict[str, object]:
    return {"prompt": prompt, "raw": True, "max_tokens": 3, **fields}


async def run(
    edge: EdgeClient, body: object = None, *, query: str = "", **headers: str
) -> httpx2.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await edge.http.post(
        edge.run_url + query,
        json=asked() if body is None else body,
        headers={**edge.headers(), **named},
    )


async def other_account(
    edge: EdgeClient, tmp_path: Path, path: str, **more: Any
) -> httpx2.Response:
    key = keys.create(tmp_path / "keys", OTHER, days=1, now=unix_time())
    headers = {"authorization": f"Bearer {key}", **more.pop("headers", {})}
    url = f"{edge.ai}/{path}".replace(ACCOUNT, OTHER)
    return await edge.http.request(more.pop("method", "GET"), url, headers=headers, **more)
