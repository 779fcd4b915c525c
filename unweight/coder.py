"""A chunk of BF16 weights as a plane of bytes and an entropy-coded frame, and back.

Signs and mantissas are noise and stay bytes. Exponents go through zstd with the search for matches
as good as switched off: what is left of it is a Huffman coder in four streams, within 0.02 bits of
the ideal, in a format with sizes and a checksum that every platform reads. Knows no file.
"""

from __future__ import annotations

import threading

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

_PARAMETERS = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    min_match=7,
    hash_log=6,
    window_log=17,
    chain_log=6,
    search_log=1,
    target_length=0,
    write_checksum=True,
    write_content_size=True,
)
_BLOCK = 1 << 15  # weights that are split or joined at a time: what is between stays in L2
_SMALLEST = 1 << 12  # weights: below, parts and offsets are most of it
_WORTH = 0.9  # of its bytes: what is not smaller than that stays as it was
_SAMPLES = 2  # pieces that are coded to see
_SAMPLE = 1 << 14  # weights of a piece
_local = threading.local()


class BadFrame(ValueError):
    """A frame that is no chunk's exponents."""


def split(words: NDArray[np.uint16]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Of weights (n,): sign << 7 | mantissa (n,), and exponents (n,)."""
    sm, exponents = np.empty(words.size, np.uint8), np.empty(words.size, np.uint8)
    between = np.empty((2, _BLOCK), np.uint16)
    for start in range(0, words.size, _BLOCK):
        some = words[start : start + _BLOCK]
        one, other = between[0, : some.size], between[1, : some.size]
        np.right_shift(some, 7, out=one)
        exponents[start : start + _BLOCK] = one  # the sign falls off the end
        np.right_shift(some, 8, out=one)
        np.bitwise_xor(one, some, out=other)
        np.bitwise_and(other, 0x80, out=other)  # where the sign differs from the bit below it
        np.bitwise_xor(other, some, out=other)
        sm[start : start + _BLOCK] = other
    return sm, exponents


def join(
    sm: NDArray[np.uint8], exponents: NDArray[np.uint8], out: NDArray[np.uint16]
) -> NDArray[np.uint16]:
    """The weights (n,) that `split` was given."""
    between = np.empty(_BLOCK, np.uint16)
    for start in range(0, out.size, _BLOCK):
        some = out[start : start + _BLOCK]
        high = between[: some.size]
        np.left_shift(exponents[start : start + _BLOCK], 7, out=some, dtype=np.uint16)
        np.multiply(sm[start : start + _BLOCK], 0x101, out=high, dtype=np.uint16)  # byte, byte
        np.bitwise_and(high, 0x807F, out=high)
        np.bitwise_or(some, high, out=some)
    return out


def encode(exponents: NDArray[np.uint8]) -> bytes:
    """A frame."""
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
    frame: bytes = _local.compressor.compress(exponents.data)
    return frame


def decode(frame: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """So many exponents; raises `BadFrame`. Never makes more of a frame than that."""
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    try:
        stated = zstandard.get_frame_parameters(frame.data).content_size
        if stated != size:
            raise BadFrame(f"a frame of {stated} exponents for {size}")
        content: bytes = _local.decompressor.decompress(frame.data, max_output_size=size)
    except zstandard.ZstdError as error:
        raise BadFrame(str(error)) from error
    return np.frombuffer(content, np.uint8)


def is_worth(words: NDArray[np.uint16]) -> bool:
    """Whether weights (n,) are to be coded, by pieces of them."""
    if words.size < _SMALLEST:
        return False
    step = min(words.size, _SAMPLE)
    starts = np.linspace(0, words.size - step, _SAMPLES).astype(int)
    coded = [len(encode(split(words[s : s + step])[1])) for s in set(starts.tolist())]
    return sum(coded) / len(coded) / step + 1 <= 2 * _WORTH


def digest(words: NDArray[np.uint16]) -> int:
    """XXH3, 64 bits, of the bytes of BF16."""
    return xxhash.xxh3_64_intdigest(words.data)
