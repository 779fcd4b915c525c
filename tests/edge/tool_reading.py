"""Answers with calls of tools."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.counting_region import running
from tests.fakes.edge_client import EdgeClient, edge_over
from tests.fakes.events import frames
from tests.fakes.saying_region import SayingRegion, assets_with, ids_of
from tests.fakes.tool_answers import said
from tests.fakes.tool_templates import HERMES


@pytest.fixture
def region() -> SayingRegion:
    return SayingRegion(assets=assets_with(HERMES), says=ids_of("Well. " + said("hermes")))


@pytest.fixture
async def edge(tmp_path: Path, region: SayingRegion) -> AsyncIterator[EdgeClient]:
    async with running(region), edge_over(tmp_path, [region.region]) as client:
        yield client


async def events(edge: EdgeClient, url: str, body: dict[str, Any]) -> list[Any]:
    async with edge.http.stream("POST", url, json=body, headers=edge.headers()) as response:
        assert response.status_code == 200
        return [frame async for frame in frames(response)]
