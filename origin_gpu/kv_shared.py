"""KV between workers of one host: the collector links the giver's file into a folder of its own.

Nothing is copied: both have the same pages until the giver drops its name. Only files of one user
are linked, out of folders that `kv_files` makes: what a message says is never followed elsewhere.
"""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from origin_gpu.kv_files import is_folder_name, roots
from origin_gpu.kv_ways import Refused

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # Linux; the same in all containers of a host
_FILE = re.compile(r"\d+\.kv")


class SharedFiles:
    """The way between processes that see the same folders. `places` are those with KV folders."""

    kind = "shared"
    lasting = True  # a link keeps the file

    def __init__(self, places: Sequence[Path] | None = None) -> None:
        self._places = roots() if places is None else list(places)
        self._host = _host()

    def about(self) -> bytes:
        return self._host

    def fits(self, about: bytes) -> bool:
        return about == self._host

    @asynccontextmanager
    async def lend(self, path: Path, num_bytes: int, about: bytes) -> AsyncGenerator[bytes, None]:
        """Its folder and name: the file stays where it is."""
        if about != self._host:
            raise Refused("the collector is on another host")
        yield f"{path.parent.name}/{path.name}".encode()

    async def take(self, said: bytes, num_bytes: int, into: Path) -> None:
        folder, _, name = said.decode("utf-8", "replace").partition("/")
        if not is_folder_name(folder) or not _FILE.fullmatch(name):
            raise Refused(f"{said[:100]!r} is no file of KV")
        for place in self._places:
            with suppress(FileNotFoundError):
                _link(place / folder, name, into, num_bytes)
                return
        raise Refused(f"{folder}/{name} is not among this worker's folders")


def _link(folder: Path, name: str, into: Path, num_bytes: int) -> None:
    """Raises `Refused`, FileNotFoundError."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise
    except OSError as exc:  # another user's
        raise Refused(f"{folder}: {exc.strerror}") from exc
    try:
        os.link(name, into, src_dir_fd=handle, follow_symlinks=False)
    except FileNotFoundError:
        if not into.parent.is_dir():
            raise OSError(f"No such file or directory: {into}") from None
        raise
    except OSError as exc:  # on another file system, or by another user
        raise Refused(f"{folder / name} cannot be linked: {exc.strerror}") from exc
    finally:
        os.close(handle)
    found = into.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        into.unlink()
        raise Refused(f"{folder / name} is no file of this user")
    if found.st_size != num_bytes:
        into.unlink()
        raise Refused(f"{folder / name} has {found.st_size} bytes, not {num_bytes}")


def _host() -> bytes:
    try:
        return BOOT_ID.read_bytes().strip()
    except OSError:
        return socket.gethostname().encode()
