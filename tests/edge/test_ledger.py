"""One row of usage a request, however it ends: real connections, a real file."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from edge.auth import Tenant
from edge.ledger import open_ledger, row_of
from edge.metrics import Record
from routing.errors import Code, Failure
from routing.region import Place
from routing.rows import WrongFile
from routing.usage import LedgerRow, tenant_of
from tests.fakes.counting_region import MODEL, CountingRegion, Steps, refusing, running
from tests.fakes.edge_client import ACCOUNT, EdgeClient, edge_over
from tests.fakes.events import frames, read_all
from tests.routing.test_rows import ledger_rows

ENDED = "edgefire_edge_requests_total"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "usage" / "ledger.sqlite"


@pytest.fixture
def edge_settings(file: Path) -> dict[str, Any]:
    return {"ledger": file}


async def rows_in(file: Path, edge: EdgeClient, count: int) -> list[LedgerRow]:
    """The rows, once `count` requests have ended and nothing waits to be written."""
    await edge.wait_metric(ENDED, count)
    await edge.wait_metric("edgefire_edge_ledger_pending", 0)
    assert await edge.metric("edgefire_edge_ledger_lost_total") == 0
    return sorted(ledger_rows(file), key=lambda row: row.started)


async def test_what_a_client_is_told_is_in_its_row(
    edge: EdgeClient, region: CountingRegion, file: Path
) -> None:
    region.cached_tokens = 2
    whole = await edge.raw("ABC", 5)
    async with edge.stream("AB", 7) as response:
        assert (await read_all(response))[1]["completion_tokens"] == 7
    first, second = await rows_in(file, edge, 2)
    assert first.request_id == whole.headers["x-request-id"]
    assert second.request_id == response.headers["x-request-id"]
    usage = whole.json()["result"]["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
    assert (first.account, first.model, first.regions) == (ACCOUNT, MODEL, "weur")
    assert (first.prompt_tokens, first.completion_tokens, first.cached_tokens) == (3, 5, 2)
    assert (first.outcome, first.whole, first.source) == ("ok", True, "edge")
    assert (second.prompt_tokens, second.completion_tokens) == (2, 7)
    assert first.tenant == second.tenant == tenant_of(region.asked[0].tenant_salt)
    assert first.key_id == second.key_id != ""
    assert first.started <= first.ended <= second.ended


async def test_a_stop_string_costs_what_was_told(
    edge: EdgeClient, region: CountingRegion, file: Path
) -> None:
    """The region had made three more in the same burst: nobody pays for them, and the row says
    that it is not all that was made."""
    region.burst = 8
    answer = await edge.raw("A", 50, stop=["DE"])
    assert answer.json()["result"]["usage"]["completion_tokens"] == 4
    [row] = await rows_in(file, edge, 1)
    assert (row.completion_tokens, row.outcome, row.whole) == (4, "ok", False)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_made", [0, 3])
async def test_who_hangs_up_has_a_row_of_what_came_for_them(
    edge: EdgeClient, region: CountingRegion, file: Path, num_made: int, stream: bool
) -> None:
    region.gate = steps = Steps(allowed=num_made)
    asked = {"prompt": "!", "raw": True, "stream": stream, "max_tokens": 50}
    async with await edge.connect(msgspec.json.encode(asked)):
        with anyio.fail_after(10):
            while steps.waiting_at != num_made:
                await anyio.sleep(0.005)
        await anyio.sleep(0.05)  # what was made is on its way; a row with less would be right, too
    [row] = await rows_in(file, edge, 1)
    assert (row.outcome, row.whole, row.prompt_tokens) == ("hung_up", False, 1)
    assert row.completion_tokens == num_made


async def test_a_stream_over_two_regions_has_one_row(tmp_path: Path, file: Path) -> None:
    enam = CountingRegion(name="enam", place=Place(40.71, -74.01), cached_tokens=1)
    weur = CountingRegion()
    weur.gate = refusing(Failure(Code.LOST, "gone"), at=4)
    async with (
        running(weur, enam),
        edge_over(tmp_path, [weur.region, enam.region], ledger=file) as edge,
    ):
        async with edge.stream("A", 10) as response:
            text, usage, done = await read_all(response)
        assert (text, usage["completion_tokens"], done) == ("BCDEFGHIJK", 10, True)
        [row] = await rows_in(file, edge, 1)
    assert len(enam.asked[0].generated_ids) == 4
    assert (row.regions, row.completion_tokens, row.cached_tokens) == ("weur,enam", 10, 0)
    assert (row.outcome, row.whole) == ("ok", True)


async def test_a_stream_that_breaks_off_has_a_row_of_what_was_told(
    edge: EdgeClient, region: CountingRegion, file: Path
) -> None:
    region.gate = refusing(Failure(Code.INTERNAL, "a bug"), at=4)
    async with edge.stream("A", 10) as response:
        told = [frame async for frame in frames(response)]
    assert isinstance(told[-1], dict)
    assert told[-1]["success"] is False
    [row] = await rows_in(file, edge, 1)
    assert (row.completion_tokens, row.outcome, row.whole) == (4, "internal", False)


async def test_a_request_that_every_region_refuses_has_an_empty_row(
    edge: EdgeClient, region: CountingRegion, file: Path
) -> None:
    region.started_gate = refusing(Failure(Code.NO_CAPACITY, "full"))
    assert (await edge.raw("A")).status_code == 429
    [row] = await rows_in(file, edge, 1)
    assert (row.regions, row.completion_tokens, row.outcome) == ("", 0, "no_capacity")
    assert row.prompt_tokens == 0  # nobody has read it


async def test_who_is_turned_away_at_the_door_has_none(edge: EdgeClient, file: Path) -> None:
    """No key, no such model, no sense in the body, no such route: no region was looked for."""
    assert (await edge.http.post(edge.run_url, json={"prompt": "A"})).status_code == 401
    unknown = f"{edge.ai}/run/@cf/no/such"
    assert (await edge.http.post(unknown, json={}, headers=edge.headers())).status_code == 400
    assert (await edge.raw("A", -1)).status_code == 400
    assert (await edge.http.get(f"{edge.url}/nowhere")).status_code == 404
    assert (await edge.raw("A")).status_code == 200
    [row] = await rows_in(file, edge, 5)
    assert row.outcome == "ok"


async def test_ids_made_anew_are_one_request(
    edge: EdgeClient, region: CountingRegion, file: Path
) -> None:
    region.started_gate = refusing(Failure(Code.STALE_TOKENIZER, "not mine"), times=1)
    assert (await edge.raw("A", 5)).status_code == 200
    assert len(region.asked) == 2
    [row] = await rows_in(file, edge, 1)
    assert (row.prompt_tokens, row.completion_tokens, row.regions) == (1, 5, "weur")


async def test_ids_that_clients_send_are_not_theirs_to_choose(
    edge: EdgeClient, region: CountingRegion, file: Path
) -> None:
    """Two requests that claim one id, in every place where one might look, are two rows."""
    claims = {"x-request-id": "mine", "cf-ray": "mine", "cf-ai-req-id": "mine"}
    body = {"prompt": "A", "raw": True, "max_tokens": 2, "request_id": "mine", "id": "mine"}
    for _ in range(2):
        headers = edge.headers() | claims
        assert (await edge.http.post(edge.run_url, json=body, headers=headers)).status_code == 200
    rows = await rows_in(file, edge, 2)
    ids = {row.request_id for row in rows}
    assert len(ids) == 2
    assert "mine" not in ids
    assert {asked.request_id for asked in region.asked} == ids


async def test_two_edges_write_one_file(tmp_path: Path, region: CountingRegion, file: Path) -> None:
    async with AsyncExitStack() as stack:
        edges = [
            await stack.enter_async_context(edge_over(tmp_path, [region.region], ledger=file))
            for _ in range(2)
        ]
        async with anyio.create_task_group() as tasks:
            for n in range(40):
                tasks.start_soon(edges[n % 2].raw, "A", n % 7 + 1)
        for edge in edges:
            rows = await rows_in(file, edge, 20)
    assert len({row.request_id for row in rows}) == 40
    assert sum(row.completion_tokens for row in rows) == sum(n % 7 + 1 for n in range(40))


async def test_an_edge_that_stops_writes_the_rows_of_those_it_leaves(
    tmp_path: Path, region: CountingRegion, file: Path
) -> None:
    region.gate = steps = Steps(allowed=3)
    asked = {"prompt": "!", "raw": True, "stream": True, "max_tokens": 50}
    async with AsyncExitStack() as stack:
        async with edge_over(tmp_path, [region.region], ledger=file) as edge:
            assert (await edge.raw("A", 2)).status_code == 200
            stream = await edge.connect(msgspec.json.encode(asked))
            await stack.enter_async_context(stream)
            with anyio.fail_after(10):
                while steps.waiting_at != 3:
                    await anyio.sleep(0.005)
        ended, left = sorted(ledger_rows(file), key=lambda row: row.started)
    assert (ended.outcome, ended.completion_tokens) == ("ok", 2)
    assert left.outcome != "ok"
    assert (left.completion_tokens, left.whole) == (3, False)


def test_a_bug_before_any_region_is_asked_costs_nothing(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path / "ledger.sqlite", lambda: 100.0)
    tenant = Tenant(account="acme", key_id="k", salt=b"s", scopes=frozenset())
    record = Record(request_id="a", started=3.0, tenant=tenant, outcome="internal")
    ledger.note(record, 5.0)
    ledger.close()
    assert ledger_rows(tmp_path / "ledger.sqlite") == []
    row = row_of(record, tenant, ended=100.0, took_s=2.0)
    assert (row.started, row.ended, row.completion_tokens, row.whole) == (98.0, 100.0, 0, False)


def test_a_ledger_that_cannot_be_one_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory"):
        open_ledger(tmp_path, lambda: 0.0)
    (tmp_path / "text").write_text("no database " * 50)
    with pytest.raises(WrongFile):
        open_ledger(tmp_path / "text", lambda: 0.0)
