"""Files that are not what they say: a named error that says where, and nothing half made."""

from __future__ import annotations

import base64
import json
import random
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from tests.unweight.bundles import (
    MATRIX,
    RAW,
    SMALL,
    Change,
    bf16,
    bundle,
    by_hand,
    deflated,
    inflated,
    left_in,
    named_twice,
    source,
    spoil,
    taken_apart,
    with_header,
)
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
from unweight.samples import trained_like
from unweight.writer import check_folder, pack_folder, unpack_folder


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return bundle(tmp_path)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """One whose matrix is one short chunk."""
    return bundle(tmp_path, rows=8)


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
    assert left_in(target) == []


@contextmanager
def at_most(num_bytes: int) -> Iterator[None]:
    """That no more is asked of memory at any time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < num_bytes
    finally:
        tracemalloc.stop()


# --- cut short, and other headers ----------------------------------------------------------------


def test_cut_short_anywhere(packed: Path) -> None:
    """In the length, the header, and each part at its start, inside, and before its last byte."""
    whole = packed.read_bytes()
    head, _ = taken_apart(whole)
    start = 8 + int.from_bytes(whole[:8], "little")
    for kept in (0, 1, 7, 8, 9, start // 2, start - 8, start - 1):
        packed.write_bytes(whole[:kept])
        refused(packed, Truncated, "a header of" if kept >= 8 else f": {kept} bytes are no")
    for key in head.keys() - {"__metadata__"}:
        begin, end = head[key]["data_offsets"]
        for kept in (begin, begin + 1, (begin + end) // 2, end - 1):
            packed.write_bytes(whole[: start + kept])
            refused(packed, Truncated, key)


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
        b"", b"{", b"[]", b"null", b'"x"', b"{}{}", b'{"a": 1}', b'{"a": {}}', b"\xff{}", b"{}\0",
        b'{"\xff": {}}', b'{"\\ud800": {}}', b"\xef\xbb\xbf{}", b"{'a': {}}", b"{,}", b'{"a"}',
        b"[" * 50_000, b'{"a":' * 50_000, b'{"a": {"x":' + b"[" * 50_000,
        b'{"a": {"dtype": "BF16", "shape": [1.5], "data_offsets": [0, 2]}}',
        b'{"a": {"dtype": "BF16", "shape": 1, "data_offsets": [0, 2]}}',
        b'{"a": {"dtype": "BF16", "shape": ["1"], "data_offsets": [0, 2]}}',
        b'{"a": {"dtype": "BF16", "shape": [null], "data_offsets": [0, 2]}}',
        b'{"a": {"dtype": "BF17", "shape": [1], "data_offsets": [0, 2]}}',
        b'{"a": {"dtype": "bf16", "shape": [1], "data_offsets": [0, 2]}}',
        b'{"a": {"dtype": 16, "shape": [1], "data_offsets": [0, 2]}}',
        b'{"a": {"shape": [1], "data_offsets": [0, 2]}}',
        b'{"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0]}}',
        b'{"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2, 4]}}',
        b'{"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 1e400]}}',
        b'{"a": {"dtype": "BF16", "shape": [%s], "data_offsets": [0, 2]}}' % (b"9" * 100_000),
        b'{"__metadata__": {"format": 1}}', b'{"__metadata__": []}', b'{"__metadata__": null}',
    ],
    ids=lambda text: repr(text[:60]),
)  # fmt: skip
def test_no_header(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_header(text, b"\0\0"))
    refused(path, BadHeader)


def test_a_name_that_is_there_twice(tmp_path: Path) -> None:
    """Readers differ in which of the two they take, and the format forbids it."""
    entry = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
    about = ("__metadata__", {"format": "unweight/1"})
    path = tmp_path / "x.safetensors"
    for pairs in ([("a", entry), ("a", entry)], [about, about, ("a", entry)]):
        path.write_bytes(with_header(named_twice(pairs), b"\0\0"))
        refused(path, BadHeader, f"{pairs[0][0]} twice")
    twice = named_twice([("format", "unweight/1"), ("format", "pt")])
    path.write_bytes(with_header(b'{"__metadata__": %s}' % twice, b""))
    refused(path, BadHeader, "format twice")


def test_a_name_that_the_source_had_twice(small: Path) -> None:
    def change(head: dict[str, Any], _: bytearray) -> None:
        inner, _ = taken_apart(inflated(head["__metadata__"]["header"]))
        twice = named_twice([*inner.items(), *inner.items()])
        head["__metadata__"]["header"] = deflated(with_header(twice, b""))

    spoil(small, change)
    refused(small, BadHeader, "the source's header", "twice")


def test_a_shape_too_large_for_any_machine(tmp_path: Path) -> None:
    entry = {"dtype": "U8", "shape": [1 << 40, 1 << 40, 1 << 40], "data_offsets": [0, 0]}
    (tmp_path / "x.safetensors").write_bytes(with_header({"a": entry}, b""))
    refused(tmp_path / "x.safetensors", WrongShape, "a")
    for shape in ([1 << 62, 1 << 62, 0], [0, 1 << 63], [0, -1], [-1, -2]):
        entry["shape"] = shape
        (tmp_path / "x.safetensors").write_bytes(with_header({"a": entry}, b""))
        refused(tmp_path / "x.safetensors", WrongShape, "a")


@pytest.mark.timeout(20)
def test_a_shape_of_very_many_axes(tmp_path: Path) -> None:
    """Multiplied out it would be a number of six million bits, after minutes."""
    many = [1 << 62] * 100_000
    for shape in (many, [*many, 0], [-1, *many]):
        entry = {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]}
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
        *(
            (offsets(f"{MATRIX}.{part}", 0, -(1 << 40)), WrongOffsets, f"{MATRIX}.{part}")
            for part in ("sm", "exp", "exp_off", "xxh3")
        ),
        (offsets(f"{MATRIX}.sm", 0, 1 << 62), Truncated, f"{MATRIX}.sm"),
        (offsets(SMALL, 8, 8), WrongOffsets, f"where {SMALL} begins"),
        (offsets(RAW, 1, 0), WrongShape, RAW),
        (shaped(RAW, shape=[4], data_offsets=[0, 32]), Overlapping, ""),
        (shaped(f"{MATRIX}.exp", dtype="I8"), WrongShape, f"{MATRIX}.exp is"),
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


def test_a_hole_between_two(packed: Path) -> None:
    def change(head: dict[str, Any], data: bytearray) -> None:
        begin, _ = head[SMALL]["data_offsets"]
        data[begin:begin] = bytes(16)
        for key, entry in head.items():
            if key != "__metadata__" and entry["data_offsets"][0] >= begin:
                entry["data_offsets"] = [at + 16 for at in entry["data_offsets"]]

    spoil(packed, change)
    refused(packed, WrongOffsets, f"where {SMALL} begins")


def test_frames_in_rows(packed: Path) -> None:
    """They are bytes of one axis."""
    spoil(packed, lambda head, _: head[f"{MATRIX}.exp"]["shape"].append(1))
    refused(packed, WrongShape, f"{MATRIX}.exp is")


def test_a_tensor_that_is_missing(packed: Path) -> None:
    spoil(packed, lambda head, _: head.update(other=head.pop(SMALL)))
    refused(packed, MissingPart, SMALL)


@pytest.mark.parametrize("key", ["more", f"{MATRIX}.crc", MATRIX, f"{SMALL}.sm"])
def test_a_part_too_many(packed: Path, key: str) -> None:
    """A tensor in parts under its own name, too, would be loaded by who knows no bundles."""

    def change(head: dict[str, Any], data: bytearray) -> None:
        head[key] = {"dtype": "U8", "shape": [3], "data_offsets": [len(data), len(data) + 3]}
        data += b"abc"

    spoil(packed, change)
    refused(packed, MissingPart, key)


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
        ("tensors", '{"a.weight": {"chunk_rows": 128, "x": ' + "[" * 50_000, BadHeader),
        ("tensors", "[" * 50_000, BadHeader),
        ("tensors", '{"a.weight": {}}', BadHeader),
        ("tensors", '{"a.weight": 128}', BadHeader),
        ("tensors", "[]", BadHeader),
        ("header", deflated(with_header(b"[]", b"")), BadHeader),
        ("header", deflated(with_header(b"[" * 50_000, b"")), BadHeader),
        ("header", deflated(with_header(b"{}", b"")), WrongOffsets),
        ("header", deflated((1 << 63).to_bytes(8, "little") + b"{}"), BadHeader),
        ("header", deflated(b"{}"), BadHeader),
        ("header", deflated(with_header(b"{}", b""))[:-8], BadHeader),
        ("header", "ä", BadHeader),
        ("source_bytes", "some", BadHeader),
        ("source_bytes", "9" * 5000, BadHeader),
        ("source_bytes", "-5", Truncated),
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


@pytest.mark.parametrize(
    "key", ["tensors", "header", "source_bytes", "source_sha256", "source_xxh3"]
)
def test_metadata_that_is_missing(packed: Path, key: str) -> None:
    spoil(packed, lambda head, _: head["__metadata__"].pop(key))
    refused(packed, BadHeader, key)


def test_a_header_among_other_letters(packed: Path) -> None:
    """Base64 is read as others read it: no space, no letter that it has not."""
    about = taken_apart(packed.read_bytes())[0]["__metadata__"]["header"]
    for text in (f" {about}", f"{about}\n", f"{about[:9]}!{about[9:]}", f"{about}=="):
        spoil(packed, stating("header", text))
        refused(packed, BadHeader, "its metadata")


def test_a_header_that_would_fill_memory(packed: Path) -> None:
    """A hundred kilobytes that inflate to more than any header may have."""
    bomb = zlib.compressobj(9)
    content = b"".join([bomb.compress(bytes(1 << 20)) for _ in range(120)]) + bomb.flush()
    assert len(content) < 200_000
    spoil(packed, stating("header", base64.b64encode(content).decode()))
    with at_most(220_000_000):  # the longest header that the format allows, twice
        refused(packed, HeaderTooLong)


@pytest.mark.parametrize("rows", [9, 1 << 40, 1 << 62, (1 << 63) - 1, 1 << 64])
def test_chunks_of_more_rows_than_there_are(small: Path, rows: int) -> None:
    """One chunk is one chunk: it takes what is there, not what it says."""
    spoil(small, stating("tensors", json.dumps({MATRIX: {"chunk_rows": rows}})))
    expected = small.with_name("plain.safetensors").read_bytes()
    with at_most(3_000_000):
        unpack_folder(small, small.with_name("again"), threads=2)
    assert small.with_name("again").read_bytes() == expected
    assert Shard(small).bits(MATRIX).shape == (8, 1024)


def test_a_tensor_of_nothing_is_not_in_parts(small: Path) -> None:
    def change(head: dict[str, Any], _: bytearray) -> None:
        about = head["__metadata__"]
        before = inflated(about["header"])
        inner, _ = taken_apart(before)
        inner["none"] = {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}
        after = with_header(inner, b"")
        about["header"] = deflated(after)
        about["source_bytes"] = str(int(about["source_bytes"]) + len(after) - len(before))
        about["tensors"] = json.dumps({MATRIX: {"chunk_rows": 128}, "none": {"chunk_rows": 1}})

    spoil(small, change)
    refused(small, BadHeader, "none")


# --- what is in the parts ------------------------------------------------------------------------


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


NUMBERS = (-1, 0, 1, 2, 7, 8, 128, 1024, 8192, 1 << 31, 1 << 32, 1 << 53, (1 << 64) - 1, 1 << 70)
VALUES = (None, "", "x", [], {}, 0.5, True, *NUMBERS)


def twisted(value: Any, rng: random.Random) -> Any:
    """JSON with one place of it another."""
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            rest = {k: v for k, v in value.items() if k != key}
            return rest if rng.random() < 0.5 else rest | {rng.choice(["x", *value]): value[key]}
        return value | {key: twisted(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        return [*value[:at], twisted(value[at], rng), *value[at + 1 :]]
    if isinstance(value, int) and rng.random() < 0.8:
        return rng.choice([value + 1, value - 1, value + 8, 2 * value, *NUMBERS])
    return rng.choice(VALUES)


def twist(path: Path, rng: random.Random) -> None:
    """Change one thing that a bundle says: in its header, in the source's, or of the coded."""

    def change(head: dict[str, Any], _: bytearray) -> None:
        about, where = head["__metadata__"], rng.randrange(4)
        if where == 0:
            about["tensors"] = json.dumps(twisted(json.loads(about["tensors"]), rng))
        elif where == 1:
            inner, _ = taken_apart(inflated(about["header"]))
            about["header"] = deflated(with_header(twisted(inner, rng), b""))
        else:
            changed = twisted(head, rng)
            head.clear()
            head.update(changed if isinstance(changed, dict) else {"x": changed})

    spoil(path, change)


def test_whatever_it_says_it_is_the_source_or_an_error(small: Path) -> None:
    """And an engine, which decodes by tensor and not the whole, meets no other error."""
    whole, expected = small.read_bytes(), small.with_name("plain.safetensors").read_bytes()
    rng, errors = random.Random(6), list[str]()
    target = small.parent / "out" / "again"
    for _ in range(600):
        small.write_bytes(whole)
        twist(small, rng)
        try:
            shard = Shard(small)
            for name in shard.names:
                if shard.entry(name).dtype == "BF16":
                    shard.bits(name, threads=2)
            unpack_folder(small, target, threads=2)
        except BadFile as error:
            errors.append(str(error))
        else:
            assert target.read_bytes() == expected
            target.unlink()
        assert left_in(target.parent) == []
    assert 400 < len(errors) < 600
    assert all(error.startswith(f"{small}") for error in errors)


def test_whatever_a_source_says_it_is_packed_or_an_error(tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain.safetensors", tmp_path / "packed.safetensors"
    head, data = taken_apart(source(plain, rows=8))
    rng, errors = random.Random(7), list[str]()
    for _ in range(300):
        plain.write_bytes(with_header(json.dumps(twisted(head, rng)).encode(), data))
        try:
            pack_folder(plain, packed, threads=1)
        except BadFile as error:
            errors.append(str(error))
        else:
            unpack_folder(packed, tmp_path / "again", threads=1)
            assert (tmp_path / "again").read_bytes() == plain.read_bytes()
            packed.unlink()
            (tmp_path / "again").unlink()
        assert left_in(tmp_path) == [plain.name]
    assert 200 < len(errors) < 300
    assert all(error.startswith(f"{plain}: ") for error in errors)


def test_what_is_no_safetensors_file_is_not_packed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for content in (b"", b"hello", json.dumps({}).encode()):
        path.write_bytes(content)
        with pytest.raises(BadFile, match=r"x\.safetensors"):
            pack_folder(path, tmp_path / "y.safetensors", threads=1)
        assert not (tmp_path / "y.safetensors").exists()
