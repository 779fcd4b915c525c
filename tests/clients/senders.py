"""People's clients in Python, each as what sends a row's body and hands back the answer's JSON.

What a client has a parameter for goes in as that, the rest as its further fields: as its users do.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any, ClassVar, Self

import msgspec
from anthropic import AsyncAnthropic
from cloudflare import AsyncCloudflare
from openai import AsyncOpenAI
from pydantic import BaseModel

from tests.clients.fields import VECTORS, Route, Row
from tests.fakes.counting_region import MODEL
from tests.fakes.edge_client import ACCOUNT, EdgeClient

PATHS: Mapping[Route, str] = {
    "run": f"/run/{MODEL}",
    "vectors": f"/run/{VECTORS}",
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "embeddings": "/v1/embeddings",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}


class Sender(ABC):
    """One client of one edge. `async with` closes it."""

    name: ClassVar[str]
    routes: ClassVar[frozenset[Route]]

    def __init__(self, edge: EdgeClient) -> None:
        self.edge = edge
        self.stack = AsyncExitStack()

    @classmethod
    def sends(cls, row: Row) -> bool:
        """Whether this client has a way to send that field."""
        return row.route in cls.routes

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stack.aclose()

    @abstractmethod
    async def ask(self, route: Route, body: dict[str, Any]) -> Any:
        """The JSON of the answer; of a stream, that of its events."""


class Http(Sender):
    """No client at all: JSON over HTTP."""

    name = "http"
    routes = frozenset(PATHS)

    async def ask(self, route: Route, body: dict[str, Any]) -> Any:
        url = self.edge.ai + PATHS[route]
        answer = await self.edge.http.post(url, json=body, headers=self.edge.headers())
        assert answer.status_code == 200, answer.text
        if answer.headers["content-type"].startswith("text/event-stream"):
            return events(answer.text.splitlines())
        said = answer.json()
        return said["result"] if route in {"run", "vectors"} else said


class OpenAIPython(Sender):
    name = "openai"
    routes = frozenset({"chat", "completions", "embeddings", "responses"})

    async def __aenter__(self) -> Self:
        made = AsyncOpenAI(base_url=f"{self.edge.ai}/v1", api_key=self.edge.key, max_retries=0)
        self._client = await self.stack.enter_async_context(made)
        return self

    async def ask(self, route: Route, body: dict[str, Any]) -> Any:
        create: Any = {
            "chat": self._client.chat.completions.create,
            "completions": self._client.completions.create,
            "embeddings": self._client.embeddings.create,
            "responses": self._client.responses.create,
        }[route]
        return await plain(await create(**parameters(create, body)))


class CloudflarePython(Sender):
    name = "cloudflare"
    routes = frozenset({"run", "vectors"})

    async def __aenter__(self) -> Self:
        base = f"{self.edge.url}/client/v4"
        made = AsyncCloudflare(base_url=base, api_token=self.edge.key, max_retries=0)
        self._client = await self.stack.enter_async_context(made)
        return self

    async def ask(self, route: Route, body: dict[str, Any]) -> Any:
        model = MODEL if route == "run" else VECTORS
        asked = parameters(self._client.ai.run, body)
        if not body.get("stream"):
            return await plain(await self._client.ai.run(model, account_id=ACCOUNT, **asked))
        streaming = self._client.ai.with_streaming_response
        async with streaming.run(model, account_id=ACCOUNT, **asked) as answer:
            return events([line async for line in answer.iter_lines()])


class AnthropicPython(Sender):
    name = "anthropic"
    routes = frozenset({"messages"})

    async def __aenter__(self) -> Self:
        made = AsyncAnthropic(base_url=self.edge.ai, api_key=self.edge.key, max_retries=0)
        self._client = await self.stack.enter_async_context(made)
        return self

    async def ask(self, route: Route, body: dict[str, Any]) -> Any:
        create: Any = self._client.messages.create
        return await plain(await create(**parameters(create, body)))


def events(lines: list[str]) -> list[Any]:
    """The JSON of server-sent events."""
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [msgspec.json.decode(one) for one in data if one != "[DONE]"]


def parameters(create: Callable[..., Any], body: Mapping[str, Any]) -> dict[str, Any]:
    """Those that a method has, and the others as its further body."""
    known = inspect.signature(create).parameters
    further = {name: value for name, value in body.items() if name not in known}
    named = {name: value for name, value in body.items() if name in known}
    return named | ({"extra_body": further} if further else {})


async def plain(answer: Any) -> Any:
    """What a client hands back, as JSON has it."""
    if isinstance(answer, AsyncIterator):
        return [await plain(one) async for one in answer]
    return answer.model_dump() if isinstance(answer, BaseModel) else answer
