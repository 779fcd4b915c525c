"""One request to a running edge, as any client would send it, and how it went.

It is streamed where the model makes text.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx2
import msgspec

from routing.region import Task

QUESTION = "In two sentences: why is the sky blue?"
TIMEOUT_S = 300.0  # a first step may still compile or page in


class FirstRunFailed(Exception):
    """The fleet is up, but does not answer as it should."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Where to ask, as whom, for which model."""

    edge_url: str
    account: str
    key: str
    model: str
    task: Task = "text-generation"

    @property
    def url(self) -> str:
        return f"{self.edge_url}/client/v4/accounts/{self.account}/ai/run/{self.model}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    region: str
    ttft_s: float
    decode_s: float  # from the first text to the last
    usage: dict[str, int]  # empty: the answer is a vector

    def lines(self) -> list[str]:
        """For a person to read."""
        if not self.usage:
            return [f"served by {self.region}   {1000 * self.ttft_s:.0f} ms"]
        made = self.usage.get("completion_tokens", 0)
        # The first token came with the prefill: n tokens are n - 1 intervals.
        rate = f"{(made - 1) / self.decode_s:.1f} tokens/s" if made > 1 and self.decode_s else "-"
        asked = self.usage.get("prompt_tokens", 0)
        return [
            f"served by {self.region}   TTFT {1000 * self.ttft_s:.0f} ms   {rate}",
            f"usage: {asked} prompt + {made} completion = {asked + made} tokens",
        ]


def body(task: Task) -> dict[str, Any]:
    """The input of the first run; the same answer every time."""
    if task == "text-embeddings":
        return {"text": QUESTION}
    messages = [{"role": "user", "content": QUESTION}]
    return {"messages": messages, "max_tokens": 128, "temperature": 0, "stream": True}


def curl_line(caller: Caller) -> str:
    """The same request for a shell."""
    words = ["curl", "-N", caller.url, "-H", f"authorization: Bearer {caller.key}"]
    return shlex.join([*words, "-d", msgspec.json.encode(body(caller.task)).decode()])


async def first_run(caller: Caller, write: Callable[[str], None]) -> Outcome:
    """Ask, and `write` the text as it comes. FirstRunFailed with what the edge said."""
    headers = {"authorization": f"Bearer {caller.key}"}
    start = time.monotonic()
    try:
        async with (
            httpx2.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client,
            client.stream("POST", caller.url, json=body(caller.task), headers=headers) as answer,
        ):
            if answer.status_code != 200:
                said = (await answer.aread()).decode(errors="replace")
                raise FirstRunFailed(f"HTTP {answer.status_code}: {said}")
            read = _read_vector if caller.task == "text-embeddings" else _read
            return await read(answer, start, write)
    except httpx2.TransportError as exc:
        raise FirstRunFailed(f"{caller.edge_url}: {exc!r}") from exc


async def _read(answer: httpx2.Response, start: float, write: Callable[[str], None]) -> Outcome:
    times: list[float] = []  # of each piece of text
    usage: dict[str, int] = {}
    async for line in answer.aiter_lines():
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            break
        if data == line:
            continue  # between two events
        event = msgspec.json.decode(data)
        if text := event.get("response"):
            times.append(time.monotonic())
            write(text)
        usage = event.get("usage") or usage
    else:
        raise FirstRunFailed("the stream ended early, without [DONE]")
    if not times:
        raise FirstRunFailed("the stream had no text")
    return Outcome(
        region=answer.headers.get("x-served-by", "?"),
        ttft_s=times[0] - start,
        decode_s=times[-1] - times[0],
        usage=usage,
    )


async def _read_vector(
    answer: httpx2.Response, start: float, write: Callable[[str], None]
) -> Outcome:
    [vector] = msgspec.json.decode(await answer.aread())["result"]["data"]
    took_s = time.monotonic() - start
    write(f"a vector of {len(vector)} numbers")
    region = answer.headers.get("x-served-by", "?")
    return Outcome(region=region, ttft_s=took_s, decode_s=0.0, usage={})
