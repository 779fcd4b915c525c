"""How many bits tensors take: what their exponents are worth, in a bundle, and resident.

Counts by packing, with the packers that are used in earnest. Prints nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from unweight import coder
from unweight.bundle import chunk_rows, matrix
from unweight.reader import Shard, is_bundle, mapped
from unweight.rounding import to_bf16
from unweight.safetensors_header import BITS, Place, read_header
from unweight.samples import synthetic
from unweight.strips import Incompressible, pack_u12
from unweight.tiles import pack_tiles

Counts = NDArray[np.int64]  # (256,), weights of each exponent
_PIECE = 1 << 22  # weights counted at a time


class Tensor(Struct, frozen=True, kw_only=True):
    """One tensor. Bits are a weight, everything that belongs to it included."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    entropy: float | None = None  # bits, of its exponents
    bundle_bits: float
    tile_bits: float | None = None  # resident on a GPU; None: as it is
    strip_bits: float | None = None  # resident for kernels on CPU
    exceptions: float | None = None  # share of weights, in tiles
    why_raw: str | None = None  # of what is not resident in 12 bits

    @property
    def num_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def linear(self) -> bool:
        """Whether it is a matrix that is multiplied by, as far as its name tells."""
        return self.dtype == "BF16" and len(self.shape) == 2 and "embed" not in self.name


class Total(Struct, frozen=True, kw_only=True):
    """Of several tensors: weights, and bits of each on average."""

    num_weights: int
    entropy: float | None
    source_bits: float
    bundle_bits: float
    tile_bits: float
    strip_bits: float


class Stat(Struct, frozen=True, kw_only=True):
    """Of a file, a folder or a synthetic layer."""

    source: str
    rounded: bool  # FP32 was rounded to BF16 before anything was measured
    tensors: list[Tensor]
    linear: Total | None  # matrices that are multiplied by
    everything: Total
    exponents: list[int]  # weights of each, 0 to 255


class Source(Struct, frozen=True):
    """A tensor to be measured."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bits: Callable[[], NDArray[np.uint16]] | None  # of BF16, flat; None for other types
    stored_bytes: int | None = None  # where it lies in a bundle


def of_files(paths: Iterable[Path], *, as_bf16: bool) -> Iterator[Source]:
    """Of safetensors files or shards. Raises `BadFile`, OSError."""
    for path in paths:
        yield from _of_shard(path) if is_bundle(path) else _of_plain(path, as_bf16=as_bf16)


def of_layer(layer: str) -> Iterator[Source]:
    """Of a layer of `samples.LAYERS`."""
    for name, bits in synthetic(layer):
        yield Source(name, "BF16", bits.shape, bits.reshape(-1).view)


def measure(source: str, tensors: Iterable[Source], *, threads: int, rounded: bool = False) -> Stat:
    """One tensor after the other; no more than one is in memory. Raises `BadFile`."""
    found = []
    of_linear, of_all = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for tensor in tensors:
        counts = np.zeros(256, np.int64)
        found.append(_measure(tensor, counts, threads))
        of_all += counts
        if found[-1].linear:
            of_linear += counts
    linear = [tensor for tensor in found if tensor.linear]
    return Stat(
        source=source,
        rounded=rounded,
        tensors=found,
        linear=_total(linear, of_linear) if linear else None,
        everything=_total(found, of_all),
        exponents=of_all.tolist(),
    )


def entropy(counts: Counts) -> float:
    """Bits of a symbol, of how often each occurs."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def _of_shard(path: Path) -> Iterator[Source]:
    shard = Shard(path)
    for name in shard.names:
        entry = shard.entry(name)
        read = None
        if entry.dtype == "BF16":

            def read(name: str = name) -> NDArray[np.uint16]:
                return shard.bits(name).reshape(-1)

        yield Source(name, entry.dtype, entry.shape, read, shard.stored_bytes(name))


def _of_plain(path: Path, *, as_bf16: bool) -> Iterator[Source]:
    content = mapped(path)
    header = read_header(content, str(path))
    data = content[header.num_bytes :]
    for name, place in header.places.items():
        rounds = as_bf16 and place.dtype == "F32"
        reads = place.dtype == "BF16" or rounds
        dtype = "BF16" if rounds else place.dtype
        yield Source(name, dtype, place.shape, _reader(data, place) if reads else None)


def _reader(data: NDArray[np.uint8], place: Place) -> Callable[[], NDArray[np.uint16]]:
    own = data[place.begin : place.end]
    if place.dtype == "F32":
        return lambda: to_bf16(own.view("<f4"))
    return lambda: own.view("<u2")


def _measure(source: Source, counts: Counts, threads: int) -> Tensor:
    """Fills counts (256,)."""
    num_weights = math.prod(source.shape)
    bits_of_type = BITS[source.dtype]
    if source.bits is None or not num_weights:
        return Tensor(
            name=source.name,
            dtype=source.dtype,
            shape=source.shape,
            bundle_bits=bits_of_type,
            why_raw="empty" if source.bits else f"{source.dtype}, not BF16",
        )
    words = source.bits()
    for start in range(0, words.size, _PIECE):
        counts += np.bincount((words[start : start + _PIECE] >> 7).astype(np.uint8), minlength=256)
    stored = source.stored_bytes
    if stored is None:
        stored = _bundle_bytes(words, source.shape, threads)
    tile_bits, strip_bits, exceptions, why_raw = _resident(words, source.shape, threads)
    return Tensor(
        name=source.name,
        dtype=source.dtype,
        shape=source.shape,
        entropy=entropy(counts),
        bundle_bits=8 * stored / num_weights,
        tile_bits=tile_bits,
        strip_bits=strip_bits,
        exceptions=exceptions,
        why_raw=why_raw,
    )


def _bundle_bytes(words: NDArray[np.uint16], shape: tuple[int, ...], threads: int) -> int:
    """As the writer would have it."""
    if not coder.is_worth(words):
        return words.nbytes
    step = chunk_rows(shape) * matrix(shape)[1]

    def coded(start: int) -> int:
        sm, exponents = coder.split(words[start : start + step])
        return sm.nbytes + len(coder.encode(exponents)) + 16  # an offset and a digest

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(coded, range(0, words.size, step))) + 8  # and the last offset


def _resident(
    words: NDArray[np.uint16], shape: tuple[int, ...], threads: int
) -> tuple[float | None, float | None, float | None, str | None]:
    """Bits a weight in tiles and in strips, the share of exceptions, or why there are none."""
    if len(shape) != 2:
        return None, None, None, "no matrix"
    weights = words.reshape(shape)
    try:
        tiles = pack_tiles(weights, threads=threads)
        tile_bits, exceptions = 8 * tiles.num_bytes / words.size, tiles.exceptions.size / words.size
        del tiles
        strips = pack_u12(weights, threads=threads)
    except Incompressible as error:
        return None, None, None, str(error)
    arrays = (strips.data, strips.base, strips.ptr, strips.exceptions)
    return tile_bits, 8 * sum(array.nbytes for array in arrays) / words.size, exceptions, None


def _total(tensors: list[Tensor], counts: Counts) -> Total:
    num_weights = sum(tensor.num_weights for tensor in tensors)

    def mean(bits: Callable[[Tensor], float]) -> float:
        return sum(bits(t) * t.num_weights for t in tensors) / max(1, num_weights)

    return Total(
        num_weights=num_weights,
        entropy=entropy(counts) if counts.any() else None,
        source_bits=mean(lambda t: BITS[t.dtype]),
        bundle_bits=mean(lambda t: t.bundle_bits),
        tile_bits=mean(lambda t: BITS[t.dtype] if t.tile_bits is None else t.tile_bits),
        strip_bits=mean(lambda t: BITS[t.dtype] if t.strip_bits is None else t.strip_bits),
    )
