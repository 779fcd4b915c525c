"""Fixtures of an edge over one region that counts. A test file's own `edge_settings` say more."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.counting_region import CountingRegion, running
from tests.fakes.edge_client import EdgeClient, edge_over


@pytest.fixture
async def region() -> AsyncIterator[CountingRegion]:
    counting = CountingRegion()
    async with running(counting):
        yield counting


@pytest.fixture
def edge_settings() -> dict[str, Any]:
    return {}


@pytest.fixture
async def edge(
    tmp_path: Path, region: CountingRegion, edge_settings: dict[str, Any]
) -> AsyncIterator[EdgeClient]:
    async with edge_over(tmp_path, [region.region], **edge_settings) as client:
        yield client
