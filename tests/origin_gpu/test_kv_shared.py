"""Files of KV that two workers of one host share: what is linked, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from origin_gpu import kv_shared
from origin_gpu.kv_shared import SharedFiles
from origin_gpu.kv_ways import Refused
from tests.origin_gpu.conftest import FOLDER, shared


async def test_a_shared_file_is_the_same_file(tmp_path: Path, offered: Path) -> None:
    way = shared(tmp_path)
    async with way.lend(offered, 1000, way.about()) as said:
        await way.take(said, 1000, tmp_path / "in")
    assert (tmp_path / "in").samefile(offered)
    offered.unlink()  # as the giver does when it is told
    assert (tmp_path / "in").read_bytes() == b"k" * 1000


async def test_another_host_is_refused(tmp_path: Path, offered: Path) -> None:
    with pytest.raises(Refused, match="another host"):
        async with shared(tmp_path).lend(offered, 1000, b"elsewhere"):
            pass


@pytest.mark.parametrize(
    "said",
    [
        b"", b"/", b"7.kv", f"{FOLDER}/../7.kv".encode(), b"../giver/7.kv", b"/etc/passwd",
        f"{FOLDER}/8".encode(), f"{FOLDER}/7.kv/".encode(), f"x{FOLDER}/7.kv".encode(),
        b"\xff/7.kv", f"{FOLDER}/7.kv\0".encode(),
    ],
)  # fmt: skip
async def test_only_files_of_kv_are_linked(tmp_path: Path, offered: Path, said: bytes) -> None:
    with pytest.raises(Refused, match="is no file of KV"):
        await shared(tmp_path).take(said, 1000, tmp_path / "in")
    assert not (tmp_path / "in").exists()


async def test_what_is_not_seen_here_is_refused(tmp_path: Path) -> None:
    """As in a container that has the kernel in common with the giver's, and no folders."""
    with pytest.raises(Refused, match="not among this worker's folders"):
        await shared(tmp_path).take(f"{FOLDER}/7.kv".encode(), 1000, tmp_path / "in")


async def test_links_are_not_followed(tmp_path: Path, offered: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * 1000)
    offered.unlink()
    offered.symlink_to(secret)
    with pytest.raises(Refused, match="no file of this user"):
        await shared(tmp_path).take(f"{FOLDER}/7.kv".encode(), 1000, tmp_path / "in")
    other = tmp_path / "giver" / "edgefire-kv-2-0123abcd"
    other.symlink_to(tmp_path / "giver" / FOLDER)
    with pytest.raises(Refused, match="edgefire-kv-2"):
        await shared(tmp_path).take(b"edgefire-kv-2-0123abcd/7.kv", 1000, tmp_path / "in")
    assert not (tmp_path / "in").exists()


async def test_another_size_is_refused(tmp_path: Path, offered: Path) -> None:
    with pytest.raises(Refused, match="has 1000 bytes, not 999"):
        await shared(tmp_path).take(f"{FOLDER}/7.kv".encode(), 999, tmp_path / "in")
    assert not (tmp_path / "in").exists()


async def test_another_file_system_is_refused(
    tmp_path: Path, offered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(kv_shared.os, "link", link)
    with pytest.raises(Refused, match="cross-device"):
        await shared(tmp_path).take(f"{FOLDER}/7.kv".encode(), 1000, tmp_path / "in")


def test_a_host_knows_itself() -> None:
    assert SharedFiles([]).about() == SharedFiles([]).about() != b""
