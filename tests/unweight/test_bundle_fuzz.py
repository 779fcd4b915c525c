"""Bundles and sources changed at random: what was packed, or a named error, and nothing else."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.unweight.bundles import (
    bundle,
    deflated,
    inflated,
    left_in,
    source,
    spoil,
    taken_apart,
    with_header,
)
from unweight.reader import Shard
from unweight.safetensors_header import BadFile
from unweight.writer import pack_folder, unpack_folder


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
