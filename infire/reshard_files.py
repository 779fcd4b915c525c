"""Carry out a plan of `infire.reshard`, on buffers or on files. Knows no layout, and no torch."""

from __future__ import annotations

import mmap
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from infire.reshard import Strip


def reshard(
    strips: Sequence[Strip], sources: Mapping[int, bytes | memoryview], into: memoryview
) -> None:
    """Copy what the strips say out of `sources`, by rank. ValueError where one is too short."""
    for strip in strips:
        end = strip.source_start + (strip.num_rows - 1) * strip.source_stride + strip.width
        if end > (size := len(sources[strip.source])):
            raise ValueError(f"KV of rank {strip.source} has {size} bytes, not {end}")
    for strip in strips:
        rows = _rows(into, strip.target_start, strip.target_stride, strip)
        rows[:] = _rows(sources[strip.source], strip.source_start, strip.source_stride, strip)


def reshard_files(
    strips: Sequence[Strip], sources: Mapping[int, Path], into: Path, num_bytes: int
) -> None:
    """The same from file to file: `into` is new, of `num_bytes`. What fails leaves none.

    Raises OSError, and ValueError where a source is too short.
    """
    with into.open("x+b") as file:
        try:
            if not num_bytes:  # of tokens that nobody looks at any more
                return
            _make_room(file.fileno(), num_bytes)
            with ExitStack() as stack:
                target = stack.enter_context(_mapped(file.fileno(), num_bytes, mmap.PROT_WRITE))
                parts = {rank: stack.enter_context(_read(path)) for rank, path in sources.items()}
                reshard(strips, parts, target)
        except BaseException:
            into.unlink()
            raise


def _rows(
    content: bytes | memoryview, start: int, stride: int, strip: Strip
) -> NDArray[np.generic]:
    """A strip in one of its two places, in the largest words that it is made of."""
    strides = strip.source_stride | strip.target_stride
    size = next(size for size in (8, 4, 2, 1) if not (strides | strip.width) % size)
    return np.ndarray(
        (strip.num_rows, strip.width // size),
        np.dtype(f"u{size}"),
        buffer=content,
        offset=start,
        strides=(stride, size),
    )


def _make_room(handle: int, num_bytes: int) -> None:
    if hasattr(os, "posix_fallocate"):  # a page without room is a signal: not so on macOS
        os.posix_fallocate(handle, 0, num_bytes)
    else:
        os.ftruncate(handle, num_bytes)


@contextmanager
def _read(path: Path) -> Generator[memoryview, None, None]:
    with path.open("rb") as file, _mapped(file.fileno(), 0, mmap.PROT_READ) as content:
        yield content


@contextmanager
def _mapped(handle: int, num_bytes: int, access: int) -> Generator[memoryview, None, None]:
    mapping = mmap.mmap(handle, num_bytes, prot=access | mmap.PROT_READ)
    content = memoryview(mapping)
    try:
        yield content
    finally:
        content.release()
        mapping.close()
