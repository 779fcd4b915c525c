"""LangChain's Cloudflare integration, natively and by OpenAI's route."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from anyio import to_thread
from langchain_cloudflare import ChatCloudflareWorkersAI
from pydantic import SecretStr

from tests.fakes.counting_region import MODEL
from tests.fakes.edge_client import ACCOUNT, EdgeClient
from tests.fakes.tool_answers import NOW, WEATHER

# It leaves its connections to the collector.
pytestmark = pytest.mark.filterwarnings("ignore")
Format = Literal["workers_ai", "openai_compatible"]


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """What it leaves is gone before another test could be blamed for it."""
    yield
    gc.collect()


def model(edge: EdgeClient, form: Format, max_tokens: int = 4) -> ChatCloudflareWorkersAI:
    return ChatCloudflareWorkersAI(
        account_id=ACCOUNT,
        api_token=SecretStr(edge.key),
        model=MODEL,
        base_url=f"{edge.url}/client/v4",
        endpoint_format=form,
        temperature=0,
        max_tokens=max_tokens,
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


def called(message: Any) -> list[tuple[str, Any]]:
    return [(call["name"], call["args"]) for call in message.tool_calls]


@pytest.mark.parametrize("form", ["workers_ai", "openai_compatible"])
async def test_calls_of_tools(saying_edge: EdgeClient, form: Format) -> None:
    functions = [{"name": it.name, "parameters": it.parameters} for it in (WEATHER, NOW)]
    tools = [{"type": "function", "function": one} for one in functions]
    chat = model(saying_edge, form, 500).bind_tools(tools)
    calls = [("get_weather", {"city": "Paris", "days": 3}), ("now", {})]
    assert called(await chat.ainvoke("hello")) == calls
    if form == "workers_ai":  # by the other route its stream looks for no calls
        first, *others = await to_thread.run_sync(lambda: list(chat.stream("hello")))
        assert called(sum(others, first)) == calls
