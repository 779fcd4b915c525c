"""Regions that die, come back, fill up and disagree, seen by clients over real sockets."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from routing.errors import Code, Failure
from routing.region import Place
from tests.fakes.counting_region import (
    OTHER_ASSETS,
    CountingRegion,
    Steps,
    no_gate,
    refusing,
    running,
)
from tests.fakes.edge_client import NEAR_ENAM, NEAR_WEUR, edge_over
from tests.fakes.events import frames, read_all


def europe() -> CountingRegion:
    return CountingRegion(name="weur", place=Place(52.37, 4.90))


def america() -> CountingRegion:
    return CountingRegion(name="enam", place=Place(40.71, -74.01))


async def test_a_client_is_served_from_the_nearest_region(tmp_path: Path) -> None:
    weur, enam = europe(), america()
    async with running(weur, enam), edge_over(tmp_path, [weur.region, enam.region]) as edge:
        for near, name in [
            (NEAR_WEUR, "weur"),
            (NEAR_ENAM, "enam"),
            ({"cf-ipcountry": "CA"}, "enam"),
        ]:
            async with edge.stream("A", 3, near=near) as response:
                assert response.headers["x-served-by"] == name
                assert (await read_all(response))[0] == "BCD"


async def test_a_full_region_sends_clients_to_the_next(tmp_path: Path) -> None:
    weur, enam = europe(), america()
    weur.started_gate = refusing(Failure(Code.NO_CAPACITY, "full"))
    async with running(weur, enam), edge_over(tmp_path, [weur.region, enam.region]) as edge:
        for _ in range(6):
            answer = await edge.raw("A", 3)
            assert answer.headers["x-served-by"] == "enam"
        assert len(weur.asked) == 6  # being full is no reason to be given up on
        enam.started_gate = weur.started_gate
        assert (await edge.raw("A", 3)).status_code == 429


async def test_a_dead_region_costs_no_request(tmp_path: Path) -> None:
    weur, enam = europe(), america()
    async with running(weur, enam), edge_over(tmp_path, [weur.region, enam.region]) as edge:
        await weur.stop()
        for _ in range(5):
            async with edge.stream("A", 3) as response:
                assert response.headers["x-served-by"] == "enam"
                assert (await read_all(response))[0] == "BCD"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stream_goes_on_in_another_region_to_the_letter(
    tmp_path: Path, stream: bool
) -> None:
    weur, enam = europe(), america()
    weur.gate = steps = Steps(allowed=3)
    async with running(weur, enam), edge_over(tmp_path, [weur.region, enam.region]) as edge:

        async def die() -> None:
            with anyio.fail_after(10):
                while steps.waiting_at != 3:
                    await anyio.sleep(0.005)
            await weur.stop()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(die)
            async with edge.stream("A", 9) as response:
                text, usage, done = await read_all(response)
            assert response.headers["x-served-by"] == "weur"  # it had begun there
        assert (text, done) == ("BCDEFGHIJ", True)
        assert usage == {"prompt_tokens": 1, "completion_tokens": 9, "total_tokens": 10}
        [resumed] = enam.asked
        assert bytes(resumed.generated_ids) == b"BCD"
        assert resumed.sampling == weur.asked[0].sampling  # the seed above all


async def test_a_failing_region_is_soon_left_alone_and_tried_again_later(tmp_path: Path) -> None:
    """Three failures, then nothing for a second, then one probe; when that goes well, all."""
    weur, enam = europe(), america()
    weur.started_gate = refusing(Failure(Code.UNAVAILABLE, "nothing is ready"))
    async with running(weur, enam), edge_over(tmp_path, [weur.region, enam.region]) as edge:
        for _ in range(10):
            assert (await edge.raw("A", 3)).headers["x-served-by"] == "enam"
        assert 3 <= len(weur.asked) <= 6  # three, and on a slow day a probe or two
        gauge = "edgefire_edge_region_breaker_open"
        weur.started_gate = no_gate
        await edge.wait_metric(gauge, 0.5, region="weur")
        assert (await edge.raw("A", 3)).headers["x-served-by"] == "weur"
        assert await edge.metric(gauge, region="weur") == 0


async def test_an_only_region_that_fails_is_a_503_with_a_time_to_come_back(tmp_path: Path) -> None:
    weur = europe()
    weur.started_gate = refusing(Failure(Code.UNAVAILABLE, "nothing is ready"))
    async with running(weur), edge_over(tmp_path, [weur.region]) as edge:
        for _ in range(10):
            answer = await edge.raw("A", 3)
            assert (answer.status_code, answer.json()["errors"][0]["code"]) == (503, 7009)
            assert int(answer.headers["retry-after"]) >= 1
        assert 3 <= len(weur.asked) <= 6


async def test_a_region_that_comes_back_serves_again(tmp_path: Path) -> None:
    weur = europe()
    async with running(weur) as tasks, edge_over(tmp_path, [weur.region]) as edge:
        for life in ("1", "2", "3"):
            weur.epoch = life
            assert (await edge.raw("A", 3)).status_code == 200
            await weur.stop()
            for _ in range(4):
                assert (await edge.raw("A", 3)).status_code == 503
            weur.epoch = life + "'"
            await weur.start(tasks)
            with anyio.fail_after(10):
                while (await edge.raw("A", 3)).status_code != 200:
                    await anyio.sleep(0.02)


async def test_the_edge_is_up_before_its_regions(tmp_path: Path) -> None:
    weur, enam = europe(), america()
    regions = [weur.region, enam.region]
    async with running() as tasks, edge_over(tmp_path, regions, wait_ready=False) as edge:
        assert (await edge.http.get(f"{edge.url}/health")).status_code == 200
        assert (await edge.http.get(f"{edge.url}/ready")).status_code == 503
        answer = await edge.raw("A", 3)
        assert (answer.status_code, answer.json()["errors"][0]["code"]) == (503, 7009)
        assert answer.headers["retry-after"] == "1"
        for region in (enam, weur):
            await region.start(tasks)
            with anyio.fail_after(15):
                while True:
                    answer = await edge.raw("A", 3)
                    if answer.headers.get("x-served-by") == region.name:
                        break
                    await anyio.sleep(0.02)
        assert (await edge.http.get(f"{edge.url}/ready")).status_code == 200
        for region in (enam, weur):
            await region.stop()


async def test_a_region_with_another_tokenizer_than_it_said_gets_new_ids(tmp_path: Path) -> None:
    """The tokenizer changed between a report and a request: asked anew, once, before any token."""
    weur = europe()
    async with running(weur), edge_over(tmp_path, [weur.region]) as edge:
        assert (await edge.raw("A", 3)).status_code == 200
        old = weur.assets.digest
        weur.assets = OTHER_ASSETS

        async def check(request: object, index: int) -> None:
            await anyio.lowlevel.checkpoint()
            if weur.asked[-1].tokenizer_digest != weur.assets.digest:
                raise Failure(Code.STALE_TOKENIZER, "not mine")

        weur.started_gate = check
        assert (await edge.raw("A", 3)).json()["result"]["response"] == "BCD"
        digests = [request.tokenizer_digest for request in weur.asked]
        assert digests[0] == old
        assert digests[-1] == OTHER_ASSETS.digest


async def test_a_region_that_never_takes_the_ids_is_asked_twice(tmp_path: Path) -> None:
    weur = europe()
    weur.started_gate = refusing(Failure(Code.STALE_TOKENIZER, "not mine"))
    async with running(weur), edge_over(tmp_path, [weur.region]) as edge:
        assert (await edge.raw("A", 3)).status_code == 503
        assert len(weur.asked) == 2


async def test_two_regions_with_two_tokenizers_each_get_their_own_ids(tmp_path: Path) -> None:
    weur, enam = europe(), america()
    enam.assets = OTHER_ASSETS
    async with running(weur, enam), edge_over(tmp_path, [weur.region, enam.region]) as edge:
        for near, region in [(NEAR_WEUR, weur), (NEAR_ENAM, enam)]:
            async with edge.stream("A", 3, near=near) as response:
                assert (await read_all(response))[0] == "BCD"
            assert region.asked[-1].tokenizer_digest == region.assets.digest


async def test_a_session_stays_where_its_cache_is(tmp_path: Path) -> None:
    """Among two regions about equally near; each session keeps its own, and both are used."""
    here = CountingRegion(name="here", place=Place(52.37, 4.90))
    there = CountingRegion(name="there", place=Place(52.0, 4.4))
    async with running(here, there), edge_over(tmp_path, [here.region, there.region]) as edge:
        body = {"prompt": "A", "raw": True, "max_tokens": 1}
        served = {}
        for session in [f"s{n}" for n in range(12)] * 2:
            headers = edge.headers() | {"x-session-affinity": session}
            answer = await edge.http.post(edge.run_url, json=body, headers=headers)
            by = answer.headers["x-served-by"]
            assert served.setdefault(session, by) == by
        assert set(served.values()) == {"here", "there"}


async def test_streams_survive_a_restart_of_their_only_region(tmp_path: Path) -> None:
    weur = europe()
    weur.gate = steps = Steps(allowed=2)
    async with running(weur) as tasks, edge_over(tmp_path, [weur.region]) as edge:
        async with edge.stream("A", 5) as response:
            texts = frames(response)
            got = ""
            for _ in range(2):
                frame = await anext(texts)
                assert isinstance(frame, dict)
                got += frame["response"]
            await weur.stop()
            steps.allow(9)
            await weur.start(tasks)
            async for frame in texts:
                got += frame["response"] if isinstance(frame, dict) else ""
        assert got == "BCDEF"
