"""LangChain's Cloudflare integration, natively and by OpenAI's route."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Literal

import pytest
from langchain_cloudflare import ChatCloudflareWorkersAI
from pydantic import SecretStr

from tests.fakes.counting_region import MODEL
from tests.fakes.edge_client import ACCOUNT, EdgeClient

# It leaves its connections to the collector.
pytestmark = pytest.mark.filterwarnings("ignore")
Format = Literal["workers_ai", "openai_compatible"]


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """What it leaves is gone before another test could be blamed for it."""
    yield
    gc.collect()


def model(edge: EdgeClient, form: Format) -> ChatCloudflareWorkersAI:
    return ChatCloudflareWorkersAI(
        account_id=ACCOUNT,
        api_token=SecretStr(edge.key),
        model=MODEL,
        base_url=f"{edge.url}/client/v4",
        endpoint_format=form,
        temperature=0,
        max_tokens=4,
        reject_if_busy=True,
        session_id="one",
        max_retries=0,
    )


@pytest.mark.parametrize("form", ["workers_ai", "openai_compatible"])
async def test_whole_and_streamed(edge: EdgeClient, form: Format) -> None:
    chat = model(edge, form)
    answer = await chat.ainvoke("hello")
    assert answer.content == "ABCD"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 4
    assert "".join([str(chunk.content) async for chunk in chat.astream("hello")]) == "ABCD"
