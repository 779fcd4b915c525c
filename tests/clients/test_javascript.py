"""JavaScript's clients: openai, cloudflare, and the AI SDK by two providers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from anyio import to_thread

from tests.clients.javascript import NODE, NPM, install
from tests.fakes.counting_region import MODEL
from tests.fakes.edge_client import ACCOUNT, EdgeClient


@pytest.fixture(scope="module")
def installed() -> Path:
    if NODE is None or NPM is None:
        pytest.skip("node and npm are not on the PATH")
    return install()


async def heard(edge: EdgeClient, folder: Path, script: str = "clients.mjs") -> dict[str, Any]:
    def run() -> str:
        words = [str(NODE), script, edge.url, ACCOUNT, edge.key, MODEL]
        done = subprocess.run(
            words, cwd=folder, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    said = json.loads(await to_thread.run_sync(run))
    assert isinstance(said, dict)
    return said


@pytest.mark.timeout(400)
async def test_all_of_them(edge: EdgeClient, installed: Path) -> None:
    said = await heard(edge, installed)
    assert said["openai"] == {
        "whole": "ABCD",
        "text": "ABCD",
        "used": 4,
        "models": [MODEL],
        "refused": "BadRequestError temperature",
    }
    assert said["cloudflare"] == {"whole": "ABCD", "models": [MODEL], "refused": 5007}
    for name in ("compatible", "provider"):
        assert said[name] == {"whole": "ABCD", "text": "ABCD", "used": 4, "reason": "length"}, name
