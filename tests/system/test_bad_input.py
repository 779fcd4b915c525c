"""What a client gets wrong is said to that client, with the field's name, and to nobody else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.fakes.events import read_all
from tests.system.world import ACCOUNT, MODEL, Shape, World, counted, edge_key, world

pytestmark = pytest.mark.system
USER = [{"role": "user", "content": "A"}]

# body, HTTP status, code, what the message must name
NATIVE: list[tuple[object, int, int, str]] = [
    ({"prompt": ""}, 400, 5006, "prompt"),
    ({}, 400, 5006, "prompt"),
    ({"messages": []}, 400, 5006, "messages"),
    ({"messages": "hello"}, 400, 5006, "messages"),
    ({"messages": [{"role": "wizard", "content": "A"}]}, 400, 5006, "/messages/0/role"),
    ({"messages": [{"role": "user", "content": 7}]}, 400, 5006, "/messages/0/content"),
    ({"messages": USER, "temperature": 9}, 400, 5006, "temperature"),
    ({"messages": USER, "temperature": "hot"}, 400, 5006, "temperature"),
    ({"messages": USER, "top_p": -1}, 400, 5006, "top_p"),
    ({"messages": USER, "top_k": 51}, 400, 5006, "top_k"),
    ({"messages": USER, "max_tokens": 0}, 400, 5006, "max_tokens"),
    ({"messages": USER, "max_tokens": True}, 400, 5006, "max_tokens"),
    ({"messages": USER, "seed": 10**10}, 400, 5006, "seed"),
    ({"messages": USER, "stream": "yes"}, 400, 5006, "stream"),
    ({"messages": USER, "stop": [""]}, 400, 5006, "stop"),
    ({"prompt": "A" * 9000}, 400, 5006, "tokens"),
    ([], 400, 5006, ""),
]


def error_of(answer: Any) -> tuple[int, str]:
    body = answer.json()
    assert body["success"] is False
    assert body["result"] is None
    [error] = body["errors"]
    assert "Traceback" not in answer.text
    return error["code"], error["message"]


async def native(w: World) -> None:
    for body, status, code, named in NATIVE:
        answer = await w.client.post(w.run_url(), json=body, headers=w.headers())
        assert answer.status_code == status, (body, answer.text)
        got, message = error_of(answer)
        assert got == code, (body, answer.text)
        assert named in message, (body, message)


async def openai(w: World) -> None:
    for body, status, _, named in NATIVE:
        # OpenAI's route has no top_k, and takes any seed
        if not isinstance(body, dict) or "messages" not in body or {"top_k", "seed"} & set(body):
            continue
        sent = {"model": MODEL, **body}
        answer = await w.client.post(w.v1_url(), json=sent, headers=w.headers())
        assert answer.status_code == status, (sent, answer.text)
        assert named.split("/")[-1] in answer.json()["error"]["message"], answer.text


async def not_json(w: World) -> None:
    for content in (b"{", b"", b"\xff\xfe", b'{"prompt": NaN}', b"[" * 100_000):
        answer = await w.client.post(w.run_url(), content=content, headers=w.headers())
        assert (answer.status_code, error_of(answer)[0]) == (400, 5006), content[:20]
    huge = b'{"prompt": "' + b"A" * 11_000_000 + b'"}'
    answer = await w.client.post(w.run_url(), content=huge, headers=w.headers())
    assert (answer.status_code, error_of(answer)[0]) == (413, 3006)


async def wrong_address(w: World) -> None:
    unknown = await w.client.post(w.run_url("@cf/no/such"), json={}, headers=w.headers())
    assert (unknown.status_code, error_of(unknown)[0]) == (400, 5007)
    lost = await w.client.post(f"{w.edge.url}/client/v4/nowhere", json={}, headers=w.headers())
    assert (lost.status_code, error_of(lost)[0]) == (404, 7003)
    v1 = await w.client.post(w.v1_url("no/such/route"), json={}, headers=w.headers())
    assert v1.status_code == 404
    got = await w.client.get(w.run_url(), headers=w.headers())
    assert got.status_code == 405
    unknown = await w.client.post(
        w.v1_url(), json={"model": "@cf/no/such", "messages": USER}, headers=w.headers()
    )
    assert unknown.status_code == 400
    assert "@cf/no/such" in unknown.json()["error"]["message"]


async def wrong_key(w: World) -> None:
    foreign = edge_key(w.home, "create", "--account", "somebody-else")
    for value in ("", "Bearer", "Bearer nonsense", f"Bearer {foreign}", f"Basic {w.key}"):
        headers = w.headers() | {"authorization": value}
        answer = await w.client.post(w.run_url(), json={"prompt": "A"}, headers=headers)
        assert (answer.status_code, error_of(answer)[0]) == (401, 10000), value
        answer = await w.client.post(w.v1_url(), json={"messages": USER}, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["message"]


async def test_every_mistake_is_answered_and_no_neighbour_notices(tmp_path: Path) -> None:
    async with world(tmp_path, Shape(step_s=0.02)) as w:
        ended = anyio.Event()

        async def neighbour() -> None:
            async with w.stream("!", 80) as response:
                text, usage, done = await read_all(response)
            assert (text, done) == (counted("!", 80), True)
            assert usage["completion_tokens"] == 80
            ended.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(neighbour)
            for mistakes in (native, openai, not_json, wrong_address, wrong_key):
                await mistakes(w)
            await ended.wait()
        await w.settled("weur-prefill", "weur-decode")
        log = "".join(p.log.read_text() for p in w.processes.values())
        assert '"trace"' not in log, log[-3000:]


async def test_internal_doors_want_the_secret(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        for name, process in w.processes.items():
            for headers in ({}, {"authorization": "Bearer wrong"}, w.headers()):
                answer = await w.client.get(f"{process.url}/v1/report", headers=headers)
                assert answer.status_code == 401, name
            for path in ("health", "ready", "metrics"):
                assert (await w.client.get(f"{process.url}/{path}")).status_code == 200, name


@pytest.mark.slow
async def test_a_revoked_key_stays_revoked(tmp_path: Path) -> None:
    """Within 5 s in a running edge (25 allowed here), and in one started later."""
    async with world(tmp_path) as w:
        assert (await w.raw("A", 2)).status_code == 200
        edge_key(w.home, "revoke", w.key)
        with anyio.fail_after(25):
            while (await w.raw("A", 2)).status_code != 401:
                await anyio.sleep(0.1)
        other = edge_key(w.home, "create", "--account", ACCOUNT)
        headers = w.headers() | {"authorization": f"Bearer {other}"}
        body = {"prompt": "A", "raw": True, "max_tokens": 2}
        answer = await w.client.post(w.run_url(), json=body, headers=headers)
        assert answer.status_code == 200
        revoked = w.key
    home = tmp_path / "later"
    home.mkdir()
    (home / "keys").symlink_to(tmp_path / "keys")
    async with world(home) as w:
        assert (await w.raw("A", 2)).status_code == 200
        w.key = revoked
        assert (await w.raw("A", 2)).status_code == 401
