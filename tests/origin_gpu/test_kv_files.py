"""Private, short-lived files, and what is left of processes that were killed."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from origin_gpu.kv_files import open_files, roots, sweep

HOLD_AND_WAIT = """
import sys
from pathlib import Path
from origin_gpu.kv_files import open_files
with open_files([Path(sys.argv[1])]) as files, files.new(1) as path:
    path.write_bytes(b"x")
    print(path, flush=True)
    sys.stdin.read()
"""


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def names(place: Path) -> list[str]:
    return sorted(it.name for it in place.iterdir())


def test_files_are_private_and_gone_with_their_block(tmp_path: Path) -> None:
    with open_files([tmp_path]) as files:
        with files.new(10) as first, files.new(10) as second:
            assert first != second
            assert not first.exists()
            first.write_bytes(b"kv")
            assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700
        assert names(first.parent) == []
        left = first.with_name("left")
        left.touch()
    assert names(tmp_path) == []


def test_a_file_goes_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory first; it is small in many containers."""
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    large.mkdir()
    free = {small: 100, large: 1000}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, free[Path(folder).parent]))
    with open_files([small, large]) as files:
        for num_bytes, where in ((99, small), (100, large), (5000, large)):
            with files.new(num_bytes) as path:
                assert path.parent.parent == where


def test_there_is_a_place(tmp_path: Path) -> None:
    assert roots()
    with open_files(roots()) as files, files.new(1) as path:
        path.write_bytes(b"x")


def test_only_what_the_dead_left_is_swept(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD_AND_WAIT, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        (tmp_path / "another's").mkdir()
        with open_files([tmp_path]):
            assert path.exists(), "its process lives"
            process.kill()
            process.wait()
            assert path.exists()
            sweep(tmp_path)
            assert not path.parent.exists()
            assert len(names(tmp_path)) == 2, "the other's, and our own"


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    place = tmp_path / "place"
    place.mkdir()
    (place / "edgefire-kv-1-x").symlink_to(victim)
    sweep(place)
    assert victim.exists()
