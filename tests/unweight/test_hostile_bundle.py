"""Files that are not what they say: a named error that says where, and nothing half made."""

from __future__ import annotations

import base64
import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unweight.bundles import MATRIX, RAW, SMALL, bundle, spoil, taken_apart, with_header
from unweight.bundle import BadChecksum, MissingPart, UnknownFormat
from unweight.coder import encode
from unweight.reader import Shard
from unweight.safetensors_header import (
    BadFile,
    BadHeader,
    HeaderTooLong,
    Overlapping,
    Truncated,
    WrongOffsets,
    WrongShape,
)
from unweight.writer import check_folder, pack_folder, unpack_folder

Change = Callable[[dict[str, Any], bytearray], None]


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return bundle(tmp_path)


def refused(path: Path, kind: type[BadFile], *words: str) -> None:
    """Unpacking and checking both raise it, of the file, and leave nothing."""
    target = path.parent / "out"
    for attempt in (
        lambda: unpack_folder(path, target / "again.safetensors", threads=2),
        lambda: check_folder(path, threads=1),
    ):
        with pytest.raises(BadFile) as caught:
            attempt()
        assert type(caught.value) is kind, repr(caught.value)
        for word in (path.name, *words):
            assert word in str(caught.value)
    assert not target.exists() or list(target.iterdir()) == []


# --- cut short, and other headers ----------------------------------------------------------------


def test_cut_short_anywhere(packed: Path) -> None:
    whole = packed.read_bytes()
    head, _ = taken_apart(whole)
    start = 8 + int.from_bytes(whole[:8], "little")
    ends = [start + entry["data_offsets"][1] for key, entry in head.items() if key[0] != "_"]
    for kept in (0, 1, 7, 8, 9, start // 2, start - 1, start, *(end - 1 for end in ends)):
        packed.write_bytes(whole[:kept])
        refused(packed, Truncated)


def test_more_than_it_says(packed: Path) -> None:
    packed.write_bytes(packed.read_bytes() + b"\0")
    refused(packed, WrongOffsets, "nothing from")


@pytest.mark.parametrize("length", [100_000_001, 1 << 40, (1 << 64) - 1])
def test_a_huge_header(packed: Path, length: int) -> None:
    packed.write_bytes(length.to_bytes(8, "little") + packed.read_bytes()[8:])
    refused(packed, HeaderTooLong, str(length))


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"{}{}", b'{"a": 1}', b'{"a": {}}', b"\xff{}",
        b"[" * 50_000, b'{"a":' * 50_000,
        b'{"a": {"dtype": "BF16", "shape": [-1], "data_offsets": [0, 2]}}',
        b'{"a": {"dtype": "BF16", "shape": [1.5], "data_offsets": [0, 2]}}',
        b'{"a": {"dtype": "BF17", "shape": [1], "data_offsets": [0, 2]}}',
        b'{"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0]}}',
        b'{"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 1e400]}}',
        b'{"__metadata__": {"format": 1}}', b'{"__metadata__": []}',
    ],
    ids=lambda text: repr(text[:40]),
)  # fmt: skip
def test_no_header(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_header(text, b"\0\0"))
    with pytest.raises(BadFile, match=r"x\.safetensors"):
        Shard(path)


def test_a_shape_too_large_for_any_machine(tmp_path: Path) -> None:
    entry = {"dtype": "U8", "shape": [1 << 40, 1 << 40, 1 << 40], "data_offsets": [0, 0]}
    (tmp_path / "x.safetensors").write_bytes(with_header({"a": entry}, b""))
    refused(tmp_path / "x.safetensors", WrongShape, "a")


def offsets(key: str, begin: int, end: int) -> Change:
    def change(head: dict[str, Any], _: bytearray) -> None:
        old = head[key]["data_offsets"]
        head[key]["data_offsets"] = [old[0] + begin, old[1] + end]

    return change


def shaped(key: str, **changes: Any) -> Change:
    return lambda head, _: head[key].update(changes)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda head, _: head[RAW].update(data_offsets=[9, 1]), WrongOffsets, RAW),
        (lambda head, _: head[RAW].update(data_offsets=[-8, 32]), WrongOffsets, RAW),
        (offsets(RAW, 1 << 40, 1 << 40), Truncated, RAW),
        (offsets(f"{MATRIX}.exp", -8, -8), Overlapping, ""),
        (offsets(f"{MATRIX}.xxh3", -24, -24), Overlapping, ""),
        (offsets(f"{MATRIX}.sm", 0, -1), WrongShape, "sm"),
        (shaped(f"{MATRIX}.sm", shape=[1024, 300]), WrongShape, "sm"),
        (shaped(f"{MATRIX}.sm", shape=[300 * 1024]), WrongShape, "sm"),
        (shaped(f"{MATRIX}.sm", dtype="I8"), WrongShape, "sm"),
        (shaped(f"{MATRIX}.exp_off", shape=[2, 2]), WrongShape, "exp_off"),
        (shaped(f"{MATRIX}.exp_off", dtype="I64"), WrongShape, "exp_off"),
        (shaped(f"{MATRIX}.xxh3", dtype="F64"), WrongShape, "xxh3"),
        (shaped(SMALL, dtype="F16"), WrongShape, SMALL),
        (shaped(RAW, dtype="U64"), WrongShape, RAW),
    ],
)
def test_parts_that_lie_or_are_otherwise(
    packed: Path, change: Change, kind: type[BadFile], words: str
) -> None:
    spoil(packed, change)
    refused(packed, kind, words)


@pytest.mark.parametrize("part", ["sm", "exp", "exp_off", "xxh3"])
def test_a_part_that_is_missing(packed: Path, part: str) -> None:
    spoil(packed, lambda head, _: head.update({"other": head.pop(f"{MATRIX}.{part}")}))
    refused(packed, MissingPart, f"{MATRIX}.{part}")


def test_a_tensor_that_is_missing(packed: Path) -> None:
    spoil(packed, lambda head, _: head.update(other=head.pop(SMALL)))
    refused(packed, MissingPart, SMALL)


def test_a_part_of_nothing(packed: Path) -> None:
    def change(head: dict[str, Any], data: bytearray) -> None:
        head["more"] = {"dtype": "U8", "shape": [0], "data_offsets": [len(data), len(data)]}

    spoil(packed, change)
    refused(packed, MissingPart, "more")


def test_a_plain_file_is_no_bundle(packed: Path) -> None:
    refused(packed.with_name("plain.safetensors"), UnknownFormat, "None")


# --- what the metadata says ----------------------------------------------------------------------


def stating(key: str, value: str) -> Change:
    return lambda head, _: head["__metadata__"].update({key: value})


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("format", "unweight/2", UnknownFormat),
        ("format", "unweight/", UnknownFormat),
        ("codec", "ans", UnknownFormat),
        ("tensors", "{", BadHeader),
        ("tensors", '{"a.weight": {"chunk_rows": 0}}', BadHeader),
        ("tensors", '{"a.weight": {"chunk_rows": -1}}', BadHeader),
        ("tensors", '{"a.weight": {"chunk_rows": "128"}}', BadHeader),
        ("tensors", '{"a.weight": {"chunk_rows": 1e30}}', BadHeader),
        ("tensors", '{"a.weight": {"chunk_rows": 127}}', BadChecksum),
        ("tensors", '{"a.weight": {"chunk_rows": 64}}', WrongShape),
        ("tensors", '{"a.weight": {"chunk_rows": 9223372036854775807}}', WrongShape),
        ("tensors", '{"ids": {"chunk_rows": 1}, "a.weight": {"chunk_rows": 128}}', BadHeader),
        ("tensors", '{"other": {"chunk_rows": 128}, "a.weight": {"chunk_rows": 128}}', MissingPart),
        ("tensors", "{}", MissingPart),
        ("header", "!", BadHeader),
        ("header", "", BadHeader),
        ("header", base64.b64encode(b"no zlib").decode(), BadHeader),
        ("header", base64.b64encode(zlib.compress(b"\7\0\0\0\0\0\0\0{}")).decode(), BadHeader),
        ("source_bytes", "some", BadHeader),
        ("source_bytes", "1", Truncated),
        ("source_bytes", str(1 << 62), WrongOffsets),
        ("source_xxh3", "0" * 32, BadChecksum),
    ],
)
def test_metadata_that_lies(packed: Path, key: str, value: str, kind: type[BadFile]) -> None:
    spoil(packed, stating(key, value))
    refused(packed, kind)


def test_a_digest_that_lies(packed: Path, tmp_path: Path) -> None:
    """The SHA-256 is for `check` and for whoever knows what it should be: unpacking has another."""
    spoil(packed, stating("source_sha256", "0" * 64))
    with pytest.raises(BadChecksum, match="SHA-256"):
        check_folder(packed, threads=1)


@pytest.mark.parametrize("key", ["tensors", "header", "source_bytes", "source_sha256"])
def test_metadata_that_is_missing(packed: Path, key: str) -> None:
    spoil(packed, lambda head, _: head["__metadata__"].pop(key))
    refused(packed, BadHeader, key)


def test_a_header_that_would_fill_memory(packed: Path) -> None:
    """A hundred kilobytes that inflate to more than any header may have."""
    bomb = zlib.compressobj(9)
    content = b"".join([bomb.compress(bytes(1 << 20)) for _ in range(120)]) + bomb.flush()
    assert len(content) < 200_000
    spoil(packed, stating("header", base64.b64encode(content).decode()))
    refused(packed, HeaderTooLong)


# --- what is in the parts ------------------------------------------------------------------------


def in_part(part: str, at: int, bits: int) -> Change:
    def change(head: dict[str, Any], data: bytearray) -> None:
        begin, end = head[f"{MATRIX}.{part}"]["data_offsets"]
        data[begin + at % (end - begin)] ^= bits

    return change


@pytest.mark.parametrize("bits", [1, 0x80])
@pytest.mark.parametrize(
    ("part", "at"), [("sm", 0), ("sm", -1), ("exp", 40), ("xxh3", 0), ("xxh3", -1)]
)
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
    refused(packed, BadChecksum, MATRIX)


# --- at random -----------------------------------------------------------------------------------


def test_whatever_is_done_to_it_it_is_the_source_or_an_error(tmp_path: Path) -> None:
    path = bundle(tmp_path)
    whole, expected = path.read_bytes(), (tmp_path / "plain.safetensors").read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(3)
    errors = 0
    for n in range(400):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 8])):
            # Half of the time in the header, which is a hundredth of the file.
            at = rng.randrange(start) if rng.random() < 0.5 else rng.randrange(len(content))
            content[at] = rng.choice([content[at] ^ 1 << rng.randrange(8), rng.randrange(256)])
        if rng.random() < 0.1:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(content)
        target = tmp_path / f"{n}.safetensors"
        try:
            unpack_folder(path, target, threads=1)
        except BadFile:
            errors += 1
            assert not target.exists()
        else:
            assert target.read_bytes() == expected
    assert errors > 300
    assert not list(tmp_path.glob(".*"))


def test_what_is_no_safetensors_file_is_not_packed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for content in (b"", b"hello", json.dumps({}).encode()):
        path.write_bytes(content)
        with pytest.raises(BadFile, match=r"x\.safetensors"):
            pack_folder(path, tmp_path / "y.safetensors", threads=1)
        assert not (tmp_path / "y.safetensors").exists()
