"""The commands as an operator types them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import anyio
import httpx2
import pytest
from anyio import to_thread

from routing.serving import address, listening_socket
from tests.fakes.counting_region import SECRET, CountingRegion, running

ROOT = Path(__file__).parents[2]


def edge(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "EDGEFIRE_HOME": str(home)},
        timeout=60,
        check=False,
    )


def test_keys_are_made_listed_and_revoked(tmp_path: Path) -> None:
    made = edge(tmp_path, "key", "create", "--account", "acme", "--days", "3")
    assert made.returncode == 0, made.stderr
    [key] = made.stdout.splitlines()  # alone, so that it can be put into a variable
    assert "acme" in made.stderr
    [row] = edge(tmp_path, "key", "list").stdout.splitlines()
    jti, account, _, state = row.split()
    assert (account, state) == ("acme", "good")
    assert edge(tmp_path, "key", "revoke", key).returncode == 0
    [row] = edge(tmp_path, "key", "list").stdout.splitlines()
    assert row.split()[0] == jti
    assert row.endswith("revoked")
    limits = ("--limit", "requests=5/min", "--limit", "usd=2/month", "--priority", "-1")
    assert edge(tmp_path, "key", "create", "--account", "acme", *limits).returncode == 0
    _, row = edge(tmp_path, "key", "list").stdout.splitlines()
    assert row.endswith("  good  requests=5/min  usd=2/month  priority -1")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("key", "create", "--account", "../x"), "account id"),
        (("key", "revoke", "nonsense"), "neither a key"),
        (("serve", "--fleet", "nowhere.toml", "--secret-file", "s"), "nowhere.toml"),
        (("key", "create", "--account", "a", "--days", "0"), "days"),
        (("key", "create", "--account", "a", "--limit", "much"), "NAME=COUNT/PERIOD"),
        (("key", "create", "--account", "a", "--priority", "999"), "-100 to 100"),
    ],
)
def test_mistakes_are_told_in_words(tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    done = edge(tmp_path, *words)
    assert done.returncode == 2
    assert says in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("flag", ["--ledger", "--store"])
def test_a_file_that_cannot_be_one_is_told_in_words(tmp_path: Path, flag: str) -> None:
    (tmp_path / "secret").write_text(SECRET)
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(
        '[[region]]\nname = "r"\nurl = "http://h:1"\nlatitude = 0.0\nlongitude = 0.0\n'
    )
    (tmp_path / "notes").write_text("not a database, and longer than its header is" * 9)
    words = ["serve", "--fleet", str(fleet), "--secret-file", str(tmp_path / "secret")]
    done = edge(tmp_path, *words, flag, str(tmp_path / "notes"))
    assert done.returncode == 2
    assert "not a database" in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


@pytest.mark.system
async def test_serve_answers_and_stops_when_told(tmp_path: Path) -> None:
    region = CountingRegion()
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    place = region.region.place
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(
        f'[[region]]\nname = "weur"\nurl = "{region.region.url}"\n'
        f"latitude = {place.latitude}\nlongitude = {place.longitude}\n"
    )
    key = edge(tmp_path, "key", "create", "--account", "acme").stdout.strip()
    words = ["serve", "--fleet", str(fleet), "--secret-file", str(secret)]
    listener = listening_socket("127.0.0.1", 0)
    url = address(listener)
    async with running(region):
        with listener:
            process = started(tmp_path, listener, *words)
        try:
            async with httpx2.AsyncClient(trust_env=False) as client:
                await _until_ready(client, url, process)
                answer = await client.post(
                    f"{url}/client/v4/accounts/acme/ai/run/@cf/test/counting",
                    json={"prompt": "A", "raw": True, "max_tokens": 3},
                    headers={"authorization": f"Bearer {key}"},
                )
            assert answer.json()["result"]["response"] == "BCD"
            process.send_signal(signal.SIGTERM)
            assert await to_thread.run_sync(process.wait, 10) == 0
        finally:
            process.kill()
            process.wait()
    assert '"event":"request"' in (tmp_path / "log").read_text()


def started(home: Path, listener: socket.socket, *words: str) -> subprocess.Popen[bytes]:
    with (home / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "edge", *words, "--fd", str(listener.fileno())],
            pass_fds=[listener.fileno()],
            stderr=log,
            cwd=ROOT,
            env={**os.environ, "EDGEFIRE_HOME": str(home)},
        )


async def _until_ready(
    client: httpx2.AsyncClient, url: str, process: subprocess.Popen[bytes]
) -> None:
    with anyio.fail_after(60):
        while True:
            assert process.poll() is None
            try:
                if (await client.get(f"{url}/ready")).status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            await anyio.sleep(0.05)
