"""Tenants that share a fleet."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from tests.system.faults import metric, nothing_in_flight
from tests.system.world import ACCOUNT, NEAR_WEUR, Shape, counted, edge_key, world

pytestmark = pytest.mark.system
OTHER = "globex"
# What a client might try to be taken for somebody else.
CLAIMS = {"cache_salt": "globex", "tenant_salt": "Z2xvYmV4", "account": OTHER, "priority": 9}


async def test_tenants_share_nothing_but_the_machines(tmp_path: Path) -> None:
    """Case 25: who asks is what the key says: claims in the body change nothing, a key is good for
    its own account alone, and answers of two who ask at once do not mix."""
    async with world(tmp_path, Shape(step_s=0.005)) as w:
        other = edge_key(w.home, "create", "--account", OTHER)
        keys = {ACCOUNT: w.key, OTHER: other}
        num_asked = 0

        async def ask(account: str, first: str, n: int) -> None:
            body = {"prompt": "A" * n + first, "raw": True, "max_tokens": 20, **CLAIMS}
            headers = {"authorization": f"Bearer {keys[account]}", **NEAR_WEUR}
            answer = await w.client.post(w.run_url(account=account), json=body, headers=headers)
            assert answer.status_code == 200, answer.text
            assert answer.json()["result"]["response"] == counted(first, 20)
            usage = answer.json()["result"]["usage"]
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (n + 1, 20)

        async with anyio.create_task_group() as tasks:
            for n in range(20):
                tasks.start_soon(ask, ACCOUNT, "!", n)
                tasks.start_soon(ask, OTHER, "0", n)
                num_asked += 2
        for account, key in ((ACCOUNT, other), (OTHER, w.key)):
            headers = {"authorization": f"Bearer {key}", **NEAR_WEUR}
            body = {"prompt": "A", "raw": True}
            answer = await w.client.post(w.run_url(account=account), json=body, headers=headers)
            assert answer.status_code == 401
        assert await metric(w, "edge", "edgefire_edge_requests_total", outcome="ok") == num_asked
        await w.settled("weur-prefill", "weur-decode")
        await nothing_in_flight(w)
