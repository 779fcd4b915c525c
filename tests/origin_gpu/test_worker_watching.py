"""What a worker says of itself."""

from __future__ import annotations

import logging
from pathlib import Path
from time import monotonic

import anyio
import httpx2
import msgspec
import pytest

from infire.notes import Gauges
from origin_gpu import worker_app
from origin_gpu.cache_news import MOST_AT_ONCE
from origin_gpu.handover import (
    CacheNews,
    Collected,
    Prefill,
    Resume,
    Watch,
    Watched,
    WorkerEvent,
)
from routing import wire
from routing.link_frames import Batch
from routing.region import ProcessReport
from tests.fakes.model_folder import CONTEXT_WINDOW
from tests.origin_gpu.local_workers import (
    MODEL,
    PATIENCE_S,
    LocalWorker,
    local_pair,
    local_worker,
    prefilled_of,
    watched,
)


async def test_watching(tmp_path: Path) -> None:
    """Said at once, and every second; what is said is what the report says."""
    async with local_worker(tmp_path, "p", "prefill") as p, p.link.open(Watch(())) as events:
        said = aiter(events)
        with anyio.fail_after(PATIENCE_S):
            first = await anext(said)
            assert isinstance(first, Watched)
            assert first.block_tokens == 16
            assert first.report == p.report
            assert first.kv_address == p.peer.kv_address
            assert first.layout_digest == p.app.worker.engine.layout_digest != ""
            assert first.report.models[0].model == MODEL
            assert first.report.models[0].context_window == CONTEXT_WINDOW
            assert await anext(said) == CacheNews(0)
            assert await anext(said) == first


async def test_changes_are_said_without_waiting_for_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_app, "TELL_EVERY_S", 1000.0)
    async with local_worker(tmp_path, "p", "prefill") as p, p.link.open(Watch(())) as events:
        said = aiter(events)
        with anyio.fail_after(PATIENCE_S):
            async with p.link.open(Prefill(p.generate(65))):
                while not (await watched(said)).report.held:
                    pass
            while (await watched(said)).report.held:
                pass


async def test_a_large_cache_is_told_in_frames_of_a_moment_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever takes note of them has other things to do."""
    async with local_worker(tmp_path) as w:
        at_once: list[int] = []
        hand_out = w.link._hand_out

        def hear(batch: Batch[WorkerEvent]) -> None:
            at_once.append(sum(isinstance(event, CacheNews) for event in batch.events))
            hand_out(batch)

        monkeypatch.setattr(w.link, "_hand_out", hear)
        keys = [n.to_bytes(16, "little") for n in range(3 * MOST_AT_ONCE)]
        w.app.worker.engine.cache.change(keys, ())
        heard: set[bytes] = set()
        async with w.link.open(Watch(())) as events:
            with anyio.fail_after(PATIENCE_S):
                async for event in events:
                    if isinstance(event, CacheNews):
                        heard.update(event.added)
                    if len(heard) == len(keys):
                        break
        assert max(at_once) == 1


async def test_what_it_tells_who_has_the_secret(tmp_path: Path) -> None:
    async with local_worker(tmp_path) as w:
        report = msgspec.json.decode((await w.client.get("/v1/report")).content, type=ProcessReport)
        assert report == w.report
        assert (report.name, report.region, report.role) == ("w", "here", "both")
        assert report.url == w.url
        assert report.total_blocks == report.free_blocks == 1024
        digest = report.models[0].tokenizer_digest
        answer = await w.client.get(f"/v1/assets/{digest}")
        assets = msgspec.msgpack.decode(answer.content, type=wire.TextAssets)
        assert assets.digest == digest
        assert (await w.client.get(f"/v1/assets/{'0' * 64}")).status_code == 404
        metrics = (await w.client.get("/metrics")).text
        assert "edgefire_engine_up 1.0" in metrics
        assert "edgefire_engine_total_blocks 1024.0" in metrics


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}])
async def test_who_has_not_the_secret_gets_401(
    worker: LocalWorker, headers: dict[str, str]
) -> None:
    async with httpx2.AsyncClient(
        base_url=worker.url, headers=headers, timeout=PATIENCE_S, trust_env=False
    ) as stranger:
        for path in ("/v1/report", "/v1/assets/x"):
            assert (await stranger.get(path)).status_code == 401
        upgrade = {
            "connection": "upgrade",
            "upgrade": "websocket",
            "sec-websocket-version": "13",
            "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==",
        }
        assert (await stranger.get("/v1/link", headers=upgrade)).status_code == 401
        for path in ("/health", "/ready", "/metrics"):
            assert (await stranger.get(path)).status_code == 200


async def test_an_engine_that_says_nothing_is_not_ready(worker: LocalWorker) -> None:
    engine = worker.app.worker.engine
    heard_at, engine._heard_at = engine._heard_at, monotonic() - 5.1
    try:
        assert not worker.report.ready
    finally:
        engine._heard_at = heard_at


async def test_waiting_counts_what_the_gauge_has_not_seen_yet(worker: LocalWorker) -> None:
    it = worker.app.worker
    gauges = it.engine.gauges
    try:
        it.in_flight = it.settings.max_running + 3
        assert it.num_waiting == 3
        it.engine.gauges = Gauges(step=1, waiting=7)
        assert it.num_waiting == 7
    finally:
        it.in_flight, it.engine.gauges = 0, gauges


async def test_one_line_is_logged_a_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with local_pair(tmp_path) as (p, d):
        request = p.generate(65, max_tokens=3)
        async with p.link.open(Prefill(request)) as held:
            await d.ask(Resume(request, await prefilled_of(held)))
            with anyio.fail_after(PATIENCE_S):
                assert [event async for event in held] == [Collected()]
        await d.ask(d.generate(model="@cf/other"))
    lines = [record.fields for record in caplog.records if record.message == "request"]  # type: ignore[attr-defined]
    told = [(it["role"], it["outcome"], it["output_tokens"], it["kv_bytes"]) for it in lines]
    assert sorted(told) == [
        ("both", "unavailable", 0, 0),
        ("decode", "length", 2, 16),
        ("prefill", "collected", 1, 0),
    ]
    assert {it["request_id"] for it in lines} == {"r1"}
