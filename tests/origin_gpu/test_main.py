"""`origin-gpu front` as a process: its flags, and where else they may come from."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from routing.secret import bearer, make_secret
from routing.serving import address, listening_socket

pytestmark = pytest.mark.system


@contextmanager
def front(*words: str, **environment: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The process and its URL; stopped at the end, with exit code 0."""
    with listening_socket("127.0.0.1", 0) as listener:
        number = listener.fileno()
        process = subprocess.Popen(
            [sys.executable, "-m", "origin_gpu", *words, "--fd", str(number)],
            pass_fds=[number],
            stderr=subprocess.PIPE,
            env=os.environ | environment,
            text=True,
        )
        try:
            yield address(listener), process
        finally:
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors


def get(url: str, secret: str = "wrong") -> httpx2.Response:
    return httpx2.get(url, headers=bearer(secret), timeout=60, trust_env=False)


def test_flags_come_from_the_command_line_the_environment_and_a_file(tmp_path: Path) -> None:
    secret = make_secret(tmp_path / "secret")
    config = tmp_path / "front.toml"
    config.write_text(
        f"""
        [front]
        name = "from-file"
        region = "from-file"
        secret_file = "{tmp_path / "secret"}"
        worker = ["w=both@http://127.0.0.1:9"]
        """
    )
    words = ("--config", str(config), "front", "--name", "from-words")
    others = {"ORIGIN_GPU_FRONT_NAME": "from-env", "ORIGIN_GPU_FRONT_REGION": "from-env"}
    with front(*words, **others) as (url, process):
        report = get(f"{url}/v1/report", secret).json()
        (itself,) = report["processes"]
        assert (itself["name"], itself["region"]) == ("from-words", "from-env")
        assert (itself["pid"], itself["url"]) == (process.pid, url)
        assert report["models"] == []  # its worker is not there
        assert get(f"{url}/v1/report").status_code == 401
        assert get(f"{url}/ready").status_code == 503


def test_what_it_logs_are_lines_of_json(tmp_path: Path) -> None:
    make_secret(tmp_path / "secret")
    words = ("front", "--name", "f", "--region", "r", "--secret-file", str(tmp_path / "secret"))
    with front(*words, "--worker", "w=both@http://127.0.0.1:9") as (url, process):
        assert get(f"{url}/health").status_code == 200
        assert process.stderr is not None
        line = json.loads(process.stderr.readline())
        assert (line["process"], line["event"]) == ("f", "link down")
        assert "127.0.0.1:9" in line["url"]


def test_a_journal_that_cannot_be_one_is_told_in_a_line(tmp_path: Path) -> None:
    make_secret(tmp_path / "secret")
    (tmp_path / "notes").write_text("not a database, and longer than its header is" * 9)
    words = ["--name", "f", "--region", "r", "--secret-file", str(tmp_path / "secret")]
    words += ["--worker", "w=both@http://h:1", "--journal", str(tmp_path / "notes")]
    done = subprocess.run(
        [sys.executable, "-m", "origin_gpu", "front", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert f"--journal {tmp_path / 'notes'}: " in done.stderr
    assert "not a database" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("config", "flags", "said"),
    [
        ("", ["--secret-file", "none"], "--secret-file: [Errno 2]"),
        ("", ["--secret-file", "config.toml"], "holds no usable secret"),
        ("x = ", [], "--config: config.toml: Invalid value"),
        ("", ["--host", "192.0.2.7"], "--host 192.0.2.7 --port 0: "),
    ],
)
def test_what_it_cannot_start_with_is_told_in_words(
    tmp_path: Path, config: str, flags: list[str], said: str
) -> None:
    make_secret(tmp_path / "secret")
    (tmp_path / "config.toml").write_text(config)
    words = ["--name", "f", "--region", "r", "--worker", "w=both@http://h:1"]
    words = [*words, "--secret-file", "secret", *flags]
    done = subprocess.run(
        [sys.executable, "-m", "origin_gpu", "--config", "config.toml", "front", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode in {1, 2}
    assert said in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


def test_a_worker_it_cannot_read_is_a_usage_error() -> None:
    words = ("--name", "f", "--region", "r", "--secret-file", "s", "--worker", "w=boss@http://h:1")
    done = subprocess.run(
        [sys.executable, "-m", "origin_gpu", "front", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "boss" in done.stderr
    assert "Traceback" not in done.stderr
