"""What an account is told of its use."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest

from edge import keys
from edge.app import unix_time
from edge.checks import BadField
from edge.usage_page import parse
from routing.rows import connected, write
from routing.usage import LEDGER, LedgerRow
from tests.fakes.counting_region import MODEL, CountingRegion, running
from tests.fakes.edge_client import ACCOUNT, EdgeClient, edge_over

ONE_B, OTHER = "@cf/meta/llama-3.2-1b-instruct", "@cf/test/counting"
NOW = datetime(2026, 11, 27, 15, tzinfo=UTC).timestamp()


def row(number: int, when: str, **more: Any) -> LedgerRow:
    ended = datetime.fromisoformat(when).replace(tzinfo=UTC).timestamp()
    fields = {
        "request_id": f"r{number}",
        "account": ACCOUNT,
        "key_id": "k1",
        "tenant": "t",
        "model": ONE_B,
        "regions": "weur",
        "prompt_tokens": 1000,
        "completion_tokens": 100,
        "cached_tokens": 0,
        "outcome": "ok",
        "whole": True,
        "started": ended - 1,
        "ended": ended,
    }
    return LedgerRow(**(fields | more))


ROWS = [
    row(1, "2026-11-25T00:00:00"),
    row(2, "2026-11-25T23:59:59", cached_tokens=400, key_id="k2"),
    row(3, "2026-11-26T12:00:00", model=OTHER),
    row(4, "2026-11-26T12:00:00", account="somebody-else"),
]
OF_ANOTHER_EDGE = [row(5, "2026-11-27T00:00:00")]


class Asked:
    """A client of an edge that keeps these rows, with those of another edge beside them."""

    def __init__(self, edge: EdgeClient) -> None:
        self._edge = edge

    async def get(self, **params: str) -> httpx2.Response:
        url, headers = f"{self._edge.ai}/usage", self._edge.headers()
        return await self._edge.http.get(url, params=params, headers=headers)

    async def rows(self, **params: str) -> list[dict[str, Any]]:
        answer = await self.get(**params)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert (body["success"], body["errors"], body["messages"]) == (True, [], [])
        result: list[dict[str, Any]] = body["result"]
        return result


@pytest.fixture
async def asked(tmp_path: Path) -> Any:
    usage = tmp_path / "usage"
    for name, rows in (("ledger.sqlite", ROWS), ("ledger-2.sqlite", OF_ANOTHER_EDGE)):
        with connected(usage / name, LEDGER) as connection:
            write(connection, LEDGER, rows)
    fake = CountingRegion()
    async with (
        running(fake),
        edge_over(tmp_path, [fake.region], ledger=usage / "ledger.sqlite") as edge,
    ):
        yield Asked(edge)


SINCE = {"from": "2026-11-01", "to": "2026-11-30"}


async def test_by_day_with_what_it_cost(asked: Asked) -> None:
    rows = await asked.rows(**SINCE)
    assert [it["day"] for it in rows] == ["2026-11-25", "2026-11-26", "2026-11-27"]
    first = rows[0]
    assert (first["requests"], first["prompt_tokens"], first["completion_tokens"]) == (2, 2000, 200)
    assert first["cached_tokens"] == 400
    neurons = (1600 * 2457 + 400 * 2457 / 5 + 200 * 18252) / 1e6
    assert first["neurons"] == pytest.approx(neurons, abs=1e-6)
    assert first["usd"] == pytest.approx(neurons * 0.011 / 1000, abs=1e-9)


async def test_by_model_and_by_key(asked: Asked) -> None:
    by_model = {it["model"]: it["requests"] for it in await asked.rows(**SINCE, group_by="model")}
    assert by_model == {ONE_B: 3, OTHER: 1}
    by_key = {it["key"]: it["requests"] for it in await asked.rows(**SINCE, group_by="key")}
    assert by_key == {"k1": 3, "k2": 1}
    only = await asked.rows(**SINCE, model=OTHER, group_by="key")
    assert [(it["key"], it["requests"]) for it in only] == [("k1", 1)]


async def test_from_is_in_and_the_day_of_to_as_well(asked: Asked) -> None:
    async def count(begin: str, end: str) -> int:
        return int(sum(it["requests"] for it in await asked.rows(**{"from": begin, "to": end})))

    assert await count("2026-11-25", "2026-11-25") == 2
    assert await count("2026-11-26", "2026-11-27") == 2
    assert await count("2026-11-25T00:00:01+00:00", "2026-11-25T23:59:59Z") == 0
    assert await count("2026-11-25T01:00:00+01:00", "2026-11-26T00:00:00+00:00") == 2
    assert await count("2027-01-01", "2026-01-01") == 0


async def test_pages_end_with_an_empty_one(asked: Asked) -> None:
    """The SDKs' iterators ask on until they get none."""
    seen = []
    for page in ("1", "2", "3"):
        answer = (await asked.get(**SINCE, page=page, per_page="2")).json()
        seen.append([it["day"] for it in answer["result"]])
        info = answer["result_info"]
        assert (info["page"], info["per_page"], info["count"]) == (int(page), 2, len(seen[-1]))
        assert (info["total_count"], info["total_pages"]) == (3, 2)
        assert info["total"]["requests"] == 4
    assert seen == [["2026-11-25", "2026-11-26"], ["2026-11-27"], []]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("from", "yesterday"),
        ("to", "2026-13-01"),
        ("to", "2026-11-27T10:00:00"),  # where?
        ("to", "9999-12-31"),
        ("group_by", "hour"),
        ("page", "0"),
        ("page", "-1"),
        ("per_page", "1001"),
        ("per_page", "many"),
        ("per_page", "00000000019"),
        ("page", "0000000001" + "0" * 5000),
    ],
)
async def test_what_is_wrong_is_named(asked: Asked, name: str, value: str) -> None:
    answer = await asked.get(**{name: value})
    assert answer.status_code == 400
    assert f"'/{name}'" in answer.json()["errors"][0]["message"]


async def test_only_a_key_of_the_account_may_see_it(asked: Asked) -> None:
    edge = asked._edge
    assert (await edge.http.get(f"{edge.ai}/usage")).status_code == 401
    url = f"{edge.url}/client/v4/accounts/somebody-else/ai/usage"
    assert (await edge.http.get(url, headers=edge.headers())).status_code == 401


async def test_a_request_that_has_ended_is_in_it(asked: Asked, tmp_path: Path) -> None:
    edge = asked._edge
    used = (await edge.raw("AB", 5)).json()["result"]["usage"]
    await edge.wait_metric("edgefire_edge_requests_total", 1, route="run")
    await edge.wait_metric("edgefire_edge_ledger_pending", 0)
    rows = await asked.rows(group_by="key", model=MODEL)
    (mine,) = [it for it in rows if it["key"] != "k1"]
    assert {name: mine[name] for name in ("prompt_tokens", "completion_tokens")} == {
        name: used[name] for name in ("prompt_tokens", "completion_tokens")
    }


async def test_without_a_ledger_it_says_so(tmp_path: Path) -> None:
    fake = CountingRegion()
    async with running(fake), edge_over(tmp_path, [fake.region]) as edge:
        answer = await Asked(edge).get()
        assert answer.status_code == 503
        key = keys.create(tmp_path / "keys", ACCOUNT, days=1, now=unix_time())
        assert (await Asked(replace(edge, key=key)).get()).status_code == 503


def test_by_default_it_is_of_the_last_thirty_days() -> None:
    query = parse({}, NOW)
    assert datetime.fromtimestamp(query.begin, UTC) == datetime(2026, 10, 28, tzinfo=UTC)
    assert datetime.fromtimestamp(query.end, UTC) == datetime(2026, 11, 28, tzinfo=UTC)
    assert (query.group, query.page, query.per_page) == ("day", 1, 100)
    with pytest.raises(BadField):
        parse({"per_page": "²"}, NOW)
