"""Limits over HTTP: who is refused, with which code, headers and time; and what is charged."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import anyio
import httpx2
import pytest

from edge import keys
from edge.allowance import Allowance
from edge.app import unix_time
from edge.auth import tenant_of
from edge.limits import parse_limit
from edge.meter import Meter
from edge.metrics import Record
from edge.prices import Prices
from routing.errors import Code, Failure
from tests.fakes.counting_region import MODEL, CountingRegion, refusing, running
from tests.fakes.edge_client import ACCOUNT, EdgeClient, edge_over


@asynccontextmanager
async def limited(
    home: Path, *limits: str, account: str = ACCOUNT, **settings: Any
) -> AsyncGenerator[EdgeClient, None]:
    """An edge, and a client whose key has these limits."""
    settings = {"ledger": home / "usage" / "ledger.sqlite"} | settings
    fake = CountingRegion()
    async with running(fake), edge_over(home, [fake.region], **settings) as edge:
        grant = keys.Grant(limits=limits)
        key = keys.create(home / "keys", account, days=1, now=unix_time(), grant=grant)
        yield replace(edge, key=key)


def error_of(answer: httpx2.Response) -> tuple[int, int]:
    (error,) = answer.json()["errors"]
    return answer.status_code, error["code"]


async def test_a_keys_rate_is_kept_on_both_apis(tmp_path: Path) -> None:
    async with limited(tmp_path, "text-generation=2/hour") as edge:
        first = await edge.raw("A")
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert (await edge.chat("Hello")).headers["x-ratelimit-remaining-requests"] == "0"
        refused = await edge.raw("A")
        assert error_of(refused) == (429, 2003)
        assert 3590 <= int(refused.headers["retry-after"]) <= 3600
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert "x-should-retry" not in refused.headers
        refused = await edge.chat("Hello")
        assert refused.status_code == 429
        error = refused.json()["error"]
        assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
        assert "2 requests" in error["message"]


async def test_another_key_of_the_account_has_its_own_count(tmp_path: Path) -> None:
    async with limited(tmp_path, "requests=1/hour") as edge:
        assert (await edge.raw("A")).status_code == 200
        assert (await edge.raw("A")).status_code == 429
        key = keys.create(tmp_path / "keys", ACCOUNT, days=1, now=unix_time())
        answer = await replace(edge, key=key).raw("A")
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("x-ratelimit")]
    assert not (tmp_path / "usage" / "limits.sqlite-journal").exists()


async def test_bad_bodies_and_unknown_models_are_not_counted(tmp_path: Path) -> None:
    async with limited(tmp_path, "requests=1/hour") as edge:
        assert (await edge.raw("")).status_code == 400
        assert (await edge.chat("Hello", model="@cf/no/such")).status_code == 400
        assert (await edge.raw("A")).status_code == 200


async def test_a_model_that_is_turned_to_is_counted_as_such(tmp_path: Path) -> None:
    """Whatever was asked for before it, and other limits once."""
    async with limited(tmp_path, f"{MODEL}=2/hour", "requests=3/hour") as edge:
        for left in ("1", "0"):
            answer = await edge.chat("Hello", model="@cf/no/such", models=[MODEL])
            assert answer.status_code == 200
            assert answer.headers.get_list("x-ratelimit-remaining-requests") == [left]
        refused = await edge.chat("Hello", model="@cf/no/such", models=[MODEL])
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
        assert f"2 requests ({MODEL})" in refused.json()["error"]["message"]
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"


async def test_a_token_budget_is_used_up_by_what_was_told(tmp_path: Path) -> None:
    async with limited(tmp_path, "tokens=20/day") as edge:
        answer = await edge.raw("AB", 5)
        used = answer.json()["result"]["usage"]["total_tokens"]
        assert answer.headers["x-ratelimit-remaining-tokens"] == "20"
        answer = await edge.raw("AB", 5)
        assert answer.headers["x-ratelimit-remaining-tokens"] == str(20 - used)
        while (answer := await edge.raw("AB", 5)).status_code == 200:
            used += answer.json()["result"]["usage"]["total_tokens"]
            assert used <= 40
        assert error_of(answer) == (429, 3036)
        assert 0 < int(answer.headers["retry-after"]) <= 86_400
        assert answer.headers["x-should-retry"] == "false"
        assert "daily allocation of 20 tokens" in answer.json()["errors"][0]["message"]
        told = (await edge.chat("Hello")).json()["error"]
        assert (told["code"], told["type"]) == ("insufficient_quota", "insufficient_quota")


async def test_what_finds_no_room_uses_no_tokens(tmp_path: Path) -> None:
    """However often it is tried, as by jobs and clients."""
    fake = CountingRegion()
    fake.started_gate = refusing(Failure(Code.NO_CAPACITY, "full"), times=5)
    async with running(fake), edge_over(tmp_path, [fake.region]) as edge:
        grant = keys.Grant(limits=("tokens=10/day",))
        key = keys.create(tmp_path / "keys", ACCOUNT, days=1, now=unix_time(), grant=grant)
        edge = replace(edge, key=key)
        for _ in range(5):
            assert error_of(await edge.raw("ABCDE", 1)) == (429, 3040)
        answer = await edge.raw("ABCDE", 1)
        assert answer.headers["x-ratelimit-remaining-tokens"] == "10"


async def test_spending_ends_where_it_was_said(tmp_path: Path) -> None:
    async with limited(tmp_path, "usd=0.000001/month") as edge:
        statuses = [(await edge.raw("AB", 5)).status_code for _ in range(4)]
        assert statuses[0] == 200
        assert statuses[-1] == 429  # 5 tokens of an 8B model, as it is taken to be, cost 2e-6 USD


async def test_the_daily_allocation_of_workers_ai_is_the_accounts(tmp_path: Path) -> None:
    async with limited(tmp_path, limits="workers-ai") as edge:
        answer = await edge.raw("A")
        assert answer.headers["x-ratelimit-limit-requests"] == "300"
        async with anyio.create_task_group() as tasks:
            codes: list[int] = []

            async def ask() -> None:
                codes.append((await edge.raw("A", 1)).status_code)

            for _ in range(310):
                tasks.start_soon(ask)
        assert (codes.count(200), codes.count(429)) == (299, 11)


async def test_with_limits_off_there_are_none(tmp_path: Path) -> None:
    async with limited(tmp_path) as edge:
        assert (await edge.raw("A")).status_code == 200
    assert not (tmp_path / "usage" / "limits.sqlite").exists()


async def test_limits_hold_while_their_file_is_away(tmp_path: Path) -> None:
    (tmp_path / "usage" / "limits.sqlite").mkdir(parents=True)
    async with limited(tmp_path, "requests=2/hour") as edge:
        codes = [(await edge.raw("A")).status_code for _ in range(3)]
    assert codes == [200, 200, 429]


async def test_a_keys_priority_goes_with_its_requests(tmp_path: Path) -> None:
    fake = CountingRegion("weur")
    async with running(fake), edge_over(tmp_path, [fake.region]) as edge:
        grant = keys.Grant(priority=-7)
        key = keys.create(tmp_path / "keys", ACCOUNT, days=1, now=unix_time(), grant=grant)
        await replace(edge, key=key).raw("A", options={"rejectIfBusy": True})
        await edge.raw("A")
    assert [(it.priority, it.reject_if_busy) for it in fake.asked] == [(-7, True), (0, False)]
    assert fake.asked[0].model == MODEL


async def test_every_choice_is_charged_and_the_prompt_once(tmp_path: Path) -> None:
    async with limited(tmp_path, "tokens=1000/day") as edge:
        answer = await edge.chat("Hello", n=3, max_tokens=4)
        used = answer.json()["usage"]["total_tokens"]
        assert answer.headers["x-ratelimit-remaining-tokens"] == "1000"
        answer = await edge.chat("Hello", max_tokens=1)
        assert answer.headers["x-ratelimit-remaining-tokens"] == str(1000 - used)


async def test_anthropics_clients_are_told_in_their_words(tmp_path: Path) -> None:
    async with limited(tmp_path, "requests=0/min") as edge:
        body = {"model": MODEL, "max_tokens": 3, "messages": [{"role": "user", "content": "A"}]}
        answer = await edge.http.post(f"{edge.ai}/v1/messages", json=body, headers=edge.headers())
        assert answer.status_code == 429
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert int(answer.headers["retry-after"]) == 60


async def test_who_hangs_up_while_it_waits_to_be_counted_takes_no_charge_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What others have used is counted all the same."""
    limit = parse_limit("tokens=100/day")
    meter, gate = Meter(None, lambda: 1000.0), threading.Event()
    admit = meter.admit

    def slow(*asked: Any) -> Any:
        gate.wait(10)
        return admit(*asked)

    allowance = Allowance([limit], meter, Prices({}))
    tenant = tenant_of("acme", "k", keys.Grant())

    def record() -> Record:
        return Record(request_id="r", started=0.0)

    ended = record()
    await allowance.admit(ended, tenant, MODEL)
    ended.tries.num_prompt, ended.num_output = 60, 0
    ended.tries.answers.append(cast("Any", SimpleNamespace(cached_tokens=0)))
    monkeypatch.setattr(meter, "admit", slow)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(allowance.admit, record(), tenant, MODEL)
        await anyio.wait_all_tasks_blocked()
        allowance.note(ended)
        with anyio.move_on_after(0.05):
            await allowance.admit(record(), tenant, MODEL)  # behind the one that takes long
        gate.set()
    last = record()
    await allowance.admit(last, tenant, MODEL)
    assert [it.remaining for it in last.standings] == [40]
    allowance.close()
