"""Parts of a bundle that are not what was packed: a named error, and bounded memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from tests.unweight.bundles import MATRIX, SMALL, Change, bf16, by_hand, spoil, taken_apart
from tests.unweight.hostile import at_most, refused
from unweight.bundle import BadChecksum
from unweight.coder import encode
from unweight.reader import Shard
from unweight.safetensors_header import WrongOffsets
from unweight.samples import trained_like


def in_part(part: str, at: int, bits: int) -> Change:
    def change(head: dict[str, Any], data: bytearray) -> None:
        begin, end = head[f"{MATRIX}.{part}"]["data_offsets"]
        data[begin + at % (end - begin)] ^= bits

    return change


@pytest.mark.parametrize("bits", [1, 0x80])
@pytest.mark.parametrize(
    ("part", "at"),
    [
        ("sm", 0), ("sm", 150_000), ("sm", -1), ("exp", 0), ("exp", 40), ("exp", 60_000),
        ("exp", -1), ("xxh3", 0), ("xxh3", 9), ("xxh3", -1),
    ],
)  # fmt: skip
def test_a_bit_that_flipped(packed: Path, part: str, at: int, bits: int) -> None:
    spoil(packed, in_part(part, at, bits))
    refused(packed, BadChecksum, MATRIX)


def test_a_bit_that_flipped_in_what_is_stored_as_it_was(packed: Path) -> None:
    def change(head: dict[str, Any], data: bytearray) -> None:
        data[head[SMALL]["data_offsets"][0]] ^= 1

    spoil(packed, change)
    refused(packed, BadChecksum, "not what was packed")


@pytest.mark.parametrize(
    ("which", "value"), [(0, 1), (1, 1 << 60), (1, 0), (2, 5), (3, 0), (3, 1 << 63), (1, -1)]
)
def test_frames_that_lie_elsewhere(packed: Path, which: int, value: int) -> None:
    def change(head: dict[str, Any], data: bytearray) -> None:
        begin, end = head[f"{MATRIX}.exp_off"]["data_offsets"]
        offsets = np.frombuffer(bytes(data[begin:end]), "<u8").copy()
        offsets[which] = np.uint64(value % (1 << 64))
        data[begin:end] = offsets.tobytes()

    spoil(packed, change)
    refused(packed, WrongOffsets, MATRIX)


def test_any_bit_of_where_frames_lie(packed: Path) -> None:
    """Those that still rise are of frames cut short, and with the start of another."""
    whole = packed.read_bytes()
    head, data = taken_apart(whole)
    begin, end = head[f"{MATRIX}.exp_off"]["data_offsets"]
    start = len(whole) - len(data)
    kinds = []
    for bit in range(8 * (end - begin)):
        changed = bytearray(whole)
        changed[start + begin + bit // 8] ^= 1 << bit % 8
        packed.write_bytes(changed)
        with pytest.raises((WrongOffsets, BadChecksum), match=MATRIX) as caught:
            Shard(packed).bits(MATRIX)
        kinds.append(caught.type)
    assert 0 < kinds.count(BadChecksum) < 40 < kinds.count(WrongOffsets)


@pytest.mark.parametrize("size", [0, 1, 128 * 1024 - 1, 1 << 30])
def test_a_frame_that_would_fill_memory(packed: Path, size: int) -> None:
    """It says how much it holds, and is not decoded if that is not the chunk."""
    frame = encode(np.zeros(min(size, 1 << 24), np.uint8))
    if size == 1 << 30:  # the size field says so, whatever follows
        frame = b"\x28\xb5\x2f\xfd\xa4" + size.to_bytes(4, "little") + frame[9:]

    def change(head: dict[str, Any], data: bytearray) -> None:
        begin, _ = head[f"{MATRIX}.exp"]["data_offsets"]
        data[begin : begin + len(frame)] = frame

    spoil(packed, change)
    with at_most(8_000_000):
        refused(packed, BadChecksum, MATRIX)


def coded_as(frame: bytes, tmp_path: Path) -> Path:
    """A bundle whose matrix has that frame."""
    path = tmp_path / "bundle.safetensors"
    tensors = {MATRIX: bf16(trained_like(8, 1024, seed=1))}
    path.write_bytes(by_hand(tensors, {MATRIX: 8}, lambda _: frame))
    return path


@pytest.mark.parametrize("size", [70_001, 1 << 28])
def test_a_frame_that_holds_more_than_it_says(tmp_path: Path, size: int) -> None:
    """It says 8,192 in the four bytes that are for it."""
    inflating = zstandard.ZstdCompressor().compressobj(size=size)
    pieces = [min(1 << 20, size - start) for start in range(0, size, 1 << 20)]
    frame = b"".join(inflating.compress(bytes(piece)) for piece in pieces) + inflating.flush()
    at = frame.index(size.to_bytes(4, "little"))
    assert len(frame) < 20_000
    frame = frame[:at] + (8192).to_bytes(4, "little") + frame[at + 4 :]
    path = coded_as(frame, tmp_path)
    with at_most(2_000_000):
        refused(path, BadChecksum, MATRIX, "chunk 0")


@pytest.mark.parametrize(
    "frame",
    [
        b"x", bytes(100), (0x184D2A50).to_bytes(4, "little") + (8192).to_bytes(4, "little"),
        (0x184D2A50).to_bytes(4, "little") + (8192).to_bytes(4, "little") + bytes(8192),
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(8192)),
        zstandard.compress(bytes(8192)), zstandard.compress(bytes(8191)), zstandard.compress(b""),
    ],
    ids=["x", "zeros", "skipped, cut", "skipped", "no size", "others", "one less", "none"],
)  # fmt: skip
def test_what_is_no_frame(tmp_path: Path, frame: bytes) -> None:
    refused(coded_as(frame, tmp_path), BadChecksum, MATRIX, "chunk 0")
