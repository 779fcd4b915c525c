"""Tensors out of one shard of a bundle, mapped, each chunk verified as it is decoded.

All that the file says of itself is checked when it is opened; a `Shard` that exists is whole but
for its digests. May be shared by threads. Knows no model.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unweight.bundle import BadChecksum, Contents, Entry, read_contents
from unweight.bundle import is_bundle as header_is_bundle
from unweight.coder import BadFrame, decode, digest, join
from unweight.safetensors_header import Header, Truncated, WrongOffsets, read_header


class NoSuchTensor(KeyError):
    """The source had no tensor of that name."""


def mapped(path: Path) -> NDArray[np.uint8]:
    """The bytes of a file. Raises OSError, `Truncated` for an empty one."""
    with path.open("rb") as file:
        if not file.seek(0, 2):
            raise Truncated(f"{path}: 0 bytes are no safetensors file")
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def is_bundle(path: Path) -> bool:
    """Whether a safetensors file is a shard of a bundle. Raises `BadFile`, OSError."""
    return header_is_bundle(read_header(mapped(path), str(path)))


class Shard:
    """One file of a bundle, and what it was packed from. Raises `BadFile`, OSError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = mapped(path)
        self._header: Header = read_header(content, str(path))
        self._data = content[self._header.num_bytes :]
        self._contents: Contents = read_contents(self._header, str(path))
        self._offsets = {
            name: self._checked_offsets(name)
            for name, entry in self._contents.entries.items()
            if entry.compressed
        }

    @property
    def names(self) -> list[str]:
        """Of the source's tensors, in the order of its bytes."""
        return list(self._contents.entries)

    @property
    def contents(self) -> Contents:
        """What the file says of itself."""
        return self._contents

    @property
    def source_sha256(self) -> str:
        """Of the file that was packed, in hexadecimal."""
        return self._contents.source_sha256

    @property
    def entries(self) -> list[Entry]:
        """Of all names."""
        return list(self._contents.entries.values())

    def entry(self, name: str) -> Entry:
        """Raises `NoSuchTensor`."""
        try:
            return self._contents.entries[name]
        except KeyError:
            raise NoSuchTensor(f"{self.path} has no {name}") from None

    def stored_bytes(self, name: str) -> int:
        """Of a tensor in this file, all its parts."""
        parts = [f"{name}.{part}" for part in ("sm", "exp", "exp_off", "xxh3")]
        names = parts if self.entry(name).compressed else [name]
        return sum(self._part(part).nbytes for part in names)

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor that is stored as it was; a view of the file."""
        assert not self.entry(name).compressed
        return self._part(name)

    def planes(self, name: str, chunk: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Of one chunk of a compressed tensor, flat: sign << 7 | mantissa, a view of the file, and
        the frame of its exponents."""
        rows, width = self.entry(name).rows
        first, last = self._rows_of(name, chunk)
        assert first < last <= rows
        offsets = self._offsets[name]
        sm = self._part(f"{name}.sm")[first * width : last * width]
        return sm, self._part(f"{name}.exp")[int(offsets[chunk]) : int(offsets[chunk + 1])]

    def chunk(
        self, name: str, chunk: int, out: NDArray[np.uint16] | None = None
    ) -> NDArray[np.uint16]:
        """The bits of BF16 of one chunk, flat. Raises `BadChecksum` if they are not those that were
        packed."""
        sm, frame = self.planes(name, chunk)
        words = np.empty(sm.size, np.uint16) if out is None else out
        try:
            join(sm, decode(frame, sm.size), words)
        except BadFrame as error:
            raise BadChecksum(f"{self.path}: {name}, chunk {chunk}: {error}") from error
        expected = int(self._part(f"{name}.xxh3").view("<u8")[chunk])
        if digest(words) != expected:
            raise BadChecksum(f"{self.path}: {name}, chunk {chunk} is not what was packed")
        return words

    def chunks(self, name: str) -> Iterator[tuple[int, NDArray[np.uint16]]]:
        """The first row, and the bits (rows, K), of one chunk after the other."""
        width = self.entry(name).rows[1]
        for chunk in range(self.entry(name).num_chunks):
            yield self._rows_of(name, chunk)[0], self.chunk(name, chunk).reshape(-1, width)

    def bits(
        self,
        name: str,
        rows: slice | None = None,
        *,
        threads: int = 1,
        out: NDArray[np.uint16] | None = None,
    ) -> NDArray[np.uint16]:
        """The bits of BF16 of some rows, or of all, (rows, K): of a compressed tensor the chunks
        that cover them are decoded. Raises `BadChecksum`."""
        entry = self.entry(name)
        first, last, step = (rows or slice(None)).indices(entry.rows[0])
        assert step == 1
        width = entry.rows[1]
        made = np.empty((max(0, last - first), width), np.uint16) if out is None else out
        assert made.shape == (max(0, last - first), width)
        assert made.flags.c_contiguous
        if entry.chunk_rows is None:
            assert entry.dtype == "BF16"
            made[:] = self.raw(name).view("<u2").reshape(entry.rows)[first:last]
            return made
        covering = range(first // entry.chunk_rows, -(-last // entry.chunk_rows))

        def fill(chunk: int) -> None:
            begin, end = self._rows_of(name, chunk)
            if first <= begin and end <= last:
                self.chunk(name, chunk, made[begin - first : end - first].reshape(-1))
            else:
                words = self.chunk(name, chunk).reshape(-1, width)
                low, high = max(begin, first), min(end, last)
                made[low - first : high - first] = words[low - begin : high - begin]

        if threads == 1 or len(covering) < 2:
            for chunk in covering:
                fill(chunk)
        else:
            with ThreadPoolExecutor(threads) as pool:
                for _ in pool.map(fill, covering):
                    pass
        return made

    def _rows_of(self, name: str, chunk: int) -> tuple[int, int]:
        entry = self._contents.entries[name]
        assert entry.chunk_rows is not None
        first = chunk * entry.chunk_rows
        return first, min(first + entry.chunk_rows, entry.rows[0])

    def _part(self, key: str) -> NDArray[np.uint8]:
        place = self._header.places[key]
        return self._data[place.begin : place.end]

    def _checked_offsets(self, name: str) -> NDArray[np.uint64]:
        offsets = np.frombuffer(self._part(f"{name}.exp_off").tobytes(), "<u8")  # aligned
        size = self._part(f"{name}.exp").nbytes
        rising = bool((offsets[1:] > offsets[:-1]).all())
        if offsets[0] != 0 or offsets[-1] != size or not rising:
            raise WrongOffsets(
                f"{self.path}: the frames of {name} lie from {offsets[0]} to {offsets[-1]} of "
                f"{size} bytes" + ("" if rising else ", not in order")
            )
        return offsets
