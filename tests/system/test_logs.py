"""What an operator sees: one log line a request in every process, and metrics that count it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.system.world import World, world

pytestmark = pytest.mark.system
HOPS = {"edge": "ok", "weur-front": "length", "weur-prefill": "collected", "weur-decode": "length"}


def lines_of(w: World, process: str, request_id: str) -> list[dict[str, Any]]:
    """The request lines of one process about one request."""
    lines = map(msgspec.json.decode, w.processes[process].log.read_bytes().splitlines())
    return [
        line
        for line in lines
        if line["event"] == "request" and line.get("request_id") == request_id
    ]


async def test_one_line_a_request_in_every_process(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        answer = await w.raw("AAAA", 5)
        request_id = answer.headers["x-request-id"]
        async with w.stream("!", 3) as other:
            assert other.headers["x-request-id"] != request_id
            await other.aread()
        await w.settled("weur-prefill", "weur-decode")
    for hop, outcome in HOPS.items():
        [line] = lines_of(w, hop, request_id)
        assert line["outcome"] == outcome, line
        assert line["prompt_tokens"] == 4
        assert line["total_ms"] >= 0


@pytest.mark.slow
async def test_metrics_count_what_happened(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        for _ in range(3):
            assert (await w.raw("AAAA", 5)).status_code == 200
        await w.settled("weur-prefill", "weur-decode")
        texts = {
            name: (await w.client.get(f"{process.url}/metrics")).text
            for name, process in w.processes.items()
        }
    assert _value(texts["weur-prefill"], "edgefire_engine_prompt_tokens_computed_total") == 12
    assert _value(texts["weur-decode"], "edgefire_engine_prompt_tokens_computed_total") == 0
    assert _value(texts["weur-decode"], "edgefire_engine_output_tokens_total") == 12
    assert _value(texts["weur-front"], "edgefire_front_in_flight") == 0
    assert w.key not in "".join(texts.values())


def _value(metrics: str, name: str) -> float:
    found = re.search(rf"^{name}(?:\{{[^}}]*\}})? ([0-9.e+]+)$", metrics, re.MULTILINE)
    assert found, f"no {name} in\n{metrics}"
    return float(found[1])
