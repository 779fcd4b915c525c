"""What an engine has in its prefix cache, told to whoever places requests: first all, then changes.

Knows keys only (see `infire.prefix`), and no link.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager

from origin_gpu.handover import CacheNews
from routing.link_flow import Wake

MOST_AT_ONCE = 20_000  # keys of one event: 360 kB


class CacheReader:
    """One listener, and what it has not heard yet."""

    def __init__(self, keys: Iterable[bytes]) -> None:
        self.wake = Wake()  # there is something to take
        self._number = 0
        self._added: dict[bytes, None] = dict.fromkeys(keys)
        self._removed: dict[bytes, None] = {}
        self.wake.set()

    def begin_again(self) -> None:
        """Nothing that was said holds any longer."""
        self._number = 0
        self._added, self._removed = {}, {}
        self.wake.set()

    def change(self, added: Iterable[bytes], removed: Iterable[bytes]) -> None:
        """What came and went between two takes is not told."""
        for key in added:
            if key in self._removed:
                del self._removed[key]
            else:
                self._added[key] = None
        for key in removed:
            if key in self._added:
                del self._added[key]
            else:
                self._removed[key] = None
        self.wake.set()

    def take(self) -> CacheNews | None:
        """The next event; None when all has been told."""
        if self._number and not self._added and not self._removed:
            return None
        added = _take(self._added)
        removed = _take(self._removed)
        news = CacheNews(self._number, added, removed)
        self._number += 1
        return news


class CacheMirror:
    """The keys that the engine has now."""

    def __init__(self) -> None:
        self._keys: dict[bytes, None] = {}
        self._readers: set[CacheReader] = set()

    def __len__(self) -> int:
        return len(self._keys)

    def change(self, added: Iterable[bytes], removed: Iterable[bytes]) -> None:
        """Keys that came, and then keys that went, each of which was as said before."""
        new = [key for key in dict.fromkeys(added) if key not in self._keys]
        self._keys.update(dict.fromkeys(new))
        gone = [key for key in dict.fromkeys(removed) if key in self._keys]
        for key in gone:
            del self._keys[key]
        for reader in self._readers:
            reader.change(new, gone)

    def clear(self) -> None:
        """The engine is gone, and its cache with it."""
        self._keys.clear()
        for reader in self._readers:
            reader.begin_again()

    @contextmanager
    def reader(self) -> Generator[CacheReader, None, None]:
        """Who hears of everything, for the length of the block."""
        reader = CacheReader(self._keys)
        self._readers.add(reader)
        try:
            yield reader
        finally:
            self._readers.discard(reader)


def _take(keys: dict[bytes, None]) -> tuple[bytes, ...]:
    """The first so many, removed."""
    taken = tuple(key for key, _ in zip(keys, range(MOST_AT_ONCE), strict=False))
    for key in taken:
        del keys[key]
    return taken
