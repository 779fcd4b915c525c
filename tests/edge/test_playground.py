"""The playground in a browser: what a person sees of models, a streamed answer, and regions."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from edge.playground import regions
from routing.choose import Known
from routing.health import Breaker
from routing.region import ModelReport, Place, Region, RegionReport
from tests.fakes.browser import browser
from tests.fakes.counting_region import MODEL
from tests.fakes.edge_client import EdgeClient

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def known(**more: object) -> Known:
    model = ModelReport(
        model="m",
        model_digest="d",
        tokenizer_digest="t",
        context_window=10,
        max_sequence_tokens=10,
    )
    report = RegionReport(region="r", epoch="1", room=3, models=(model,), processes=())
    fields: dict[str, object] = {
        "region": Region(name="r", url="http://r", place=Place(1, 2)),
        "report": report,
        "reported_at": 100.0,
        "rtt_ms": 1.5,
        "connected": True,
    }
    return Known(**(fields | more))  # type: ignore[arg-type]


def test_what_keeps_a_request_from_a_region_is_one_word() -> None:
    report = known().report
    assert report is not None
    replace = msgspec.structs.replace
    broken = Breaker()
    for _ in range(3):
        broken = broken.failed(100.0)
    for it, state in [
        (known(), "ready"),
        (known(connected=False), "away"),
        (known(report=None), "away"),
        (known(reported_at=90.0), "away"),
        (known(breaker=broken), "left alone"),
        (known(report=replace(report, room=0)), "full"),
        (known(report=replace(report, models=())), "empty"),
        (known(report=replace(report, models=(), loading=("m",))), "loading"),
    ]:
        assert regions([it], 100.1)[0]["state"] == state


async def test_its_files_come_from_the_edge_alone(edge: EdgeClient) -> None:
    page = await edge.http.get(f"{edge.url}/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name in ("playground.css", "playground.js"):
        assert f'"/{name}"' in page.text
        file = await edge.http.get(f"{edge.url}/{name}")
        assert file.status_code == 200
        assert "//" not in file.text.replace("// ", "").replace("http://www.w3.org/2000/svg", "")


async def test_regions_are_told_to_those_with_a_key(edge: EdgeClient) -> None:
    assert (await edge.http.get(f"{edge.url}/v1/regions")).status_code == 401
    told = (await edge.http.get(f"{edge.url}/v1/regions", headers=edge.headers())).json()
    [region] = told["result"]
    assert (region["name"], region["state"], region["models"]) == ("weur", "ready", [MODEL])


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
@pytest.mark.timeout(180)
async def test_a_person_sees_an_answer_and_the_region_that_gave_it(
    edge: EdgeClient, tmp_path: Path
) -> None:
    async with browser(str(CHROMIUM), tmp_path / "profile") as page:
        await page.go(f"{edge.url}/#key={edge.key}")
        await page.until("document.getElementById('model')?.options.length")
        assert await page.value("document.getElementById('model').value") == MODEL
        assert await page.value("location.hash") == ""  # the key is in no address
        await page.value(
            "document.getElementById('max-tokens').value = 4;"
            "document.getElementById('chat-text').value = 'hello';"
            "document.getElementById('chat-form').requestSubmit()"
        )
        await page.until("document.getElementById('figures').textContent.includes('answer')")
        said = await page.value("[...document.querySelectorAll('#turns li')].map(e => e.innerText)")
        assert said == ["hello", "ABCD"]
        figures = " ".join(
            (await page.value("document.getElementById('figures').innerText")).split()
        )
        assert figures.startswith("served by weur first token ")
        assert "answer 4 ended by length" in figures
        await page.value("document.getElementById('tab-regions').click()")
        await page.until("document.getElementById('region-rows').children.length")
        row = await page.value("document.getElementById('region-rows').innerText")
        assert row.split()[:2] == ["weur", "ready"]
        assert await page.value("document.querySelectorAll('#map circle.ready.served').length") == 1
        assert page.errors == []


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
@pytest.mark.timeout(180)
async def test_a_person_sees_why_there_is_no_answer(edge: EdgeClient, tmp_path: Path) -> None:
    async with browser(str(CHROMIUM), tmp_path / "profile") as page:
        await page.go(f"{edge.url}/#key=nonsense")
        await page.until("document.getElementById('state')?.classList.contains('bad')")
        assert "Authentication" in await page.value("document.getElementById('state').innerText")
        await page.value(
            f"document.getElementById('key').value = '{edge.key}';"
            "document.getElementById('key').dispatchEvent(new Event('change'))"
        )
        await page.until("document.getElementById('model').options.length")
        await page.value(
            "document.getElementById('tab-json').click();"
            "document.getElementById('schema').value = '{';"
            "document.getElementById('json-form').requestSubmit()"
        )
        await page.until("document.getElementById('json-answer').className === 'failed'")
        assert "the schema" in await page.value("document.getElementById('json-answer').innerText")
