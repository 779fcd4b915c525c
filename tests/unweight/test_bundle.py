"""What goes into a bundle comes out, byte for byte, and anyone can read what is in between."""

from __future__ import annotations

import hashlib
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from tests.unweight.bundles import (
    MATRIX,
    RAW,
    SMALL,
    bf16,
    bundle,
    by_hand,
    file_of,
    taken_apart,
    tensors_of,
    with_header,
    within,
)
from unweight.coder import digest, join, split
from unweight.reader import NoSuchTensor, Shard, is_bundle
from unweight.samples import trained_like
from unweight.source import source_bytes
from unweight.writer import check_folder, pack_folder, unpack_folder

EVERY = np.arange(1 << 16, dtype=np.uint16)


def there_and_back(content: bytes, folder: Path, *, threads: int = 1) -> Path:
    """The bundle of a file that must come back as it was."""
    folder.mkdir(parents=True, exist_ok=True)
    plain, packed, again = (folder / f"{name}.safetensors" for name in ("plain", "packed", "again"))
    plain.write_bytes(content)
    pack_folder(plain, packed, threads=threads)
    unpack_folder(packed, again, threads=threads)
    assert again.read_bytes() == content
    return packed


def test_every_pattern_in_every_slot(tmp_path: Path) -> None:
    """Trained weights, so that the tensor is coded, and all patterns at eight offsets in it."""
    for roll in range(8):
        weights = np.concatenate(
            [trained_like(512, 1024, seed=roll).reshape(-1), np.roll(EVERY, roll)]
        )
        content = file_of({"w": bf16(weights.reshape(-1, 1024))})
        packed = there_and_back(content, tmp_path / str(roll))
        shard = Shard(packed)
        assert shard.entry("w").compressed
        assert np.array_equal(shard.bits("w").reshape(-1), weights)


def test_what_floats_there_are(tmp_path: Path) -> None:
    rows = trained_like(64, 1024, seed=0)
    rows[0] = 0
    rows[1] = 0x8000
    rows[2, ::2] = 0x7F80  # Inf
    rows[3] = 0x7FC1  # NaN with a payload
    rows[4, 5:9] = [0xFF81, 0x0001, 0x807F, 0x0080]  # NaN, subnormals, the smallest normal
    rows[5] = 0x4B00  # an outlier throughout
    shard = Shard(there_and_back(file_of({"w": bf16(rows)}), tmp_path))
    assert shard.entry("w").compressed
    assert np.array_equal(shard.bits("w"), rows)


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        ("F16", 16), ("F8_E4M3", 8), ("F8_E5M2", 8), ("F8_E4M3FNUZ", 8), ("F4", 4), ("F32", 32),
        ("F64", 64), ("U8", 8), ("I8", 8), ("U16", 16), ("I64", 64), ("BOOL", 8),
    ],
)  # fmt: skip
def test_other_types_pass_through(tmp_path: Path, dtype: str, bits: int) -> None:
    """Under their own names, though their bytes are those of weights that would be coded. (Four
    bits packed in U8 are U8.)"""
    raw = (trained_like(64, 1024, seed=0).tobytes() * 4)[: 64 * 1024 * bits // 8]
    content = file_of({"x": (dtype, (64, 1024), raw), "w": bf16(trained_like(64, 1024, seed=1))})
    packed = there_and_back(content, tmp_path)
    head, data = taken_apart(packed.read_bytes())
    assert {"x", "w.sm"} < head.keys()
    assert "w" not in head
    assert (head["x"]["dtype"], head["x"]["shape"]) == (dtype, [64, 1024])
    assert within(head, data, "x") == raw
    assert not Shard(packed).entry("x").compressed


def test_what_does_not_get_smaller_is_stored_as_it_was(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 1 << 16, (64, 1024)).astype(np.uint16)
    content = file_of({"noise": bf16(noise), "few": bf16(trained_like(1, 4095, seed=0))})
    packed = there_and_back(content, tmp_path)
    head, data = taken_apart(packed.read_bytes())
    assert head.keys() == {"__metadata__", "noise", "few"}
    assert head["noise"]["dtype"] == "BF16"
    assert within(head, data, "noise") == noise.tobytes()
    assert np.array_equal(Shard(packed).bits("noise", slice(3, 5)), noise[3:5])


def test_weights_that_fool_the_samples_come_back(tmp_path: Path) -> None:
    """Both ends code well; between them is noise, of which frames are larger than it is."""
    words = trained_like(300, 1024, seed=0)
    words[20:280] = np.random.default_rng(0).integers(0, 1 << 16, (260, 1024))
    shard = Shard(there_and_back(file_of({"w": bf16(words)}), tmp_path))
    assert shard.entry("w").compressed
    assert np.array_equal(shard.bits("w"), words)


@pytest.mark.parametrize("part", ["sm", "exp", "exp_off", "xxh3"])
def test_a_source_may_have_the_name_of_a_part(tmp_path: Path, part: str) -> None:
    """Then the tensor is stored as it was, and both come back."""
    weights = trained_like(8, 1024, seed=0)
    tensors = {"w": bf16(weights), f"w.{part}": ("U8", (3,), b"abc"), "v": bf16(weights)}
    shard = Shard(there_and_back(file_of(tensors), tmp_path))
    assert {name for name in shard.names if shard.entry(name).compressed} == {"v"}
    assert bytes(shard.raw(f"w.{part}")) == b"abc"
    assert np.array_equal(shard.bits("w"), weights)


def test_shapes_of_all_kinds(tmp_path: Path) -> None:
    weights = trained_like(96, 1024, seed=0)
    tensors = {
        "scalar": bf16(weights[0, :1].reshape(())),
        "none": bf16(weights[:0]),
        "vector": bf16(weights.reshape(-1)),
        "cube": bf16(weights.reshape(8, 12, 1024)),
        "thin": bf16(weights.reshape(-1, 1)),
        "nothing": ("F32", (0, 7), b""),
        "no columns": bf16(weights[:, :0]),
        "no length": bf16(weights[0, :0]),
        "odd": ("U8", (3,), b"abc"),  # of what follows every weight is at an odd address
        "matrix": bf16(weights),
        "few": bf16(weights[0, :100]),
    }
    shard = Shard(there_and_back(file_of(tensors), tmp_path))
    coded = {"vector", "cube", "thin", "matrix"}
    assert {n for n in shard.names if shard.entry(n).compressed} == coded
    for name, (dtype, shape, content) in tensors.items():
        if dtype == "BF16":
            *rows, width = shape or (1,)
            expected = np.frombuffer(content, "<u2").reshape(int(np.prod(rows)), width)
            assert np.array_equal(shard.bits(name), expected), name


def test_a_header_comes_back_as_it_was(tmp_path: Path) -> None:
    matrix = bf16(trained_like(8, 1024, seed=0))
    data = matrix[2] + bytes(16)
    for n, head in enumerate(
        [
            {"z": ("BF16", (8, 1024), 0), "a": ("I32", (4,), len(matrix[2]))},
            {"a": ("I32", (4,), len(matrix[2])), "z": ("BF16", (8, 1024), 0)},  # not as data lies
        ]
    ):
        size = {"z": len(matrix[2]), "a": 16}
        entries = {
            key: {"data_offsets": [at, at + size[key]], "shape": list(shape), "dtype": dtype}
            for key, (dtype, shape, at) in head.items()
        }
        for spaces, metadata in ((0, None), (13, {"format": "pt", "über": "ß"})):
            told = {"__metadata__": metadata} if metadata else {}
            text = json.dumps(told | entries, indent=spaces).encode() + b" " * spaces
            content = len(text).to_bytes(8, "little") + text + data
            there_and_back(content, tmp_path / f"{n} {spaces}")


def test_headers_in_any_spelling_come_back(tmp_path: Path) -> None:
    """Order of names and of fields, spaces, escapes, fields that the format has not."""
    rng = random.Random(5)
    matrix, ids = trained_like(8, 1024, seed=0).tobytes(), bytes(range(40))
    for n in range(40):
        names = rng.choice([["w", "ids"], ['ü/\u2603 \x1f"', "\U0001f525"], ["", " "]])
        places = [("BF16", [8, 1024], [0, 16384]), ("I64", [5], [16384, 16424])]
        head: dict[str, Any] = {"__metadata__": {"a": "b", "ü": "\n"}} if rng.random() < 0.7 else {}
        for name, place in zip(names, places, strict=True):
            fields = list(zip(("dtype", "shape", "data_offsets"), place, strict=True))
            fields += rng.choice([[], [("more", [1, {"x": None}])]])
            head[name] = dict(rng.sample(fields, len(fields)))
        head = dict(rng.sample(list(head.items()), len(head)))
        text = json.dumps(
            head, indent=rng.choice([None, 1]), ensure_ascii=rng.choice([True, False])
        )
        content = with_header((" " * rng.randrange(3) + text).encode(), matrix + ids, n % 11)
        there_and_back(content, tmp_path / str(n))


def test_a_header_has_room_for_all_it_will_say(tmp_path: Path) -> None:
    """It is written last, into a place that was left for it: the longest types, the shortest
    numbers, and many of both."""
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {
        f"{n}": ("F8_E4M3FNUZ", (1,) * (n % 5), b"x") for n in range(500)
    }
    tensors |= {f"w{n}": bf16(trained_like(1, 4096, seed=n)[0]) for n in range(50)}
    there_and_back(file_of(tensors), tmp_path / "many")
    there_and_back(file_of({}), tmp_path / "none")
    there_and_back(file_of({}, metadata={}), tmp_path / "nothing said")
    there_and_back(file_of({"": ("F8_E4M3FNUZ", (), b"x")}), tmp_path / "one")


@pytest.mark.parametrize("rows", [1, 3, 8, 1000])
def test_a_bundle_made_by_hand_is_read(tmp_path: Path, rows: int) -> None:
    """By what README.md says of the format, by a coder's usual settings, in chunks that are not
    the writer's."""
    weights = trained_like(8, 600, seed=0)
    tensors = {"ids": ("I64", (1,), bytes(8)), "w": bf16(weights.reshape(2, 4, 600))}
    path = tmp_path / "hand.safetensors"
    path.write_bytes(by_hand(tensors, {"w": rows}))
    unpack_folder(path, tmp_path / "again", threads=2)
    assert (tmp_path / "again").read_bytes() == file_of(tensors)
    assert check_folder(path, threads=1)
    shard = Shard(path)
    assert np.array_equal(shard.bits("w", slice(2, 7), threads=2), weights[2:7])
    firsts = [first for first, _ in shard.chunks("w")]
    assert firsts == list(range(0, 8, rows))


def test_readers_of_safetensors_open_it(tmp_path: Path) -> None:
    """And a person could decode it with what the format's page says."""
    path = bundle(tmp_path)
    assert is_bundle(path)
    assert not is_bundle(tmp_path / "plain.safetensors")
    with safe_open(path, framework="np") as file:
        assert set(file.keys()) == {
            SMALL, RAW, *(f"{MATRIX}.{part}" for part in ("sm", "exp", "exp_off", "xxh3"))
        }  # fmt: skip
        about = file.metadata()
        sm, frames = file.get_tensor(f"{MATRIX}.sm"), file.get_tensor(f"{MATRIX}.exp")
        offsets, digests = (file.get_tensor(f"{MATRIX}.{part}") for part in ("exp_off", "xxh3"))
    assert (about["format"], about["codec"]) == ("unweight/1", "zstd-huf")
    assert json.loads(about["tensors"]) == {MATRIX: {"chunk_rows": 128}}
    assert sm.shape == (300, 1024)
    weights = trained_like(300, 1024, seed=1)
    expected_sm, _ = split(weights.reshape(-1))
    assert np.array_equal(sm.reshape(-1), expected_sm)
    assert offsets.tolist() == sorted(offsets.tolist())
    assert (len(offsets), offsets[0], offsets[-1]) == (4, 0, frames.size)
    assert digests.tolist() == [digest(weights[n : n + 128].reshape(-1)) for n in (0, 128, 256)]


def test_rows_come_alone_and_together(tmp_path: Path) -> None:
    shard = Shard(bundle(tmp_path))
    weights = trained_like(300, 1024, seed=1)
    for rows in (slice(0, 1), slice(127, 129), slice(5, 290), slice(299, 300), slice(7, 7)):
        for threads in (1, 3):
            assert np.array_equal(shard.bits(MATRIX, rows, threads=threads), weights[rows])
    for first, words in shard.chunks(MATRIX):
        assert np.array_equal(words, weights[first : first + 128])
    sm, frame = shard.planes(MATRIX, 2)
    assert sm.size == 44 * 1024
    assert frame.size > 0
    with pytest.raises(NoSuchTensor, match="nothing"):
        shard.entry("nothing")


def test_threads_change_nothing(tmp_path: Path) -> None:
    """With more chunks than threads may be ahead by, the last of them short."""
    weights = trained_like(1667, 1024, seed=1)
    content = file_of({"w": bf16(weights), "v": bf16(weights[:130])})
    one, *others = (
        there_and_back(content, tmp_path / str(n), threads=n).read_bytes() for n in (1, 2, 3, 8)
    )
    assert others == [one] * 3
    shard = Shard(tmp_path / "1" / "packed.safetensors")
    for n in (1, 2, 8):
        assert np.array_equal(shard.bits("w", threads=n), weights)
        assert check_folder(shard.path, threads=n)


def test_check_tells_the_digests_of_the_sources(tmp_path: Path) -> None:
    path = bundle(tmp_path)
    expected = hashlib.sha256((tmp_path / "plain.safetensors").read_bytes()).hexdigest()
    assert check_folder(path, threads=2) == {path.name: expected}


def test_check_tells_those_of_files_with_the_same_name_apart(tmp_path: Path) -> None:
    """As pipelines have them: one file name in many folders."""
    expected = {}
    for n, name in enumerate(["unet/model.safetensors", "vae/model.safetensors"]):
        (tmp_path / "model" / name).parent.mkdir(parents=True)
        content = file_of({"w": bf16(trained_like(8, 1024, seed=n))})
        (tmp_path / "model" / name).write_bytes(content)
        expected[name] = hashlib.sha256(content).hexdigest()
    pack_folder(tmp_path / "model", tmp_path / "bundle", threads=1)
    assert check_folder(tmp_path / "bundle", threads=1) == expected


def test_a_folder_comes_back_whole(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "onnx").mkdir(parents=True)
    for n in (1, 2):
        name = f"model-0000{n}-of-00002.safetensors"
        weights = trained_like(40, 1024, seed=n)
        (folder / name).write_bytes(file_of({f"w{n}": bf16(weights)}))
    index = {"weight_map": {f"w{n}": f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_bytes(b'{"a":\r\n 1}')
    (folder / "onnx" / "model.safetensors").write_bytes(
        file_of({"w": bf16(trained_like(8, 1024, seed=3))}, spaces=3)
    )
    (folder / "onnx" / "model.bin").write_bytes(b"\0\1\2")
    (folder / "empty").write_bytes(b"")
    pack_folder(folder, tmp_path / "bundle", threads=2)
    unpack_folder(tmp_path / "bundle", tmp_path / "again", threads=2)

    def files(root: Path) -> dict[str, bytes]:
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    assert files(tmp_path / "again") == files(folder)
    assert files(tmp_path / "bundle").keys() == files(folder).keys()
    assert sum(map(len, files(tmp_path / "bundle").values())) < 0.7 * sum(
        map(len, files(folder).values())
    )


def test_random_files(tmp_path: Path) -> None:
    rng = random.Random(4)
    types = {"BF16": 2, "F32": 4, "F16": 2, "U8": 1, "I64": 8}
    for n in range(25):
        tensors = {}
        for t in range(rng.randrange(5)):
            shape = tuple(rng.choice([1, 2, 3, 63, 100, 257]) for _ in range(rng.randrange(4)))
            dtype = rng.choice(["BF16", "BF16", *types])
            size = int(np.prod(shape))
            if dtype == "BF16" and rng.random() < 0.8:
                weights = trained_like(1, max(1, size), seed=n)[0, :size]
                weights[:: rng.randrange(50, 5000)] = rng.randrange(1 << 16)
                raw = weights.astype("<u2").tobytes()
            else:
                raw = rng.randbytes(size * types[dtype])
            tensors[f"t{t}"] = (dtype, shape, raw)
        content = file_of(tensors, spaces=rng.randrange(9))
        there_and_back(content, tmp_path / str(n), threads=rng.choice([1, 2]))


def test_metadata_of_the_bundle_is_its_own(tmp_path: Path) -> None:
    """What the source said of itself is in the source's header, which is kept whole."""
    shard = Shard(bundle(tmp_path))
    assert shard.contents.source.metadata == {"format": "pt"}
    head = json.loads(path_head(shard.path))
    assert set(tensors_of(head)) == {MATRIX}
    joined = join(*split(shard.bits(MATRIX).reshape(-1)), np.empty(300 * 1024, np.uint16))
    assert np.array_equal(joined, shard.bits(MATRIX).reshape(-1))


def path_head(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def test_a_vector_takes_its_own_size_whatever_the_threads(tmp_path: Path) -> None:
    """It is one chunk, of which none can be ahead."""
    size = 1 << 20
    vector = trained_like(1, size, seed=0)[0]
    packed = there_and_back(file_of({"v": bf16(vector)}), tmp_path)
    shard = Shard(packed)
    tracemalloc.start()
    try:
        assert sum(map(len, source_bytes(shard, 16))) == shard.contents.source_bytes
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2 * size
