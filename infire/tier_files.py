"""KV blocks as files, one each, written by a thread: what a prefix cache has after a restart.

    FOLDER/LAYOUT-TOKENS/KEY    header (magic, key, length, CRC-32 of the content), then the content

A file is written under another name and then renamed, so a reader finds all of it or none. The
check is against disks and half-written files, not against enemies: who can write here is the
operator, and CRC-32 runs at memory speed where a hash would not. Anything else than a whole file of
its own key is removed, and is no block. Several engines may have one folder: each counts what it
knows of, so the bound is one of each. Knows no model.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import threading
import zlib
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from struct import Struct

from infire.kv_layout import KVLayout
from infire.prefix import KEY_BYTES
from infire.tiers import Tiers

_logger = logging.getLogger("infire")

_MAGIC = b"EFKVBLK1"
_HEADER = Struct(f"<8s{KEY_BYTES}sQI")
MOST_UNWRITTEN = 256  # blocks in memory that wait to be written; further ones are not kept


def make_tiers(
    layout: KVLayout, *, host_bytes: int, folder: Path | None, disk_bytes: int
) -> Tiers | None:
    """The tiers behind a device with KV of this layout; None where there are to be none.

    Of models with windows, or groups of several kinds, what a block is of use for depends on where
    the sequence is: these have no tiers.
    """
    if len(layout.groups) != 1 or layout.groups[0].window is not None:
        return None
    if not host_bytes and folder is None:
        return None
    files = None
    if folder is not None:
        name = f"{layout.digest[:32]}-{layout.groups[0].block_tokens}"
        if layout.tp_size > 1:  # under the same keys each rank has its own heads
            name += f"-{layout.tp_rank}-{layout.tp_size}"
        files = TierFiles(folder, name, block_bytes=layout.block_bytes, most_bytes=disk_bytes)
    return Tiers(host_bytes, layout.block_bytes, files)


class TierFiles:
    """The blocks of one layout in one folder, at most so many bytes of them, least used first."""

    def __init__(self, folder: Path, layout: str, *, block_bytes: int, most_bytes: int) -> None:
        """`layout`: names whatever must be equal for a block to be of use."""
        self._folder = folder / layout
        self._block_bytes = block_bytes
        self._most = most_bytes // (block_bytes + _HEADER.size)
        self._lock = threading.Lock()  # guards the following
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._came: list[bytes] = []
        self._went: list[bytes] = []
        self._waiting: set[bytes] = set()  # put, and not written yet
        self._broken = False
        self._unwritten: queue.Queue[tuple[bytes, bytes] | None] = queue.Queue(MOST_UNWRITTEN)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._look()
        except OSError as error:
            self._give_up(error)
        self._thread = threading.Thread(target=self._write_all, name="KV files", daemon=True)
        self._thread.start()

    @property
    def num_blocks(self) -> int:
        return len(self._known)

    def has(self, key: bytes) -> bool:
        return key in self._known

    def keeps(self, key: bytes) -> bool:
        """Whether it is here, or about to be, or never will be."""
        return self._broken or not self._most or key in self._known or key in self._waiting

    def get(self, key: bytes) -> bytes | None:
        if key not in self._known:
            return None
        try:
            content = self._read(key)
        except OSError:
            content = None
        with self._lock:
            if content is None:
                self._remove(key)
            elif key in self._known:
                self._known.move_to_end(key)
        return content

    def put(self, key: bytes, content: bytes) -> None:
        assert len(content) == self._block_bytes
        if self.keeps(key):
            return
        self._waiting.add(key)  # before the thread may have written it, and says so
        try:
            self._unwritten.put_nowait((key, content))
        except queue.Full:
            self._waiting.discard(key)

    def take_news(self) -> tuple[list[bytes], list[bytes]]:
        with self._lock:
            came, self._came = self._came, []
            went, self._went = self._went, []
        return came, went

    def wait_written(self) -> None:
        """Until all that was put is in its file, or given up."""
        self._unwritten.join()

    def close(self, within_s: float) -> None:
        """Write what waits, for at most so long."""
        try:
            self._unwritten.put(None, timeout=within_s)
        except queue.Full:
            return
        self._thread.join(within_s)

    def _look(self) -> None:
        """What an earlier process left, the least used first; half-written files are removed."""
        found = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                try:
                    key = bytes.fromhex(entry.name)
                except ValueError:
                    key = b""
                if len(key) != KEY_BYTES:
                    Path(entry.path).unlink(missing_ok=True)
                    continue
                with suppress(FileNotFoundError):  # another engine here has just removed it
                    found.append((entry.stat().st_mtime_ns, key))
        for _, key in sorted(found):
            self._known[key] = None
            self._came.append(key)
        while len(self._known) > self._most:
            self._remove(next(iter(self._known)))

    def _read(self, key: bytes) -> bytes | None:
        path = self._path(key)
        data = path.read_bytes()
        if len(data) != _HEADER.size + self._block_bytes:
            return None
        magic, whose, length, check = _HEADER.unpack_from(data)
        content = data[_HEADER.size :]
        if (magic, whose, length) != (_MAGIC, key, self._block_bytes):
            return None
        if zlib.crc32(content) != check:
            return None
        os.utime(path)
        return content

    def _write_all(self) -> None:
        while (item := self._unwritten.get()) is not None:
            try:
                if not self._broken and not self.has(item[0]):
                    self._write(*item)
            except OSError as error:
                self._give_up(error)
            finally:
                self._waiting.discard(item[0])
                self._unwritten.task_done()
        self._unwritten.task_done()

    def _write(self, key: bytes, content: bytes) -> None:
        draft = self._folder / f".{secrets.token_hex(8)}"
        header = _HEADER.pack(_MAGIC, key, len(content), zlib.crc32(content))
        try:
            with draft.open("xb") as file:
                file.write(header)
                file.write(content)
            try:
                draft.rename(self._path(key))
            except FileNotFoundError:  # another engine begins here, and has tidied it away
                return
        except OSError:
            draft.unlink(missing_ok=True)
            raise
        with self._lock:
            self._known[key] = None
            self._came.append(key)
            while len(self._known) > self._most:
                self._remove(next(iter(self._known)))

    def _remove(self, key: bytes) -> None:
        """Under the lock."""
        if key in self._known:
            del self._known[key]
            self._went.append(key)
            try:
                self._path(key).unlink(missing_ok=True)
            except OSError as error:
                self._give_up(error)

    def _path(self, key: bytes) -> Path:
        return self._folder / key.hex()

    def _give_up(self, error: OSError) -> None:
        """Nothing more is written; what is there may be read."""
        if not self._broken:
            self._broken = True
            _logger.warning("KV files: %s; no more are written", error)
