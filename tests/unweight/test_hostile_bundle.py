"""Headers and metadata that are not what they say: a named error, and nothing half made."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.unweight.bundles import (
    MATRIX,
    RAW,
    SMALL,
    Change,
    deflated,
    inflated,
    named_twice,
    spoil,
    taken_apart,
    with_header,
)
from tests.unweight.hostile import at_most, refused
from unweight.bundle import BadChecksum, MissingPart, UnknownFormat
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
from unweight.writer import check_folder, unpack_folder

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
