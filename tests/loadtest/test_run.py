"""A whole load test against a stand-in edge: locust as a process, then the table and the matrix."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from loadtest.run import Load, Target, locust_command
from routing.children import bind, url_of

pytestmark = pytest.mark.system
STAND_IN = Path(__file__).parents[1] / "fakes" / "stand_in.py"
PATIENCE_S = 60.0


@contextmanager
def edge(*behaviour: str) -> Iterator[str]:
    """A stand-in that answers runs; its URL."""
    with bind("127.0.0.1", 0) as listener:
        url, fd = url_of(listener), listener.fileno()
        process = subprocess.Popen(
            [sys.executable, str(STAND_IN), *behaviour, "--fd", str(fd)], pass_fds=[fd]
        )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not _ready(url):
            assert time.monotonic() < deadline
        yield url
    finally:
        process.terminate()
        process.wait()


def _ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/ready", timeout=PATIENCE_S, trust_env=False).is_success
    except httpx2.TransportError:
        return False


def load(url: str, home: Path, *, token: str = "a-key") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loadtest", "run", "--users", "2", "--time", "1"]
    return subprocess.run(
        [*command, "--url", url, "--token", token, "--model", "@cf/m"],
        env={**os.environ, "EDGEFIRE_HOME": str(home), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def test_half_the_users_are_in_europe_and_every_answer_is_timed(tmp_path: Path) -> None:
    with edge() as url:
        done = load(url, tmp_path)
    assert done.returncode == 0, done.stderr
    assert ", 0 failed" in done.stdout
    rows = {line.split("  ")[0].strip(): line.split() for line in done.stdout.splitlines()}
    assert int(rows["Europe"][-1]) > 0
    assert int(rows["North America"][-1]) > 0
    (log,) = tmp_path.glob("state/loadtest/*/locust.log")
    for row in ("TTFT     Europe", "ITL      North America", "served   Europe by weur"):
        assert row in log.read_text()


@pytest.mark.parametrize(
    ("behaviour", "token", "said"),
    [
        ("truncates", "a-key", "stream ended without [DONE]"),
        ("breaks", "a-key", "HTTPParseError"),
        ("", "wrong", "HTTP 401"),
    ],
)
def test_what_goes_wrong_is_counted_and_fails_the_run(
    tmp_path: Path, behaviour: str, token: str, said: str
) -> None:
    with edge(behaviour) as url:
        done = load(url, tmp_path, token=token)
    assert done.returncode == 1
    assert said in done.stdout
    assert ", 0 failed" not in done.stdout


def test_nobody_there_fails_the_run(tmp_path: Path) -> None:
    done = load("http://127.0.0.1:9", tmp_path)
    assert done.returncode == 1
    assert "ConnectionRefusedError" in done.stdout


def test_without_a_fleet_it_says_how_to_start_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loadtest", "run"],
        env={**os.environ, "EDGEFIRE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "start one by fleet up" in done.stderr


def test_the_key_is_not_on_the_command_line(tmp_path: Path) -> None:
    target = Target(url="http://127.0.0.1:9", account="a", token="very-secret", model="m")
    words = locust_command(target, Load(users=1, duration_s=1, max_tokens=1), tmp_path)
    assert "very-secret" not in " ".join(words)
