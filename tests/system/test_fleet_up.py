"""`fleet up` as a newcomer types it: the default layout, the real model, then ^C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil
import pytest

from infire.pull import pull
from routing.catalogue import load_catalogue
from routing.fleetfile import DATA
from routing.paths import model_folder, paths
from routing.region import ProcessReport
from routing.status import Status
from tests.fakes.reading import read_to

pytestmark = [pytest.mark.system, pytest.mark.slow]

MODEL = "@cf/huggingfacetb/smollm2-135m-instruct"
STOP_S = 5.0 * 5  # five times what is promised: this machine has other work


@pytest.fixture(scope="module")
def smollm2() -> Path:
    row = load_catalogue().row(MODEL)
    folder = model_folder(paths(os.environ).cache, MODEL)
    pull(row.source, folder, sha256=row.sha256, model_digest=row.model_digest)
    return folder


def _have_vectors(home: Path) -> None:
    """The fleet's other model: where a user has it already, it is not fetched again."""
    row = load_catalogue().row("@cf/sentence-transformers/all-minilm-l6-v2")
    folder = model_folder(paths(os.environ).cache, row.model)
    pull(row.source, folder, sha256=row.sha256, model_digest=row.model_digest)
    here = model_folder(paths({"EDGEFIRE_HOME": str(home)}).cache, row.model)
    here.parent.mkdir(parents=True, exist_ok=True)
    here.symlink_to(folder)


def fleet(home: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "routing", *words],
        env={**os.environ, "EDGEFIRE_HOME": str(home)},
        stdout=subprocess.PIPE,
        text=True,
    )


def _status(home: Path) -> Sequence[ProcessReport]:
    said, _ = fleet(home, "status", "--json").communicate(timeout=60)
    return msgspec.json.decode(said, type=Status).processes


def _all_free(processes: Sequence[ProcessReport]) -> bool:
    """Whether the four workers that make text hold no block."""
    workers = [one for one in processes if one.role in {"prefill", "decode"}]
    return len(workers) == 4 and all(it.free_blocks == it.total_blocks > 0 for it in workers)


def test_a_first_answer_then_every_process_and_block_then_nothing(
    tmp_path: Path, smollm2: Path
) -> None:
    layout = tmp_path / "fleet.toml"
    _have_vectors(tmp_path)
    layout.write_text((DATA / "fleet.toml").read_text().replace("port = 8787", "port = 0"))
    launcher = fleet(tmp_path, "up", "--fleet", str(layout), "--model-dir", str(smollm2))
    try:
        out = read_to(launcher, "token: ")
        assert out.startswith("Edge: http://127.0.0.1:")
        assert "usage: 40 prompt + " in out
        assert "served by " in out

        deadline = time.monotonic() + 10  # engines say once a second what is free
        while not _all_free(processes := _status(tmp_path)):
            assert time.monotonic() < deadline, processes
        assert len(processes) == 9
        assert all(one.ready for one in processes)

        for count, names in ((2, {"weur-prefill-0", "weur-prefill-1"}), (1, {"weur-prefill-0"})):
            scaled = fleet(tmp_path, "scale", "weur", f"prefill={count}", "decode=1")
            assert scaled.communicate(timeout=120)[0] == f"weur: {count} prefill, 1 decode\n"
            processes = _status(tmp_path)
            ready = {one.name for one in processes if one.ready}
            assert {name for name in ready if name.startswith("weur-prefill")} == names
    finally:
        launcher.send_signal(signal.SIGINT)
        launcher.communicate(timeout=STOP_S)
    assert launcher.returncode == 0
    assert not [one.name for one in processes if psutil.pid_exists(one.pid)]
    said, _ = fleet(tmp_path, "reconcile", "--settle-s", "0").communicate(timeout=60)
    assert said.startswith("1 requests; 0 differ; 0 rows added;")
