"""What a front says of itself and of its workers, and how these are changed."""

from __future__ import annotations

import logging

import anyio
import httpx2
import msgspec
import pytest

from origin_gpu.handover import Prefill
from routing import wire
from routing.region import RegionReport
from routing.secret import bearer
from tests.fakes.region import ASSETS, MODEL, SECRET, Latch
from tests.origin_gpu.fronts import answer, ids, metrics, request, split_region


async def test_each_request_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with split_region() as region:
        await answer(region, request())
        await region.wait_idle()
    (line,) = [r for r in caplog.records if r.name == "origin_gpu.front"]
    fields = line.fields  # type: ignore[attr-defined]
    assert fields.pop("ttft_ms") <= fields.pop("total_ms")
    assert fields == {
        "request_id": "r100",
        "model": MODEL,
        "prefill_worker": "p0",
        "decode_worker": "d0",
        "prompt_tokens": 2,
        "output_tokens": 10,
        "outcome": "length",
    }


async def test_a_region_reports_itself_and_its_workers_to_those_with_the_secret() -> None:
    async with split_region() as region, httpx2.AsyncClient() as client:
        assert (await client.get(f"{region.url}/v1/report")).status_code == 401
        response = await client.get(f"{region.url}/v1/report", headers=bearer(SECRET))
        report = msgspec.json.decode(response.content, type=RegionReport)
        assert (report.region, report.room) == ("here", 100)
        assert [(it.name, it.role) for it in report.processes] == [
            ("here-front", "front"),
            ("p0", "prefill"),
            ("d0", "decode"),
        ]
        assert [it.model for it in report.models] == [MODEL]


async def test_a_front_is_ready_when_a_request_could_go_all_the_way() -> None:
    async with split_region() as region, httpx2.AsyncClient() as client:
        assert (await client.get(f"{region.url}/health")).status_code == 200
        assert (await client.get(f"{region.url}/ready")).status_code == 200
        await region.kill("d0")  # one alone does both
        with anyio.fail_after(10):
            while 'role="decode",worker="d0"} 0.0' not in await metrics(client, region):
                await anyio.sleep(0.01)
        assert (await client.get(f"{region.url}/ready")).status_code == 200
        await region.kill("p0")
        with anyio.fail_after(10):
            while (await client.get(f"{region.url}/ready")).status_code != 503:
                await anyio.sleep(0.01)
        assert (await client.get(f"{region.url}/health")).status_code == 200


async def test_workers_come_and_go_while_requests_are_answered() -> None:
    async with split_region(num_prefill=2) as region:
        client = httpx2.AsyncClient(base_url=region.url, headers=bearer(SECRET), trust_env=False)
        async with client, anyio.create_task_group() as tasks:
            rows = (await client.get("/v1/workers")).json()
            assert {row["name"] for row in rows} == {"p0", "p1", "d0"}
            region["p0"].gates["prefill"] = latch = Latch()
            events: list[wire.Event] = []

            async def ask() -> None:
                events.extend(await answer(region, request()))

            tasks.start_soon(ask)
            await latch.wait_reached()
            left = [row for row in rows if row["name"] != "p0"]
            assert (await client.put("/v1/workers", json=left)).json() == left
            assert ids(await answer(region, request(200))) == list(range(201, 211))
            assert len(region["p1"].of(Prefill)) == 1  # p0 gets nothing new
            elsewhere = {"name": "p0", "role": "prefill", "url": "http://127.0.0.1:1"}
            refused = await client.put("/v1/workers", json=[*left, elsewhere])
            assert refused.status_code == 409
            latch.open()
            with anyio.fail_after(10):
                while 'worker="p0"' in await metrics(client, region):
                    await anyio.sleep(0.01)
            assert ids(events) == list(range(101, 111))
            region["p0"].gates.clear()
            assert (await client.put("/v1/workers", json=rows)).status_code == 200
            await region.wait_known("p0", 0)
            with anyio.fail_after(10):
                while len(region["p0"].of(Prefill)) < 2:  # it is asked again, once it has said so
                    assert ids(await answer(region, request(300))) == list(range(301, 311))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "Expected `array`"),
        (b"[]", "needs a worker"),
        (b'[{"name":"p0","role":"edge","url":"http://a:1"}]', r"Invalid enum value 'edge'"),
        (b'[{"name":"p0","role":"both","url":"ftp://a"}]', "NAME=ROLE@URL"),
        (b'[{"name":"p0","role":"both"}]', "missing required field `url`"),
    ],
)
async def test_a_list_of_workers_with_a_mistake_is_refused(body: bytes, says: str) -> None:
    async with split_region() as region, httpx2.AsyncClient(headers=bearer(SECRET)) as client:
        refused = await client.put(f"{region.url}/v1/workers", content=body)
        assert refused.status_code == 400
        assert says in refused.text
        assert ids(await answer(region, request())) == list(range(101, 111))


async def test_metrics_count_requests_tokens_and_frames() -> None:
    async with split_region() as region, httpx2.AsyncClient() as client:
        await answer(region, request())
        await answer(region, request(model="@cf/made-up-by-somebody"))
        await region.wait_idle()
        lines = (await client.get(f"{region.url}/metrics")).text.splitlines()
        assert f'edgefire_front_requests_total{{model="{MODEL}",outcome="length"}} 1.0' in lines
        assert 'edgefire_front_requests_total{model="unknown",outcome="unavailable"} 1.0' in lines
        assert f'edgefire_front_tokens_total{{kind="output",model="{MODEL}"}} 10.0' in lines
        assert f'edgefire_front_ttft_seconds_count{{model="{MODEL}"}} 1.0' in lines
        assert 'edgefire_front_worker_up{role="prefill",worker="p0"} 1.0' in lines
        assert any(line.startswith("edgefire_front_link_frames_total{") for line in lines)


async def test_text_assets_come_from_a_worker_once_and_only_if_they_are_what_was_asked_for() -> (
    None
):
    async with split_region() as region, httpx2.AsyncClient() as client:
        url = f"{region.url}/v1/assets/{ASSETS.digest}"
        assert (await client.get(url)).status_code == 401
        for _ in range(3):
            response = await client.get(url, headers=bearer(SECRET))
            assert msgspec.msgpack.decode(response.content, type=wire.TextAssets) == ASSETS
        assert region["p0"].fetched + region["d0"].fetched == 1

        for worker in region.workers.values():  # they claim another, and send what they have
            worker.tokenizer_digest = "claimed"
            worker.say()
        with anyio.fail_after(10):
            while not isinstance((await answer(region, request()))[-1], wire.Fault):
                await anyio.sleep(0.01)
        response = await client.get(f"{region.url}/v1/assets/claimed", headers=bearer(SECRET))
        assert response.status_code == 404
        assert region["p0"].fetched + region["d0"].fetched == 3
