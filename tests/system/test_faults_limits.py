"""What an account may use is one number, however many edges it asks, and however they end."""

from __future__ import annotations

import sqlite3
from collections import Counter
from pathlib import Path

import anyio
import pytest

from tests.system.faults import PATIENCE_S, second_edge, status_of
from tests.system.world import ACCOUNT, MODEL, NEAR_WEUR, Process, Shape, World, edge_key, world

pytestmark = pytest.mark.system


async def ask(w: World, edge: Process, key: str, codes: Counter[int], max_tokens: int = 2) -> None:
    body = {"prompt": "A", "raw": True, "max_tokens": max_tokens}
    url = f"{edge.url}/client/v4/accounts/{ACCOUNT}/ai/run/{MODEL}"
    headers = {"authorization": f"Bearer {key}", **NEAR_WEUR}
    answer = await w.client.post(url, json=body, headers=headers)
    codes[answer.status_code] += 1
    if answer.status_code == 429:
        assert (await status_of(answer))[1] in {2003, 3036}
        assert int(answer.headers["retry-after"]) >= 1


async def test_two_edges_share_a_rate_exactly_and_a_killed_one_takes_nothing_along(
    tmp_path: Path,
) -> None:
    async with world(tmp_path, Shape(roles=("both",))) as w:
        edges = [w.edge, await second_edge(w)]
        limit = ("--limit", "text-generation=25/hour")
        key = edge_key(w.home, "create", "--account", ACCOUNT, *limit)
        codes: Counter[int] = Counter()
        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as tasks:
                for n in range(20):
                    tasks.start_soon(ask, w, edges[n % 2], key, codes)
            assert codes == {200: 20}
            edges[1].kill()
            async with anyio.create_task_group() as tasks:
                for _ in range(20):
                    tasks.start_soon(ask, w, edges[0], key, codes)
        assert codes == {200: 25, 429: 15}


async def test_what_was_spent_at_one_edge_is_known_at_the_other(tmp_path: Path) -> None:
    async with world(tmp_path, Shape(roles=("both",))) as w:
        edges = [w.edge, await second_edge(w)]
        key = edge_key(w.home, "create", "--account", ACCOUNT, "--limit", "tokens=30/day")
        codes: Counter[int] = Counter()
        with anyio.fail_after(PATIENCE_S):
            n = 0
            while not codes[429]:
                await ask(w, edges[n % 2], key, codes, max_tokens=10)
                n += 1
                await anyio.sleep(0.2)  # what an answer took is written down behind it
        assert codes == {200: 3, 429: 1}  # 11 tokens each: 33 are over 30


async def test_answers_go_on_while_another_keeps_the_file_locked(tmp_path: Path) -> None:
    """The data plane waits a second for what only counts, and then counts in memory."""
    async with world(tmp_path, Shape(roles=("both",), edge_flags=("--limits", "workers-ai"))) as w:
        codes: Counter[int] = Counter()
        await ask(w, w.edge, w.key, codes)
        holder = sqlite3.connect(w.usage / "limits.sqlite", isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        key = edge_key(w.home, "create", "--account", ACCOUNT, "--limit", "requests=5/hour")
        with anyio.fail_after(PATIENCE_S):
            for _ in range(7):
                await ask(w, w.edge, key, codes)
        assert codes == {200: 6, 429: 2}
        holder.execute("ROLLBACK")
        holder.close()
