"""Bundles are made whole or not at all, whoever is in the way."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unweight.bundles import bf16, bundle, file_of, files, left_in, source
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
    for in_the_way in (other.read_bytes(), before, before[:-1], b"", b"hello"):
        other.write_bytes(in_the_way)
        with pytest.raises(Refused, match=r"other\.safetensors is there already"):
            unpack_folder(path, other, threads=1)
        assert other.read_bytes() == in_the_way
    for in_the_way in (file_of({}), before[:-1], before.replace(b"ht/1", b"ht/2"), b"", b"hello"):
        other.write_bytes(in_the_way)
        with pytest.raises(Refused, match="is there already, and no whole bundle"):
            pack_folder(tmp_path / "plain.safetensors", other, threads=1)
        assert other.read_bytes() == in_the_way
    assert path.read_bytes() == before
    assert left_in(tmp_path) == [path.name, other.name, "plain.safetensors"]


def test_another_folder_in_the_way_is_not_touched(model: Path, tmp_path: Path) -> None:
    """Whichever of its files it is, and what was there before it stays, too."""
    target = tmp_path / "bundle"
    for name, put in (
        ("config.json", lambda path: path.write_text("{ }")),
        ("config.json", lambda path: path.mkdir()),
        ("model-1.safetensors", lambda path: path.write_text("{}")),
        ("model-1.safetensors", lambda path: path.mkdir()),
    ):
        pack_folder(model, target, threads=1)
        (target / name).unlink()
        put(target / name)
        before = {path: path.read_bytes() for path in target.iterdir() if path.is_file()}
        with pytest.raises(Refused, match=rf"{name} is there already"):
            pack_folder(model, target, threads=1)
        assert {path: path.read_bytes() for path in target.iterdir() if path.is_file()} == before
        (target / name).unlink() if (target / name).is_file() else (target / name).rmdir()


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


def test_a_hub_names_files_by_their_digest(model: Path, tmp_path: Path) -> None:
    """Relative links to names that say nothing of what is in them, and one of them alone."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    (snapshot / "onnx").mkdir(parents=True)
    for n, path in enumerate(sorted(model.iterdir())):
        (blobs / f"{n:064x}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{n:064x}")
    (snapshot / "onnx" / "config.json").symlink_to(f"../../../blobs/{0:064x}")
    pack_folder(snapshot, tmp_path / "bundle", threads=1)
    assert left_in(tmp_path / "bundle") == sorted([*files(model), "onnx/config.json"])
    unpack_folder(tmp_path / "bundle", tmp_path / "again", threads=1)
    for name in left_in(tmp_path / "again"):
        assert (tmp_path / "again" / name).read_bytes() == (snapshot / name).read_bytes()
    link = snapshot / "model-1.safetensors"
    pack_folder(link, tmp_path / "one.safetensors", threads=1)
    one = (tmp_path / "one.safetensors").read_bytes()
    assert one == (tmp_path / "bundle" / link.name).read_bytes()
    assert link.is_symlink()


def test_a_bundle_that_is_a_link_is_read(tmp_path: Path) -> None:
    path = bundle(tmp_path)
    (tmp_path / "link.safetensors").symlink_to(path.name)
    unpack_folder(tmp_path / "link.safetensors", tmp_path / "again", threads=1)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()


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
    again.clear()
    unpack_folder(tmp_path / "bundle", tmp_path / "again", threads=2, progress=again.append)
    assert sum(again) == sum(packed)
    for told in (packed, unpacked, again):
        assert min(told) > 0
    assert len(packed) > 3 * 4  # chunk by chunk
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


# --- what fails in the middle --------------------------------------------------------------------


def test_stopping_it_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C, at each of the calls in which one may be."""
    plain, path = tmp_path / "plain.safetensors", bundle(tmp_path)

    def stopped_at(call: int) -> Callable[[int], None]:
        calls = iter(range(call))

        def progress(_: int) -> None:
            if next(calls, None) is None:
                raise KeyboardInterrupt

        return progress

    def attempt(convert: Callable[..., list[str]], given: Path, name: str) -> int:
        """The number of calls that it was stopped at."""
        for call in range(100):
            try:
                convert(given, tmp_path / "out" / name, threads=2, progress=stopped_at(call))
            except KeyboardInterrupt:
                assert name not in left_in(tmp_path / "out")
            else:
                return call
            assert not list((tmp_path / "out").glob(".*"))
        raise AssertionError(name)

    assert attempt(pack_folder, plain, "packed.safetensors") > 4
    assert attempt(unpack_folder, path, "plain.safetensors") > 4
    assert (tmp_path / "out" / "plain.safetensors").read_bytes() == plain.read_bytes()
    assert (tmp_path / "out" / "packed.safetensors").read_bytes() == path.read_bytes()


def test_a_disk_that_fails_at_the_end_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it is flushed, as disks over a network do."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = bundle(tmp_path)
    (tmp_path / "model").mkdir()
    source(tmp_path / "model" / "a.safetensors")
    (tmp_path / "model" / "0.json").write_text("{}")
    monkeypatch.setattr(os, "fsync", full)
    before = left_in(tmp_path)
    for convert, given, name in (
        (pack_folder, tmp_path / "model", "out"),
        (pack_folder, tmp_path / "plain.safetensors", "x.safetensors"),
        (unpack_folder, path, "x.safetensors"),
    ):
        with pytest.raises(OSError, match="No space left"):
            convert(given, tmp_path / name, threads=1)
        assert left_in(tmp_path) == before


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    path = bundle(tmp_path)
    before = left_in(tmp_path)
    for place in (path / "x.safetensors", Path("/proc/x/y.safetensors"), tmp_path / ("n" * 300)):
        for convert, given in (
            (pack_folder, tmp_path / "plain.safetensors"),
            (unpack_folder, path),
        ):
            with pytest.raises(OSError, match=r"^\[Errno \d+\]"):
                convert(given, place, threads=1)
    assert left_in(tmp_path) == before


def test_what_a_killed_one_left_is_not_of_the_model(model: Path, tmp_path: Path) -> None:
    """A folder in which something was stopped is packed without the half of a file."""
    (model / ".model-3.safetensors.making").write_bytes(b"half")
    told: list[int] = []
    pack_folder(model, tmp_path / "bundle", threads=1, progress=told.append)
    assert left_in(tmp_path / "bundle") == sorted({*files(model)} - {".model-3.safetensors.making"})
    assert sum(told) == total_bytes(model, unpacked=False)


def test_what_a_killed_one_left_is_written_over(tmp_path: Path) -> None:
    """However long it was."""
    path = bundle(tmp_path)
    whole = path.read_bytes()
    path.unlink()
    (tmp_path / f".{path.name}.making").write_bytes(b"x" * 3_000_000)
    pack_folder(tmp_path / "plain.safetensors", path, threads=1)
    assert path.read_bytes() == whole
    assert left_in(tmp_path) == [path.name, "plain.safetensors"]


# --- two at once, step by step -------------------------------------------------------------------


def test_what_another_makes_is_left_to_it(tmp_path: Path) -> None:
    path = bundle(tmp_path)
    path.unlink()
    making = tmp_path / f".{path.name}.making"
    with making.open("wb") as file:
        file.write(b"of another")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Refused, match=r"bundle\.safetensors is being made by another"):
            pack_folder(tmp_path / "plain.safetensors", path, threads=1)
    assert making.read_bytes() == b"of another"
    assert not path.exists()


def meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """What another process does after this one has opened its file, and before it has locked it."""
    flock = fcntl.flock

    def late(file: int, operation: int) -> None:
        act()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)


@pytest.mark.parametrize("a_third", [False, True])
def test_one_that_ends_while_another_starts_has_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, a_third: bool
) -> None:
    """The other holds the lock of a file that has been moved to its place; and a third may be at
    work under the name that it had."""
    path = bundle(tmp_path)
    path.unlink()
    making = tmp_path / f".{path.name}.making"

    def end() -> None:
        making.write_bytes(b"whole")
        making.replace(path)
        if a_third:
            making.write_bytes(b"half")

    meanwhile(monkeypatch, end)
    with pytest.raises(Refused, match=r"bundle\.safetensors is being made by another"):
        pack_folder(tmp_path / "plain.safetensors", path, threads=1)
    assert path.read_bytes() == b"whole"
    assert (making.read_bytes() if making.exists() else None) == (b"half" if a_third else None)


def test_one_that_gives_up_while_another_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle(tmp_path)
    path.unlink()
    meanwhile(monkeypatch, (tmp_path / f".{path.name}.making").unlink)
    with pytest.raises(Refused, match=r"bundle\.safetensors is being made by another"):
        pack_folder(tmp_path / "plain.safetensors", path, threads=1)
    assert left_in(tmp_path) == ["plain.safetensors"]


def test_one_that_ended_before_another_started_has_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was not there when the other looked."""
    path = bundle(tmp_path)
    path.unlink()
    meanwhile(monkeypatch, lambda: path.write_bytes(b"whole"))
    with pytest.raises(Refused, match=r"bundle\.safetensors is there already"):
        pack_folder(tmp_path / "plain.safetensors", path, threads=1)
    assert path.read_bytes() == b"whole"
    assert left_in(tmp_path) == [path.name, "plain.safetensors"]
