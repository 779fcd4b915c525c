"""LiteLLM, by its `cloudflare/` and its `openai/` provider."""

from __future__ import annotations

from collections.abc import AsyncIterator

import litellm
import pytest

from tests.clients.frameworks import close_sessions
from tests.fakes.counting_region import MODEL
from tests.fakes.edge_client import EdgeClient

# Its own modules warn as they are imported, with some versions of pydantic.
pytestmark = pytest.mark.filterwarnings("ignore")
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
async def sessions_closed() -> AsyncIterator[None]:
    yield
    await close_sessions()


@pytest.mark.parametrize("tail", ["/v1", "/run"])
async def test_the_cloudflare_provider(edge: EdgeClient, tail: str) -> None:
    """An older setting ends in /ai/run, and is rewritten by the client."""
    asked = {"model": f"cloudflare/{MODEL}", "api_base": edge.ai + tail, "api_key": edge.key}
    answer = await litellm.acompletion(messages=HELLO, max_tokens=4, **asked)
    assert answer.choices[0].message.content == "ABCD"
    stream = await litellm.acompletion(messages=HELLO, max_tokens=4, stream=True, **asked)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "ABCD"


async def test_the_openai_provider(edge: EdgeClient) -> None:
    asked = {"model": f"openai/{MODEL}", "api_base": f"{edge.url}/v1", "api_key": edge.key}
    answer = await litellm.acompletion(messages=HELLO, max_tokens=4, **asked)
    assert answer.choices[0].message.content == "ABCD"
    assert answer.usage.completion_tokens == 4
    text = await litellm.atext_completion(prompt="A", **asked | {"max_tokens": 3})
    assert text.choices[0].text == "BCD"
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        await litellm.acompletion(messages=HELLO, temperature=9, **asked)
