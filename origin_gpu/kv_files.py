"""Files for KV on its way from engine to engine: private, short-lived, in memory where possible.

A folder belongs to one process, which keeps it locked while it lives; the folders of the dead are
removed by whoever starts next. Knows nothing of what the files hold.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "edgefire-kv-"
_NAME = re.compile(rf"{_PREFIX}\d+-[0-9a-f]{{8}}")
SHARED_MEMORY = Path("/dev/shm")  # Linux only; in a container often as small as 64 MB


def roots() -> list[Path]:
    """Where files may go, the best first."""
    places = [SHARED_MEMORY, Path(tempfile.gettempdir())]
    return [place for place in places if os.access(place, os.W_OK | os.X_OK)]


def is_folder_name(name: str) -> bool:
    """Whether a process's folder is called so."""
    return _NAME.fullmatch(name) is not None


class KVFiles:
    """A private folder in each root, from `open_files` to its end."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._folders = tuple(folders)
        self._numbers = itertools.count(1)

    @contextmanager
    def new(self, num_bytes: int) -> Iterator[Path]:
        """A path, without a file, where there is room for so many bytes. Removed on leaving."""
        path = self._folder(num_bytes) / f"{next(self._numbers)}.kv"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _folder(self, num_bytes: int) -> Path:
        """The first with room; the last if none has, so that writing there says what is wrong."""
        for folder in self._folders:
            if shutil.disk_usage(folder).free > num_bytes:
                return folder
        return self._folders[-1]


@contextmanager
def open_files(places: Iterable[Path]) -> Generator[KVFiles, None, None]:
    """Private folders in `places`, cleared of what dead processes left; removed on leaving."""
    folders: list[tuple[Path, int]] = []
    try:
        for place in places:
            sweep(place)
            folders.append(_make(place))
        yield KVFiles([folder for folder, _ in folders])
    finally:
        for folder, lock in folders:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def sweep(place: Path) -> None:
    """Remove the folders in `place` whose processes have died."""
    for folder in place.glob(f"{_PREFIX}*"):
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # another user's, or removed by now
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:  # its process lives
            pass
        finally:
            os.close(handle)


def _make(place: Path) -> tuple[Path, int]:
    """A new folder (mode 0700) and the handle that locks it.

    It gets its name once it is locked: under a name that `sweep` looks for it is never unlocked.
    """
    name = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    draft, folder = place / f".{name}", place / name
    draft.mkdir(mode=0o700)
    handle = os.open(draft, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    draft.rename(folder)
    return folder, handle
