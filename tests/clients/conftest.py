"""An edge on a real socket over a region that counts: "hello" in a chat is answered "ABC..."."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from routing.region import Place
from tests.fakes.counting_region import CountingRegion, running
from tests.fakes.edge_client import EdgeClient, edge_over
from tests.fakes.edge_fixtures import edge, region
from tests.fakes.saying_region import SayingRegion, assets_with, ids_of
from tests.fakes.tool_answers import said
from tests.fakes.tool_templates import QWEN3

__all__ = ["edge", "region"]  # fixtures

# LiteLLM would fetch a list of prices as it is imported.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")


@pytest.fixture
def edge_settings(tmp_path: Path) -> dict[str, Any]:
    return {"store": tmp_path / "store.sqlite"}


@pytest.fixture
async def regions() -> AsyncIterator[list[CountingRegion]]:
    """One near the client, and one far away."""
    made = [CountingRegion(name="weur"), CountingRegion(name="enam", place=Place(40.71, -74.01))]
    async with running(*made):
        yield made


@pytest.fixture
async def edge_of_two(tmp_path: Path, regions: list[CountingRegion]) -> AsyncIterator[EdgeClient]:
    store = tmp_path / "store.sqlite"
    async with edge_over(tmp_path, [region.region for region in regions], store=store) as client:
        yield client


@pytest.fixture
async def saying() -> AsyncIterator[SayingRegion]:
    """Its model thinks, says "Well. " and makes two calls, three tokens at a time."""
    text = f"<think>\nParis, then.\n</think>\n\nWell. {said('hermes')}"
    made = SayingRegion(assets=assets_with(QWEN3), says=ids_of(text), burst=3)
    async with running(made):
        yield made


@pytest.fixture
async def saying_edge(tmp_path: Path, saying: SayingRegion) -> AsyncIterator[EdgeClient]:
    store = tmp_path / "store.sqlite"
    async with edge_over(tmp_path, [saying.region], store=store) as client:
        yield client
