"""Tries and other models: what headers and bodies ask for, and what comes of it over HTTP."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest

from edge.checks import BadField, read
from edge.fallback import Plan, carry_out, first_within, models_of, plan_of
from routing import wire
from routing.errors import Code, Failure
from tests.fakes.counting_region import MODEL, CountingRegion, Gate, refusing, running
from tests.fakes.edge_client import EdgeClient, edge_over
from tests.fakes.events import frames

OTHER = "@cf/test/other"
FULL = Failure(Code.NO_CAPACITY, "full", retry_after_s=2.0)


def tries(plan: Plan) -> list[tuple[int, str, float, float | None]]:
    return [(it.step, it.model, it.delay_s, it.first_s) for it in plan.tries()]


def test_without_headers_there_is_one_try() -> None:
    plan = plan_of({}, "a")
    assert plan.is_plain
    assert tries(plan) == [(0, "a", 0.0, None)]


def test_each_model_is_tried_as_often_as_was_said_and_the_last_try_waits() -> None:
    headers = {"cf-aig-max-attempts": "2", "cf-aig-request-timeout": "1500"}
    plan = plan_of(headers | {"cf-aig-retry-delay": "100"}, "a", ("b",))
    assert tries(plan) == [
        (0, "a", 0.0, 1.5),
        (0, "a", 0.1, 1.5),
        (1, "b", 0.0, 1.5),
        (1, "b", 0.1, None),
    ]


@pytest.mark.parametrize(
    ("backoff", "delays"),
    [
        ("constant", [0.0, 0.2, 0.2, 0.2, 0.2]),
        ("linear", [0.0, 0.2, 0.4, 0.6, 0.8]),
        ("Exponential", [0.0, 0.2, 0.4, 0.8, 1.6]),
    ],
)
def test_delays_grow_as_was_said(backoff: str, delays: list[float]) -> None:
    headers = {"cf-aig-max-attempts": "5", "cf-aig-retry-delay": "200", "cf-aig-backoff": backoff}
    assert [it.delay_s for it in plan_of(headers, "a").tries()] == pytest.approx(delays)


def test_with_one_attempt_a_timeout_holds_to_the_end() -> None:
    plan = plan_of({"cf-aig-request-timeout": "50", "cf-aig-fallback-models": "b, c ,b,"}, "a")
    assert tries(plan) == [(0, "a", 0.0, 0.05), (1, "b", 0.0, 0.05), (2, "c", 0.0, 0.05)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cf-aig-request-timeout", "0"),
        ("cf-aig-request-timeout", "1.5"),
        ("cf-aig-request-timeout", "-1"),
        ("cf-aig-request-timeout", ""),
        ("cf-aig-max-attempts", "6"),
        ("cf-aig-max-attempts", "0"),
        ("cf-aig-retry-delay", "5001"),
        ("cf-aig-retry-delay", "99999999999"),
        ("cf-aig-backoff", "random"),
        ("cf-aig-fallback-models", ",".join("abcdefgh")),
        ("cf-aig-fallback-models", "x" * 129),
        ("cf-aig-fallback-models", "é"),
    ],
)
def test_a_wrong_header_is_named(name: str, value: str) -> None:
    with pytest.raises(BadField) as caught:
        plan_of({name: value}, "m")
    assert name in caught.value.detail


def test_models_of_a_body() -> None:
    def models(body: str) -> tuple[str, ...]:
        return models_of(read(body.encode()))

    assert models('{"model": "a"}') == ("a",)
    assert models('{"model": "a", "models": null}') == ("a",)
    assert models('{"model": "a", "models": ["b", "a", "c"]}') == ("a", "b", "c")
    assert models('{"models": ["b", "c"]}') == ("b", "c")


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ("{}", "/model"),
        ('{"model": ""}', "/model"),
        ('{"models": []}', "/model"),
        ('{"model": "a", "models": "b"}', "/models"),
        ('{"model": "a", "models": ["b", 7]}', "/models/1"),
        ('{"model": "a", "models": [""]}', "/models/0"),
        ('{"model": "a", "models": ["b\\r\\nx: y"]}', "/models/0"),
        ('{"model": "a", "models": ["1","2","3","4","5","6","7","8"]}', "/models"),
    ],
)
def test_a_wrong_model_is_named(body: str, pointer: str) -> None:
    with pytest.raises(BadField) as caught:
        models_of(read(body.encode()))
    assert caught.value.pointer == pointer


async def outcome(*codes: Code | None, attempts: int = 2) -> tuple[list[str], Code | None]:
    """The models that are asked, and what is told, when tries of a and b end like this."""
    left, asked = list(codes), list[str]()

    async def attempt(one: Any) -> None:
        asked.append(one.model)
        if code := left.pop(0):
            raise Failure(code, f"try {len(asked)}")

    try:
        await carry_out(Plan(models=("a", "b"), attempts=attempts), attempt, lambda: False)
    except Failure as failure:
        return asked, failure.code
    return asked, None


async def test_what_another_try_may_mend_is_tried_again() -> None:
    assert await outcome(Code.NO_CAPACITY, None) == (["a", "a"], None)
    assert await outcome(Code.LOST, Code.TIMEOUT, None) == (["a", "a", "b"], None)
    full = [Code.NO_CAPACITY] * 4
    assert await outcome(*full) == (["a", "a", "b", "b"], Code.NO_CAPACITY)


async def test_a_model_that_is_not_there_is_asked_once() -> None:
    assert await outcome(Code.UNKNOWN_MODEL, None) == (["a", "b"], None)
    asked = ["a", "b"]
    assert await outcome(*[Code.UNKNOWN_MODEL] * 2) == (asked, Code.UNKNOWN_MODEL)
    assert await outcome(Code.UNKNOWN_MODEL, Code.BAD_INPUT) == (asked, Code.BAD_INPUT)


async def test_what_no_model_mends_is_told_at_once() -> None:
    for code in (Code.QUOTA, Code.RATE_LIMITED, Code.UNAUTHENTICATED, Code.ABORTED):
        assert await outcome(code) == (["a"], code)


async def test_what_has_begun_is_not_begun_again() -> None:
    async def attempt(one: Any) -> None:
        raise Failure(Code.LOST, "in mid-stream")

    with pytest.raises(Failure, match="mid-stream"):
        await carry_out(Plan(models=("a", "b")), attempt, lambda: True)


async def test_only_the_first_part_has_to_come_in_time() -> None:
    with first_within(0.05) as come:
        come()
        await anyio.sleep(0.1)
    with pytest.raises(Failure) as caught, first_within(0.05):
        await anyio.sleep(5)
    assert (caught.value.code, caught.value.code.meaning.status) == (Code.TIMEOUT, 408)


def slow_first(times: int, seconds: float = 60.0) -> Gate:
    """A gate at which the first token of the first `times` requests takes so long."""
    left = times

    async def gate(request: wire.Generate, index: int) -> None:
        nonlocal left
        if index == 0 and left:
            left -= 1
            await anyio.sleep(seconds)

    return gate


@asynccontextmanager
async def two_models(
    home: Path, change: Callable[[CountingRegion], None] = lambda region: None
) -> AsyncGenerator[tuple[EdgeClient, CountingRegion, CountingRegion], None]:
    """An edge over a region for each of two models; the first is changed before it starts."""
    first, second = CountingRegion("weur"), CountingRegion("enam", model=OTHER)
    change(first)
    async with running(first, second), edge_over(home, [first.region, second.region]) as edge:
        yield edge, first, second


async def ask(edge: EdgeClient, headers: dict[str, str], **fields: Any) -> httpx2.Response:
    body = {"prompt": "AB", "raw": True, "max_tokens": 3, **fields}
    return await edge.http.post(edge.run_url, json=body, headers=edge.headers() | headers)


async def test_a_busy_region_is_tried_again(tmp_path: Path) -> None:
    def busy(region: CountingRegion) -> None:
        region.gate = refusing(FULL, times=2)

    async with two_models(tmp_path, busy) as (edge, first, _):
        began = time.monotonic()
        answer = await ask(edge, {"cf-aig-max-attempts": "3", "cf-aig-retry-delay": "100"})
        assert time.monotonic() - began >= 0.2
        assert answer.json()["result"]["response"] == "CDE"
        assert (answer.headers["cf-aig-step"], answer.headers["cf-aig-model"]) == ("0", MODEL)
        assert len(first.asked) == 3
        assert (await ask(edge, {})).status_code == 200


async def test_another_model_answers_and_says_so_on_both_apis(tmp_path: Path) -> None:
    def busy(region: CountingRegion) -> None:
        region.gate = refusing(FULL)

    async with two_models(tmp_path, busy) as (edge, _, second):
        native = await ask(edge, {"cf-aig-fallback-models": OTHER})
        assert native.json()["result"]["response"] == "CDE"
        told = await edge.chat("Hello", models=[OTHER])
        assert told.json()["model"] == OTHER
        for answer in (native, told):
            assert answer.headers["cf-aig-step"] == "1"
            assert answer.headers["cf-aig-model"] == OTHER
            assert answer.headers["x-served-by"] == "enam"
        assert [it.model for it in second.asked] == [OTHER, OTHER]
        assert (await edge.chat("Hello")).status_code == 429


async def test_a_model_that_nobody_serves_is_passed_over(tmp_path: Path) -> None:
    async with two_models(tmp_path) as (edge, _, _):
        answer = await edge.chat("Hello", model="@cf/no/such", models=[MODEL, OTHER])
        assert (answer.status_code, answer.json()["model"]) == (200, MODEL)
        url = edge.run_url.replace(MODEL, "@cf/no/such")
        headers = edge.headers() | {"cf-aig-fallback-models": f"@cf/not/this,{OTHER}"}
        body = {"prompt": "AB", "raw": True, "max_tokens": 3}
        answer = await edge.http.post(url, json=body, headers=headers)
        assert answer.headers["cf-aig-step"] == "2"
        none = await edge.chat("Hello", model="@cf/no/such", models=["@cf/nor/this"])
        assert (none.status_code, none.json()["errors"][0]["code"]) == (400, 5007)


async def test_a_first_part_that_is_late_is_a_timeout_or_anothers_turn(tmp_path: Path) -> None:
    def slow(region: CountingRegion) -> None:
        region.gate = slow_first(10**6)

    late = {"cf-aig-request-timeout": "200"}
    async with two_models(tmp_path, slow) as (edge, first, _):
        answer = await ask(edge, late)
        assert (answer.status_code, answer.json()["errors"][0]["code"]) == (408, 3007)
        assert "0.2 s" in answer.json()["errors"][0]["message"]
        await first.wait_idle()  # it was hung up on
        answer = await ask(edge, late | {"cf-aig-fallback-models": OTHER})
        assert answer.headers["cf-aig-model"] == OTHER


async def test_the_last_of_several_tries_waits(tmp_path: Path) -> None:
    def slow(region: CountingRegion) -> None:
        region.gate = slow_first(3, seconds=0.6)

    async with two_models(tmp_path, slow) as (edge, first, _):
        headers = {"cf-aig-request-timeout": "200", "cf-aig-max-attempts": "3"}
        answer = await ask(edge, headers)
        assert answer.json()["result"]["response"] == "CDE"
        assert len(first.asked) == 3


async def test_a_stream_that_has_begun_in_time_may_take_its_time(tmp_path: Path) -> None:
    async def pause(request: wire.Generate, index: int) -> None:
        await anyio.sleep(0.4 if index else 0.0)

    def slow(region: CountingRegion) -> None:
        region.gate = pause

    async with two_models(tmp_path, slow) as (edge, _, _):
        body = {"prompt": "AB", "raw": True, "max_tokens": 3, "stream": True}
        headers = edge.headers() | {"cf-aig-request-timeout": "300"}
        async with edge.http.stream("POST", edge.run_url, json=body, headers=headers) as answer:
            assert answer.status_code == 200
            told = [frame async for frame in frames(answer)]
        assert told[-1] == "[DONE]"
        assert "cf-aig-step" not in answer.headers


async def test_a_wrong_header_is_a_400(tmp_path: Path) -> None:
    async with two_models(tmp_path) as (edge, first, _):
        answer = await ask(edge, {"cf-aig-max-attempts": "many"})
        assert (answer.status_code, answer.json()["errors"][0]["code"]) == (400, 5006)
        assert "cf-aig-max-attempts" in answer.json()["errors"][0]["message"]
        assert not first.asked


async def test_several_choices_turn_to_another_model_together(tmp_path: Path) -> None:
    def busy(region: CountingRegion) -> None:
        region.gate = refusing(FULL)

    async with two_models(tmp_path, busy) as (edge, first, second):
        answer = await edge.chat("Hello", models=[OTHER], n=3, seed=5, max_tokens=4)
        assert answer.status_code == 200
        body = answer.json()
        assert (body["model"], len(body["choices"])) == (OTHER, 3)
        assert body["usage"]["completion_tokens"] == 12
        assert answer.headers["cf-aig-model"] == OTHER
        assert sorted(it.sampling.seed for it in second.asked) == [5, 6, 7]
        assert {it.model for it in first.asked} == {MODEL}


async def test_every_api_of_v1_takes_models(tmp_path: Path) -> None:
    def busy(region: CountingRegion) -> None:
        region.gate = refusing(FULL)

    common = {"model": MODEL, "models": [OTHER], "max_tokens": 3}
    turns = [{"role": "user", "content": "Hello"}]
    bodies = {
        "completions": common | {"prompt": "AB"},
        "messages": common | {"messages": turns},
        "responses": {"model": MODEL, "models": [OTHER], "input": "Hello"},
    }
    async with two_models(tmp_path, busy) as (edge, first, second):
        for route, body in bodies.items():
            body |= {"options": {"rejectIfBusy": True}}
            answer = await edge.http.post(
                f"{edge.ai}/v1/{route}", json=body, headers=edge.headers()
            )
            assert (answer.status_code, answer.json()["model"]) == (200, OTHER), route
        assert all(it.reject_if_busy for it in (*first.asked, *second.asked))
