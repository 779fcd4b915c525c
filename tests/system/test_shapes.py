"""Responses and Messages over real processes: two edges, one store, a region that is killed."""

from __future__ import annotations

from pathlib import Path

import anthropic
import anyio
import httpx2
import openai
import pytest

from tests.system.world import ACCOUNT, MODEL, NEAR_WEUR, Shape, World, edge_words, start, world

pytestmark = pytest.mark.system


def base(url: str) -> str:
    return f"{url}/client/v4/accounts/{ACCOUNT}/ai"


def responses_at(w: World, url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{base(url)}/v1", api_key=w.key, max_retries=0, default_headers=NEAR_WEUR
    )


async def second_edge(w: World) -> str:
    process = start(w, "edge-2", edge_words(w, w.home / "fleet.toml"))
    with anyio.fail_after(30):
        while not await _ready(w, process.url):
            await anyio.sleep(0.05)
    return process.url


async def _ready(w: World, url: str) -> bool:
    try:
        return (await w.client.get(f"{url}/ready")).status_code == 200
    except httpx2.TransportError:
        return False


@pytest.mark.slow
async def test_a_conversation_moves_between_edges_and_survives_one(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        other = await second_edge(w)
        async with responses_at(w, w.edge.url) as one, responses_at(w, other) as two:
            first = await one.responses.create(model=MODEL, input="hello", max_output_tokens=3)
            second = await two.responses.create(
                model=MODEL, input="more", previous_response_id=first.id, max_output_tokens=3
            )
            assert first.usage
            assert second.usage
            assert second.usage.input_tokens > first.usage.input_tokens + len("more")
            w.edge.kill()
            again = await two.responses.retrieve(first.id)
            assert again.to_dict() == first.to_dict()
            third = await two.responses.create(
                model=MODEL, input="last", previous_response_id=second.id, max_output_tokens=3
            )
            assert third.usage
            assert third.usage.input_tokens > second.usage.input_tokens
        await w.settled("weur-prefill", "weur-decode")


@pytest.mark.slow
async def test_a_region_is_killed_and_nothing_is_repeated(tmp_path: Path) -> None:
    async with world(tmp_path, Shape(regions=("weur", "enam"), step_s=0.02)) as w:
        async with responses_at(w, w.edge.url) as client:
            whole = await client.responses.create(
                model=MODEL, input="hello", max_output_tokens=60, store=False
            )
            texts, kinds = "", []
            stream = await client.responses.create(
                model=MODEL, input="hello", max_output_tokens=60, stream=True
            )
            async for event in stream:
                kinds.append(event.type)
                assert event.sequence_number == len(kinds) - 1
                if event.type == "response.output_text.delta":
                    texts += event.delta
                    if len(texts) == 10:
                        for name in ("weur-front", "weur-prefill", "weur-decode"):
                            w.processes[name].kill()
            assert texts == whole.output_text
            assert kinds.count("response.output_item.added") == 1
            assert kinds[-1] == "response.incomplete"
        async with anthropic.AsyncAnthropic(
            base_url=base(w.edge.url), api_key=w.key, max_retries=0
        ) as claude:
            message = await claude.messages.create(
                model=MODEL, max_tokens=60, messages=[{"role": "user", "content": "hello"}]
            )
            assert message.content[0].to_dict()["text"] == texts
        await w.settled("enam-prefill", "enam-decode")


async def test_hanging_up_frees_the_kv(tmp_path: Path) -> None:
    async with world(tmp_path, Shape(step_s=0.05)) as w:
        async with anthropic.AsyncAnthropic(
            base_url=base(w.edge.url), api_key=w.key, max_retries=0
        ) as claude:
            async with claude.messages.stream(
                model=MODEL, max_tokens=2000, messages=[{"role": "user", "content": "hello"}]
            ) as stream:
                async for _ in stream.text_stream:
                    break
            await w.settled("weur-prefill", "weur-decode")
        async with responses_at(w, w.edge.url) as client:
            events = await client.responses.create(
                model=MODEL, input="hello", max_output_tokens=2000, stream=True
            )
            async for event in events:
                if event.type == "response.output_text.delta":
                    break
            await events.close()
            await w.settled("weur-prefill", "weur-decode")
