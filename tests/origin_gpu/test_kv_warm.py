"""Files whose pages stay: whose they are at any time, and that nothing of another shows."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import anyio
import pytest

from origin_gpu.kv_transfer import DoorTransport, KVDoor
from origin_gpu.kv_warm import WarmFiles
from tests.origin_gpu.test_kv_transfer import SECRET, peer, ticket, wait_collected

MOST = 1 << 20


@pytest.fixture
def warm(tmp_path: Path) -> Iterator[WarmFiles]:
    with closing(WarmFiles(MOST, tmp_path)) as files:
        yield files
    assert list(tmp_path.glob("**/warm-*")) == []


def write(warm: WarmFiles, path: Path, content: bytes) -> bool:
    """Whether it was kept warm."""
    with warm.new(path, len(content)) as room:
        if room is None:
            return False
        assert len(room) == len(content)
        room[:] = content
    assert path.read_bytes() == content
    return True


def inodes(*paths: Path) -> list[int]:
    return [path.stat().st_ino for path in paths]


def test_a_file_is_written_again_once_its_name_is_gone(warm: WarmFiles, tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    assert write(warm, a, b"a" * 5000)
    assert write(warm, b, b"b" * 5000)
    assert len(set(inodes(a, b))) == 2
    (first,) = inodes(a)
    a.unlink()
    assert write(warm, c, b"c" * 5000)
    assert inodes(c) == [first]
    assert b.read_bytes() == b"b" * 5000


def test_what_is_being_read_is_not_written_to_once_its_name_is_gone(
    warm: WarmFiles, tmp_path: Path
) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    assert write(warm, a, b"a" * 5000)
    (first,) = inodes(a)
    with a.open("rb") as reader:
        with warm.being_read(a):
            a.unlink()
            assert write(warm, b, b"b" * 3000)
        assert reader.read() == b"a" * 5000
    assert write(warm, c, b"c" * 5000)
    assert inodes(c) == [first]


def test_what_may_be_read_still_is_never_written_to(warm: WarmFiles, tmp_path: Path) -> None:
    def give_up() -> None:
        with warm.being_read(tmp_path / "a"):
            raise ConnectionError

    assert write(warm, tmp_path / "a", b"a" * 5000)
    with (tmp_path / "a").open("rb") as reader:
        with pytest.raises(ConnectionError):
            give_up()
        (tmp_path / "a").unlink()
        assert write(warm, tmp_path / "b", b"b" * 5000)
        assert reader.read() == b"a" * 5000
    assert warm.num_bytes == 5000


@pytest.mark.parametrize("sizes", [(5000, 3), (3, 5000), (1, 500_000, 4096, 70_000)])
def test_sizes_may_differ(warm: WarmFiles, tmp_path: Path, sizes: tuple[int, ...]) -> None:
    for n, size in enumerate(sizes):
        path = tmp_path / str(n)
        assert write(warm, path, bytes([n + 1]) * size)
        path.unlink()
    assert len(list(tmp_path.glob("warm-*"))) == 1


def test_no_more_is_kept_than_may_be(warm: WarmFiles, tmp_path: Path) -> None:
    assert write(warm, tmp_path / "a", b"a" * (MOST - 10))
    assert not write(warm, tmp_path / "b", b"b" * 11)
    assert not (tmp_path / "b").exists()
    assert write(warm, tmp_path / "c", b"c" * 10)
    (tmp_path / "a").unlink()
    assert not write(warm, tmp_path / "d", b"d" * (MOST - 9))
    assert write(warm, tmp_path / "e", b"e" * 7)
    assert warm.num_bytes <= MOST


def test_elsewhere_nothing_is_kept(
    warm: WarmFiles, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert not write(warm, tmp_path_factory.mktemp("disk") / "a", b"a")


def test_what_fails_leaves_no_name(warm: WarmFiles, tmp_path: Path) -> None:
    def fail() -> None:
        with warm.new(tmp_path / "a", 100):
            raise ConnectionError

    with pytest.raises(ConnectionError):
        fail()
    assert not (tmp_path / "a").exists()
    assert write(warm, tmp_path / "a", b"again")


def test_an_error_that_somebody_still_has_keeps_nobody_from_the_file(
    warm: WarmFiles, tmp_path: Path
) -> None:
    """Its traceback has a view of what was being received."""

    def fail() -> None:
        with warm.new(tmp_path / "a", 100) as room:
            assert room is not None
            some = room[:50]
            some[:] = bytes(50)
            raise ConnectionError

    with pytest.raises(ConnectionError) as kept:
        fail()
    assert write(warm, tmp_path / "b", b"b" * 10_000)
    assert kept.value.__traceback__ is not None
    assert len(list(tmp_path.glob("warm-*"))) == 1


def test_a_name_that_is_taken_is_not_written_to(warm: WarmFiles, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FileExistsError), warm.new(tmp_path / "a", 4):
        pass
    assert (tmp_path / "a").read_text() == "mine"


def test_a_full_place_is_an_error_and_no_signal(
    warm: WarmFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"), warm.new(tmp_path / "a", 100):
        pass
    assert not (tmp_path / "a").exists()


async def test_kv_over_a_connection_comes_into_them(warm: WarmFiles, tmp_path: Path) -> None:
    out, draw, seen = tmp_path / "out", random.Random(1), set()
    transport = DoorTransport(SECRET, warm=warm)
    with KVDoor("127.0.0.1", SECRET) as door:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(door.run)
            for n in range(6):
                content = draw.randbytes(draw.randint(1, 300_000))
                out.write_bytes(content)
                mine, into = ticket(len(content), f"r{n}"), tmp_path / f"in-{n}"
                with door.offer(mine, out) as offer:
                    offer.exported()
                    assert await transport.collect(mine, peer(door.address), into) == "tcp"
                    await wait_collected(offer)
                assert into.read_bytes() == content
                seen.add(into.stat().st_ino)
                into.unlink()
            tasks.cancel_scope.cancel()
    assert len(seen) == 1
