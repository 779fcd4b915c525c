"""The `fleet` command as it is typed: what it refuses, and how."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from routing.runs import RunningFleet, new_run, say_running

pytestmark = pytest.mark.system


def fleet(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "routing", *words],
        env={**os.environ, "EDGEFIRE_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("words", [["status"], ["status", "--json"]])
def test_status_without_a_fleet_says_so(tmp_path: Path, words: list[str]) -> None:
    done = fleet(tmp_path, *words)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "no fleet is running" in done.stderr


def test_a_fleet_file_with_a_mistake_starts_nothing(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text('[fleet]\nmodel = "@cf/a/b"\n[[region]]\nname = "weur"\n')
    done = fleet(tmp_path, "up", "--fleet", str(path))
    assert done.returncode == 1
    assert f"{path}: region 1 (weur): object missing required field `worker`" in done.stderr
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prefill"], "'prefill' is not like prefill=2"),
        (["decode=1", "decode=-1"], "'decode=-1' is not like prefill=2"),
        (["decode=1", "decode=2"], "decode is there twice"),
    ],
)
def test_counts_that_say_no_number_change_nothing(
    tmp_path: Path, words: list[str], said: str
) -> None:
    folder = new_run(tmp_path / "state")
    (folder / "secret").write_text("a-secret")
    say_running(
        folder,
        RunningFleet(
            run=folder.name,
            launcher=1,
            model="@cf/m",
            secret_file=str(folder / "secret"),
            keys_dir="",
            logs="",
            control="127.0.0.1:9",
            processes=(),
        ),
    )
    done = fleet(tmp_path, "scale", "weur", *words)
    assert done.returncode == 1
    assert done.stderr.strip() == said


def test_an_unknown_model_is_named(tmp_path: Path) -> None:
    done = fleet(tmp_path, "pull", "@cf/nobody/nothing")
    assert done.returncode == 1
    assert "@cf/nobody/nothing" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_in_a_folder_comes_by_an_own_catalogue(tmp_path: Path) -> None:
    """As far as the folder, which is not there."""
    rows = tmp_path / "models.toml"
    rows.write_text(
        '[[model]]\nmodel = "@cf/own/model"\nsource = "path:/nowhere/at/all"\nlicence = "-"\n'
        'description = "-"\nprecision = "BF16"\ncontext_window = 100\n'
    )
    done = fleet(tmp_path, "pull", "@cf/own/model", "--catalogue", str(rows))
    assert done.returncode == 1
    assert "/nowhere/at/all" in done.stderr
    assert "Traceback" not in done.stderr
