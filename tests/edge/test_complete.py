"""What the walk asks of a region: sampling, room for the answer, salts, and whom it may ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

from edge.ask import Ask, SamplingAsk
from edge.complete import sampling_of
from edge.tokenizer import ModelText
from routing import wire
from routing.errors import Code, Failure
from tests.fakes.counting_region import ASSETS, MODEL, CountingRegion, refusing, running
from tests.fakes.edge_client import edge_over
from tests.fakes.events import read_all
from tests.fakes.model_folder import END_ID


def sampled(ask: SamplingAsk, **defaults: float) -> wire.Sampling:
    return sampling_of(ask, defaults, stop_ids=(2,), max_tokens=5)


def test_what_the_client_says_goes_before_what_the_makers_advise() -> None:
    advised = {"temperature": 0.4, "top_p": 0.92, "top_k": 40.0, "repetition_penalty": 1.1}
    made = sampled(SamplingAsk(), **advised)
    assert (made.temperature, made.top_p, made.top_k, made.repetition_penalty) == (
        0.4,
        0.92,
        40,
        1.1,
    )
    said = SamplingAsk(temperature=0.0, top_p=0.5, top_k=7, repetition_penalty=1.0)
    made = sampled(said, **advised)
    assert (made.temperature, made.top_p, made.top_k, made.repetition_penalty) == (0.0, 0.5, 7, 1.0)


def test_without_a_word_from_either_only_the_documented_temperature_applies() -> None:
    made = sampled(SamplingAsk(seed=1))
    assert made == wire.Sampling(max_tokens=5, seed=1, temperature=0.6, stop_ids=(2,))


def test_speculation_is_on_unless_switched_off() -> None:
    assert sampled(SamplingAsk()).speculate
    assert not sampled(SamplingAsk(speculate=False)).speculate


def test_an_answer_may_go_past_the_models_end_of_text() -> None:
    assert sampled(SamplingAsk()).stop_ids
    assert sampled(SamplingAsk(ignore_eos=True)).stop_ids == ()


def test_top_p_above_one_means_all() -> None:
    assert sampled(SamplingAsk(top_p=1.7)).top_p == 1.0


def test_seeds_fit_every_engine_and_are_drawn_when_not_given() -> None:
    for seed in (0, 1, -1, 2**63 - 1, -(2**63)):
        assert 0 <= sampled(SamplingAsk(seed=seed)).seed < 2**63
    assert sampled(SamplingAsk(seed=7)).seed == 7
    assert len({sampled(SamplingAsk()).seed for _ in range(20)}) == 20


async def test_the_whole_request_reaches_the_region(tmp_path: Path) -> None:
    region = CountingRegion()
    async with running(region), edge_over(tmp_path, [region.region], budget_s=20) as edge:
        await edge.raw("AB", 9, seed=5, temperature=0.5, stop=["x"], frequency_penalty=0.25)
        await edge.chat("hi", max_tokens=3, logit_bias={"65": -1.5})
        raw, chat = region.asked
        assert raw.model == MODEL
        assert raw.token_ids == (65, 66)
        assert raw.tokenizer_digest == ASSETS.digest
        assert raw.generated_ids == ()
        assert 19 < raw.budget_s <= 20
        assert len(raw.tenant_salt) >= 16
        assert raw.tenant_salt == chat.tenant_salt
        assert raw.sampling == wire.Sampling(
            max_tokens=9, seed=5, temperature=0.5, frequency_penalty=0.25, stop_ids=(END_ID,)
        )
        assert chat.sampling.logit_bias == ((65, -1.5),)
        ask = Ask(model=MODEL, messages=({"role": "user", "content": "hi"},))
        assert chat.token_ids == ModelText(ASSETS).encode_prompt(ask)
        assert raw.request_id != chat.request_id


@pytest.mark.parametrize(
    ("prompt", "asked", "granted"),
    [
        (10, None, 50),  # the setting
        (70, None, 30),  # what is left
        (10, 80, 80),  # what is asked for, also above the setting
        (10, 10_000, 90),  # no more than is left
        (99, 1, 1),
    ],
)
async def test_max_tokens_is_what_the_context_leaves(
    tmp_path: Path, prompt: int, asked: int | None, granted: int
) -> None:
    region = CountingRegion(window=100)
    settings = {"max_output_tokens": 50}
    async with running(region), edge_over(tmp_path, [region.region], **settings) as edge:
        fields = {} if asked is None else {"max_tokens": asked}
        body = {"prompt": "A" * prompt, "raw": True, **fields}
        answer = await edge.http.post(edge.run_url, json=body, headers=edge.headers())
        assert answer.json()["result"]["usage"]["completion_tokens"] == granted
        assert region.asked[0].sampling.max_tokens == granted


async def test_a_long_request_goes_to_the_region_that_holds_it(tmp_path: Path) -> None:
    small = CountingRegion(name="small", window=100)
    large = CountingRegion(name="large", window=200, room=1)
    async with running(small, large), edge_over(tmp_path, [small.region, large.region]) as edge:
        assert (await edge.raw("A" * 60, 90)).headers["x-served-by"] == "large"
        assert (await edge.raw("A" * 60, 40)).headers["x-served-by"] == "small"
        answer = await edge.raw("A" * 201, 1)
        assert "prompt of 201 tokens exceeds the context window of 200 tokens" in answer.text


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_and_its_usage_on_both_paths(tmp_path: Path, stream: bool) -> None:
    region = CountingRegion(cached_tokens=1)
    async with running(region), edge_over(tmp_path, [region.region]) as edge:
        if stream:
            async with edge.stream("A", 60, stop=["EF", "zz"]) as response:
                text, usage, done = await read_all(response)
            assert done
        else:
            result = (await edge.raw("A", 60, stop=["EF", "zz"])).json()["result"]
            text, usage = result["response"], result["usage"]
        assert text == "BCD"
        assert usage["completion_tokens"] == 5
        assert usage["prompt_tokens_details"] == {"cached_tokens": 1}
        await region.wait_idle()


async def test_tenants_have_salts_of_their_own(tmp_path: Path) -> None:
    from edge import keys
    from edge.app import unix_time

    region = CountingRegion()
    async with running(region), edge_over(tmp_path, [region.region]) as edge:
        other = keys.create(tmp_path / "keys", "other", days=1, now=unix_time())
        await edge.raw("A", 1)
        with anyio.fail_after(10):
            answer = await edge.http.post(
                edge.run_url.replace("/acme/", "/other/"),
                json={"prompt": "A", "tenant_salt": "acme", "cache_salt": "acme"},
                headers={"authorization": f"Bearer {other}"},
            )
        assert answer.status_code == 200
        assert region.asked[0].tenant_salt != region.asked[1].tenant_salt


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"type": "function", "name": "clock", "parameters": {"type": "object", "properties": {}}}
CHAT = {"messages": [{"role": "user", "content": "A"}]}


FORMAT = {"type": "json_schema", "name": "it", "schema": SCHEMA}
FORCED = {**CHAT, "tools": [TOOL], "tool_choice": "required"}
BARE = {"type": "json_schema", "json_schema": SCHEMA}


@pytest.mark.parametrize(
    ("path", "fields", "named"),
    [
        ("chat/completions", {**CHAT, "guided_json": SCHEMA}, "guided_json"),
        ("chat/completions", {**CHAT, "guided_regex": "["}, "guided_regex"),
        ("chat/completions", {**CHAT, "response_format": BARE}, "response_format/json_schema"),
        ("chat/completions", FORCED, "tools"),
        ("responses", {"input": "A", "text": {"format": FORMAT}}, "text/format"),
        ("completions", {"prompt": "A", "guided_choice": ["B"]}, "guided_choice"),
    ],
)
async def test_what_an_engine_cannot_follow_is_named_as_the_client_has_it(
    tmp_path: Path, path: str, fields: dict[str, Any], named: str
) -> None:
    says = "AiError: Bad input: Error: '/grammar': nothing can match it"
    region = CountingRegion(started_gate=refusing(Failure(Code.BAD_INPUT, says)))
    async with running(region), edge_over(tmp_path, [region.region]) as edge:
        body = {"model": MODEL, **fields}
        answer = await edge.http.post(f"{edge.ai}/v1/{path}", json=body, headers=edge.headers())
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == named.replace("/", ".")
    assert error["message"].endswith(f"'/{named}': nothing can match it")
