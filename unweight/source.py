"""The file that a shard was packed from, piece by piece, by threads, in order. Writes no file."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from unweight.bundle import BadChecksum
from unweight.reader import Shard

AHEAD = 4  # chunks a thread may be ahead of whoever takes them
_PIECE = 1 << 24  # bytes of a tensor that is stored as it was
_T = TypeVar("_T")
_R = TypeVar("_R")


def source_bytes(shard: Shard, threads: int) -> Iterator[memoryview]:
    """Every byte of the file. A piece is overwritten after the next ones have been taken.

    Raises `BadChecksum` for a chunk that is not what was packed, and, after the last piece, where
    the whole is not: what was written until then is for the waste.
    """
    xxh3 = xxhash.xxh3_128()
    for piece in _pieces(shard, threads):
        xxh3.update(piece)
        yield piece
    if xxh3.hexdigest() != shard.contents.source_xxh3:
        raise BadChecksum(f"{shard.path}: what it unpacks to is not what was packed")


def ahead(
    pool: ThreadPoolExecutor, work: Callable[[_T], _R], items: Iterable[_T], most: int
) -> Iterator[_R]:
    """As `pool.map`, with at most so many results waiting."""
    waiting: deque[Future[_R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _pieces(shard: Shard, threads: int) -> Iterator[memoryview]:
    yield memoryview(shard.contents.source_head)
    most = threads * AHEAD
    sizes = [math.prod((entry.chunk_rows or 0, entry.rows[1])) for entry in shard.entries]
    # As many as can be waiting, and the one that is read: new memory for each costs page faults.
    # No more than any tensor has chunks: a vector is one, of any size.
    chunks = max((entry.num_chunks for entry in shard.entries if entry.compressed), default=0)
    buffers = np.empty((min(most + 1, chunks), max(sizes, default=0)), np.uint16)
    with ThreadPoolExecutor(threads) as pool:
        for name, size in zip(shard.names, sizes, strict=True):
            entry = shard.entry(name)
            if not entry.compressed:
                raw = shard.raw(name)
                for start in range(0, raw.size, _PIECE):
                    yield raw[start : start + _PIECE].data
                continue
            weights = math.prod(entry.shape)

            def decode(
                chunk: int, name: str = name, size: int = size, weights: int = weights
            ) -> NDArray[np.uint16]:
                out = buffers[chunk % len(buffers), : min(size, weights - chunk * size)]
                return shard.chunk(name, chunk, out)

            for words in ahead(pool, decode, range(entry.num_chunks), most):
                yield words.view(np.uint8).data
