"""Where KV of the prefix cache goes that the device has no place for: host memory, then files.

A block is named by its key (`infire.prefix`), which says tenant, model and tokens, so what is found
under a key is the KV of it, wherever it was computed. What is here is a copy: nobody writes to it,
and losing it costs time only. Knows no sequence and no device.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol


class Files(Protocol):
    """The tier behind host memory. `infire.tier_files.TierFiles` is one."""

    def has(self, key: bytes) -> bool: ...
    def keeps(self, key: bytes) -> bool:
        """Whether there is no use in a `put`."""

    def get(self, key: bytes) -> bytes | None:
        """The block, or None where it is not, or not whole."""

    def put(self, key: bytes, content: bytes) -> None:
        """Write it behind whoever asks; if there is too much to write, not at all."""

    def take_news(self) -> tuple[list[bytes], list[bytes]]:
        """Keys that came since the last call, and keys that went."""

    def close(self, within_s: float) -> None: ...

    @property
    def num_blocks(self) -> int: ...


class Tiers:
    """Blocks in host memory, the one unused for longest going first, and files behind them.

    What is evicted from the device comes to both: a process that ends loses what is in memory.
    """

    def __init__(self, host_bytes: int, block_bytes: int, files: Files | None = None) -> None:
        self._most = host_bytes // block_bytes
        self._host: OrderedDict[bytes, bytes] = OrderedDict()
        self._files = files
        self._came: list[bytes] = []
        self._went: list[bytes] = []
        self.num_found = {"host": 0, "disk": 0}  # blocks, since start

    @property
    def num_host(self) -> int:
        """Blocks in memory."""
        return len(self._host)

    @property
    def num_disk(self) -> int:
        """Blocks in files."""
        return self._files.num_blocks if self._files else 0

    def has(self, key: bytes) -> bool:
        return key in self._host or bool(self._files and self._files.has(key))

    def is_kept(self, key: bytes) -> bool:
        """Whether it outlives the process, as far as that may be."""
        return self._files is None or self._files.keeps(key)

    def get(self, key: bytes) -> bytes | None:
        """The block, if it is here and whole."""
        content = self._host.get(key)
        if content is not None:
            self._host.move_to_end(key)
            self.num_found["host"] += 1
        elif self._files and (content := self._files.get(key)) is not None:
            self.num_found["disk"] += 1
            self._remember(key, content)
        return content

    def put(self, key: bytes, content: bytes) -> None:
        """Keep a block that the device no longer has, or soon may not have."""
        self._remember(key, content)
        self.write(key, content)

    def write(self, key: bytes, content: bytes) -> None:
        """Have it outlive the process."""
        if self._files:
            self._files.put(key, content)

    def close(self, within_s: float) -> None:
        """Write what waits to be written, for at most so long."""
        if self._files:
            self._files.close(within_s)

    def take_news(self) -> tuple[list[bytes], list[bytes]]:
        """Keys that came into any tier since the last call, and keys that none has any longer."""
        came, self._came = self._came, []
        went, self._went = self._went, []
        if self._files:
            more = self._files.take_news()
            came += more[0]
            went += more[1]
        touched = dict.fromkeys([*came, *went])
        here = [key for key in touched if self.has(key)]
        return here, [key for key in touched if not self.has(key)]

    def _remember(self, key: bytes, content: bytes) -> None:
        if not self._most:
            return
        self._host[key] = content
        self._host.move_to_end(key)
        self._came.append(key)
        while len(self._host) > self._most:
            self._went.append(self._host.popitem(last=False)[0])
