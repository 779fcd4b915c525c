"""`fleet up` as a newcomer types it: the default layout, the real model, then ^C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest

from infire.pull import pull
from routing.catalogue import load_catalogue
from routing.fleetfile import DATA
from routing.paths import model_folder, paths
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

        said, _ = fleet(tmp_path, "status", "--json").communicate(timeout=60)
        processes = msgspec.json.decode(said, type=Status).processes
        assert len(processes) == 9
        assert all(one.ready for one in processes)
        workers = [one for one in processes if one.role in {"prefill", "decode"}]
        assert len(workers) == 4
        assert all(one.free_blocks == one.total_blocks > 0 for one in workers)

        for count, names in ((2, {"weur-prefill-0", "weur-prefill-1"}), (1, {"weur-prefill-0"})):
            scaled = fleet(tmp_path, "scale", "weur", f"prefill={count}", "decode=1")
            assert scaled.communicate(timeout=120)[0] == f"weur: {count} prefill, 1 decode\n"
            said, _ = fleet(tmp_path, "status", "--json").communicate(timeout=60)
            processes = msgspec.json.decode(said, type=Status).processes
            ready = {one.name for one in processes if one.ready}
            assert {name for name in ready if name.startswith("weur-prefill")} == names
    finally:
        launcher.send_signal(signal.SIGINT)
        launcher.communicate(timeout=STOP_S)
    assert launcher.returncode == 0
    assert not [one.name for one in processes if psutil.pid_exists(one.pid)]
    said, _ = fleet(tmp_path, "reconcile", "--settle-s", "0").communicate(timeout=60)
    assert said.startswith("1 requests; 0 differ; 0 rows added;")
