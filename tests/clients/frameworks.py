"""LiteLLM and LangChain: clients with parameters of their own, which become an API's fields."""

from __future__ import annotations

import gc
from typing import Any

import aiohttp
import litellm
from langchain_cloudflare import (
    ChatCloudflareWorkersAI,
    CloudflareWorkersAIEmbeddings,
    CloudflareWorkersAIReranker,
)
from pydantic import SecretStr

from tests.clients.fields import VECTORS, Route, Row
from tests.clients.senders import Sender, parameters, plain
from tests.fakes.counting_region import MODEL
from tests.fakes.edge_client import ACCOUNT


async def close_sessions() -> None:
    """LiteLLM leaves its sessions open: Python would say so in whatever test it collects them."""
    for thing in gc.get_objects():
        if isinstance(thing, aiohttp.ClientSession):
            await thing.close()


# Fields that LiteLLM drops or refuses by itself.
_KEPT = {
    ("completions", "max_completion_tokens"),
    ("completions", "response_format"),
    ("embeddings", "dimensions"),
}


class LiteLLM(Sender):
    """By its provider `openai/`."""

    name = "litellm"
    routes = frozenset({"chat", "completions", "embeddings", "responses"})

    @classmethod
    def sends(cls, row: Row) -> bool:
        """Not what it keeps to itself, whoever asks."""
        return super().sends(row) and (row.route, row.field) not in _KEPT

    async def __aexit__(self, *_: object) -> None:
        await close_sessions()

    async def ask(self, route: Route, body: dict[str, Any]) -> Any:
        ask: Any = {
            "chat": litellm.acompletion,
            "completions": litellm.atext_completion,
            "embeddings": litellm.aembedding,
            "responses": litellm.aresponses,
        }[route]
        about = {"api_base": f"{self.edge.url}/v1", "api_key": self.edge.key, "max_retries": 0}
        body = body | {"model": f"openai/{body['model']}"}
        if route == "responses":  # the others take any name
            body = parameters(ask, body)
        return await plain(await ask(**body | about))


# What its models have parameters for; other fields are its `model_kwargs`.
_OF_LANGCHAIN = frozenset(
    [
        *("temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty"),
        *("repetition_penalty", "max_tokens"),
    ]
)


class LangChain(Sender):
    """`ChatCloudflareWorkersAI`, natively and by OpenAI's route; its embeddings and reranker."""

    name = "langchain"
    routes = frozenset({"run", "chat", "vectors"})

    @classmethod
    def sends(cls, row: Row) -> bool:
        if not super().sends(row) or row.of_answer:
            return False
        return "prompt" not in row.body and "pooling" not in row.body

    async def __aexit__(self, *_: object) -> None:
        gc.collect()  # it leaves its connections to the collector

    async def ask(self, route: Route, body: dict[str, Any]) -> Any:
        if route == "vectors":
            return await self._vectors(body)
        fields = dict(body)
        messages, tools = fields.pop("messages"), fields.pop("tools", None)
        fields.pop("model", None)
        streams, options = fields.pop("stream", False), fields.pop("options", {})
        chat: Any = ChatCloudflareWorkersAI(
            account_id=ACCOUNT,
            api_token=SecretStr(self.edge.key),
            model=MODEL,
            base_url=f"{self.edge.url}/client/v4",
            endpoint_format="workers_ai" if route == "run" else "openai_compatible",
            max_retries=0,
            reject_if_busy=options.get("rejectIfBusy"),
            model_kwargs={name: it for name, it in fields.items() if name not in _OF_LANGCHAIN},
            **{name: it for name, it in fields.items() if name in _OF_LANGCHAIN},
        )
        if tools:
            chat = chat.bind_tools(tools)
        if streams:
            return [one.model_dump() async for one in chat.astream(messages)]
        return (await chat.ainvoke(messages)).model_dump()

    async def _vectors(self, body: dict[str, Any]) -> Any:
        about: Any = {
            "api_base_url": f"{self.edge.url}/client/v4/accounts",
            "account_id": ACCOUNT,
            "api_token": SecretStr(self.edge.key),
            "model_name": VECTORS,
            "reject_if_busy": body.get("options", {}).get("rejectIfBusy"),
        }
        if "query" in body:
            contexts = [it["text"] for it in body["contexts"]]
            return await CloudflareWorkersAIReranker(**about).arerank(
                body["query"], contexts, top_k=body.get("top_k")
            )
        texts = [body["text"]] if isinstance(body["text"], str) else body["text"]
        return await CloudflareWorkersAIEmbeddings(**about).aembed_documents(texts)
