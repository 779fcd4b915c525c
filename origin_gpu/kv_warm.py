"""Files for KV that comes over a connection, whose pages stay in memory from one to the next.

New pages cost as much as a fast network: the kernel zeroes each, and maps it at its first touch. So
a file is kept under a name of its own, mapped, and linked to the name that somebody wants; once
that name is gone and nobody reads it, it may be written again. Linux's shared memory only: a disk
would be written to.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from origin_gpu.kv_files import SHARED_MEMORY

MOST_BYTES = 256 << 20  # kept by one worker
MOST_SHARE = 4  # and a quarter of the place, which in a container has 64 MB


class WarmFiles:
    """Kept in the folders in which they are wanted. Nobody else may write to them."""

    def __init__(self, most_bytes: int = MOST_BYTES, place: Path = SHARED_MEMORY) -> None:
        room = shutil.disk_usage(place).total // MOST_SHARE if place.is_dir() else 0
        self._most_bytes = min(most_bytes, room)
        self._place = place
        self._kept: list[_Warm] = []
        self._number = 0

    @property
    def num_bytes(self) -> int:
        """Of all that are kept."""
        return sum(warm.num_bytes for warm in self._kept)

    @contextmanager
    def new(self, path: Path, num_bytes: int) -> Iterator[memoryview | None]:
        """A new file at `path`, of so many bytes, to be written whole before the block is left; or
        none, where it would not be kept. Raises OSError; then, or if the block fails, the name is
        gone again."""
        warm = self._take(path, num_bytes) if self._place in path.parents else None
        if warm is None:
            yield None
            return
        os.link(warm.path, path)
        warm.name = path
        try:
            with warm.view(num_bytes) as view:
                yield view
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    @contextmanager
    def being_read(self, *paths: Path) -> Iterator[None]:
        """A block in which somebody else reads what lies there, whatever becomes of the names. If
        it fails, nobody knows until when: such a file is never written to again."""
        being_read = [warm for warm in self._kept if warm.name in paths]
        for warm in being_read:
            warm.is_read = True
        try:
            yield
        except BaseException:
            for warm in being_read:
                self._kept.remove(warm)
                warm.close()
            raise
        for warm in being_read:
            warm.is_read = False

    def close(self) -> None:
        """Unmap and remove all of them."""
        for warm in self._kept:
            warm.close()
        self._kept.clear()

    def _take(self, path: Path, num_bytes: int) -> _Warm | None:
        """One that nobody has: the smallest that is large enough, else the largest, made larger."""
        free = sorted((warm for warm in self._kept if warm.free), key=lambda warm: warm.num_bytes)
        fitting = [warm for warm in free if warm.num_bytes >= num_bytes] or free[-1:]
        if fitting:
            warm = fitting[0]
        elif self.num_bytes + num_bytes <= self._most_bytes:
            self._number += 1
            warm = _Warm(path.parent / f"warm-{self._number}")
            self._kept.append(warm)
        else:
            return None
        if self.num_bytes - warm.num_bytes + num_bytes > self._most_bytes:
            return None
        return warm


class _Warm:
    """One file, and its mapping."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0
        self.name: Path | None = None  # that somebody wanted last
        self.is_read = False  # by somebody who needs no name for it
        self._file = path.open("x+b")
        self._mapping: mmap.mmap | None = None

    @property
    def free(self) -> bool:
        """Whether it has its own name only, and nobody is at it."""
        return not self.is_read and os.fstat(self._file.fileno()).st_nlink == 1

    @contextmanager
    def view(self, num_bytes: int) -> Iterator[memoryview]:
        """All of it, made that long. Raises OSError where there is no room."""
        handle = self._file.fileno()
        if num_bytes > self.num_bytes:  # or a page that is not there were a signal
            os.posix_fallocate(handle, self.num_bytes, num_bytes - self.num_bytes)
        os.ftruncate(handle, num_bytes)
        self.num_bytes = num_bytes
        if self._mapping is None or len(self._mapping) < num_bytes:
            # The old one goes with its last view: an error that somebody still has may have one.
            self._mapping = mmap.mmap(handle, num_bytes)
        view = memoryview(self._mapping)[:num_bytes]
        try:
            yield view
        finally:
            view.release()

    def close(self) -> None:
        self._mapping = None
        self._file.close()
        self.path.unlink(missing_ok=True)
