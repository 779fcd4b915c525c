"""Asking a server for streamed chat completions, and waiting for one that is starting."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter

import anyio
import httpx2

from loadtest.bench.streams import Answered, BrokenStream, StreamReader

ANSWER_S = 600.0  # without a byte for so long, a server is taken to be stuck
POLL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Whom to ask, and how."""

    url: str  # up to but without /chat/completions
    model: str
    token: str | None = None
    extra: Mapping[str, object] = field(default_factory=dict)  # of the body, beside the usual
    marks_end: bool = True  # by [DONE]; without, an answer's usage is its end


class Client:
    """Asks one server. Made by `client`."""

    def __init__(self, http: httpx2.AsyncClient, target: Target) -> None:
        self._http = http
        self._target = target

    async def ask(self, prompt: str, max_tokens: int) -> Answered:
        """One answer, greedy and read to its end. BrokenStream when there is none."""
        target = self._target
        body = {
            "model": target.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **target.extra,
        }
        reader = StreamReader(perf_counter(), marks_end=target.marks_end)
        url = f"{target.url}/chat/completions"
        try:
            async with self._http.stream("POST", url, json=body) as response:
                if response.status_code != httpx2.codes.OK:
                    said = (await response.aread()).decode(errors="replace")
                    raise BrokenStream(f"{url}: status {response.status_code}: {said}")
                async for chunk in response.aiter_raw():
                    reader.feed(chunk, perf_counter())
        except httpx2.HTTPError as exc:
            raise BrokenStream(f"{url}: {type(exc).__name__}: {exc}") from exc
        return reader.end(perf_counter())


@asynccontextmanager
async def client(target: Target) -> AsyncGenerator[Client, None]:
    """Of `target`, for the length of the block."""
    headers = {"authorization": f"Bearer {target.token}"} if target.token else {}
    # One connection a request: kept ones race with servers that close them when idle.
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx2.AsyncClient(
        headers=headers, limits=limits, timeout=ANSWER_S, trust_env=False
    ) as http:
        yield Client(http, target)


async def wait_ready(url: str, within_s: float) -> None:
    """Until GET `url` is answered with 200; TimeoutError after `within_s` seconds."""
    async with httpx2.AsyncClient(timeout=POLL_S * 50, trust_env=False) as http:
        with anyio.fail_after(within_s):
            while True:
                if await _answers(http, url):
                    return
                await anyio.sleep(POLL_S)


async def _answers(http: httpx2.AsyncClient, url: str) -> bool:
    try:
        return (await http.get(url)).status_code == httpx2.codes.OK
    except httpx2.HTTPError:
        return False
