"""Bundles are made whole or not at all, whoever is in the way."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.unweight.bundles import bf16, bundle, file_of, source
from unweight.safetensors_header import BadFile
from unweight.samples import trained_like
from unweight.writer import (
    Refused,
    check_folder,
    pack_folder,
    size_on_disk,
    total_bytes,
    unpack_folder,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Three files of 8 MB, and a configuration."""
    folder = tmp_path / "model"
    folder.mkdir()
    for n in range(3):
        weights = trained_like(1024, 4096, seed=n)
        (folder / f"model-{n}.safetensors").write_bytes(file_of({f"w{n}": bf16(weights)}))
    (folder / "config.json").write_text("{}")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_there_is_left(model: Path, tmp_path: Path) -> None:
    made = pack_folder(model, tmp_path / "bundle", threads=2)
    assert sorted(made) == sorted(path.name for path in model.iterdir())
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "bundle").iterdir()}
    assert pack_folder(model, tmp_path / "bundle", threads=2) == []
    assert times == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "bundle").iterdir()}
    unpack_folder(tmp_path / "bundle", tmp_path / "again", threads=2)
    assert unpack_folder(tmp_path / "bundle", tmp_path / "again", threads=2) == []
    (tmp_path / "again" / "model-1.safetensors").unlink()
    assert unpack_folder(tmp_path / "bundle", tmp_path / "again", threads=2) == [
        "model-1.safetensors"
    ]


def test_another_file_in_the_way_is_not_touched(tmp_path: Path) -> None:
    path = bundle(tmp_path)
    before = path.read_bytes()
    other = tmp_path / "other.safetensors"
    other.write_bytes(file_of({"w": bf16(trained_like(8, 1024, seed=9))}))
    with pytest.raises(Refused, match=r"bundle\.safetensors is there already, packed from another"):
        pack_folder(other, path, threads=1)
    with pytest.raises(Refused, match=r"other\.safetensors is there already"):
        unpack_folder(path, other, threads=1)
    with pytest.raises(Refused, match=r"other\.safetensors is there already, and no whole bundle"):
        pack_folder(tmp_path / "plain.safetensors", other, threads=1)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (("model", "model"), "the folder that is read"),
        (("model", "model/inside"), "or inside it"),
        (("nowhere", "bundle"), "nowhere is not there"),
        (("empty", "bundle"), "empty has no safetensors file"),
        (("model", "file"), "file is there already, and no folder"),
    ],
)
def test_what_cannot_be_meant(
    model: Path, tmp_path: Path, given: tuple[str, str], complaint: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    before = files(model)
    with pytest.raises(Refused, match=complaint):
        pack_folder(tmp_path / given[0], tmp_path / given[1], threads=1)
    assert files(model) == before


def test_a_bundle_is_not_packed_again(tmp_path: Path) -> None:
    path = bundle(tmp_path)
    with pytest.raises(Refused, match="packed already"):
        pack_folder(path, tmp_path / "twice.safetensors", threads=1)


def test_links_are_followed(model: Path, tmp_path: Path) -> None:
    """As caches of model hubs have their files."""
    (tmp_path / "snapshot").mkdir()
    for path in model.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    pack_folder(tmp_path / "snapshot", tmp_path / "bundle", threads=1)
    assert not any(path.is_symlink() for path in (tmp_path / "bundle").iterdir())
    unpack_folder(tmp_path / "bundle", tmp_path / "again", threads=1)
    assert files(tmp_path / "again") == files(model)


def test_progress_adds_up(model: Path, tmp_path: Path) -> None:
    packed: list[int] = []
    pack_folder(model, tmp_path / "bundle", threads=2, progress=packed.append)
    assert sum(packed) == total_bytes(model, unpacked=False) == size_on_disk(model)
    unpacked: list[int] = []
    unpack_folder(tmp_path / "bundle", tmp_path / "again", threads=2, progress=unpacked.append)
    assert sum(unpacked) == total_bytes(tmp_path / "bundle", unpacked=True) == sum(packed)
    again: list[int] = []
    pack_folder(model, tmp_path / "bundle", threads=2, progress=again.append)
    assert sum(again) == sum(packed)
    checked: list[int] = []
    check_folder(tmp_path / "bundle", threads=1, progress=checked.append)
    assert sum(checked) == total_bytes(tmp_path / "bundle", unpacked=True, copies=False)


def test_a_damaged_file_stops_it_and_the_rest_stays(model: Path, tmp_path: Path) -> None:
    whole = (model / "model-2.safetensors").read_bytes()
    (model / "model-2.safetensors").write_bytes(whole[:-1])
    with pytest.raises(BadFile, match=r"model-2\.safetensors"):
        pack_folder(model, tmp_path / "bundle", threads=1)
    made = {"config.json", "model-0.safetensors", "model-1.safetensors"}
    assert set(files(tmp_path / "bundle")) == made
    (model / "model-2.safetensors").write_bytes(whole)
    assert pack_folder(model, tmp_path / "bundle", threads=1) == ["model-2.safetensors"]


# --- other processes -----------------------------------------------------------------------------

PACK = (
    "import sys; from pathlib import Path; from unweight.writer import pack_folder;"
    "print(pack_folder(Path(sys.argv[1]), Path(sys.argv[2]), threads=1))"
)


def packing(source: Path, target: Path, code: str = PACK) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(source), str(target)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_one_that_was_killed_is_taken_up_again(model: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of the second file, as near as can be seen from outside."""
    slow = (
        "import time; from unweight import coder; real = coder.encode;"
        "coder.encode = lambda exponents: (time.sleep(0.02), real(exponents))[1];" + PACK
    )
    with packing(model, tmp_path / "bundle", slow) as process:
        making = tmp_path / "bundle" / ".model-1.safetensors.making"
        deadline = time.monotonic() + 60
        while not (making.exists() and making.stat().st_size > 0):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    there = files(tmp_path / "bundle")
    assert "model-0.safetensors" in there
    assert "model-1.safetensors" not in there
    stamp = (tmp_path / "bundle" / "model-0.safetensors").stat().st_mtime_ns
    made = pack_folder(model, tmp_path / "bundle", threads=2)
    assert made == ["model-1.safetensors", "model-2.safetensors"]
    assert (tmp_path / "bundle" / "model-0.safetensors").stat().st_mtime_ns == stamp
    assert set(files(tmp_path / "bundle")) == set(files(model))
    unpack_folder(tmp_path / "bundle", tmp_path / "again", threads=2)
    assert files(tmp_path / "again") == files(model)


def test_two_at_once_make_one_bundle(model: Path, tmp_path: Path) -> None:
    def run() -> tuple[int, str]:
        with packing(model, tmp_path / "bundle") as process:
            _, errors = process.communicate(timeout=120)
            return process.returncode, errors

    with ThreadPoolExecutor(2) as pool:
        ends = [future.result() for future in [pool.submit(run), pool.submit(run)]]
    assert 0 in {code for code, _ in ends}
    for code, errors in ends:
        assert code == 0 or "Refused" in errors, errors
    assert set(files(tmp_path / "bundle")) == set(files(model))
    check_folder(tmp_path / "bundle", threads=1)


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files is the same error of the same call."""
    plain = tmp_path / "plain.safetensors"
    source(plain)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = subprocess.run(
        [sys.executable, "-c", PACK, str(plain), str(tmp_path / "out" / "b.safetensors")],
        preexec_fn=limit, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert process.returncode == 1
    assert "OSError: [Errno 27] File too large" in process.stderr
    assert list((tmp_path / "out").iterdir()) == []
