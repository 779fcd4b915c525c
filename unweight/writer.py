"""Folders of safetensors files to bundles and back: whole files or none, and the same bytes.

A file is made beside its place and moved there when it is on disk. What is there already is left,
if it is of the same source. Knows no model.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from unweight import coder
from unweight.bundle import PARTS, BadChecksum, about, chunk_rows, matrix
from unweight.reader import Shard, is_bundle, mapped
from unweight.safetensors_header import BadFile, Place, read_header, write_header
from unweight.source import AHEAD, ahead, source_bytes

Progress = Callable[[int], None]  # so many bytes of BF16 (or of a file that is copied) are done

_HASHED = 1 << 24  # bytes


@dataclass(frozen=True, slots=True)
class _Coding:
    """Who codes, and who is told."""

    pool: ThreadPoolExecutor
    threads: int
    progress: Progress


class Refused(Exception):
    """Something is in the way, or is not what the command is for. The message says what."""


def pack_folder(
    source: Path, target: Path, *, threads: int, progress: Progress = lambda _: None
) -> list[str]:
    """A bundle of a folder of safetensors files, or of one file; everything else is copied.

    Returns the names of what was made; what was there already, of the same source, is left. Raises
    `BadFile`, `Refused`, OSError.
    """
    return _each_file(source, target, lambda a, b: _pack(a, b, threads, progress), progress)


def unpack_folder(
    source: Path, target: Path, *, threads: int, progress: Progress = lambda _: None
) -> list[str]:
    """The folder that was packed, every file byte for byte; the rest as `pack_folder`."""
    return _each_file(source, target, lambda a, b: _unpack(a, b, threads, progress), progress)


def check_folder(
    source: Path, *, threads: int, progress: Progress = lambda _: None
) -> dict[str, str]:
    """SHA-256 of every file that would be unpacked, by its path in the folder. Raises `BadFile` for
    the first that is damaged, `Refused` if there are none."""
    found = {}
    for path in weight_files(source):
        shard = Shard(path)
        sha256 = hashlib.sha256()
        for part in source_bytes(shard, threads):
            sha256.update(part)
            progress(len(part))
        if sha256.hexdigest() != shard.source_sha256:
            raise BadChecksum(f"{path}: SHA-256 {sha256.hexdigest()}, not {shard.source_sha256}")
        name = path.name if path == source else path.relative_to(source).as_posix()
        found[name] = sha256.hexdigest()
    return found


def total_bytes(source: Path, *, unpacked: bool, copies: bool = True) -> int:
    """What `progress` will have counted in the end; `copies`: with files that are no weights."""
    paths = _files(source) if copies else weight_files(source)
    sizes = [
        Shard(path).contents.source_bytes if unpacked and _is_weights(path) else path.stat().st_size
        for path in paths
    ]
    return sum(sizes)


def size_on_disk(path: Path) -> int:
    """Of a file, or of all in a folder."""
    return sum(file.stat().st_size for file in _files(path))


def weight_files(source: Path) -> list[Path]:
    """The safetensors files of a folder, or the one that is given. Raises `Refused` if none is."""
    paths = [path for path in _files(source) if _is_weights(path)]
    if not paths:
        raise Refused(f"{source} has no safetensors file")
    return paths


def _pack(source: Path, target: Path, threads: int, progress: Progress) -> bool:
    content = mapped(source)
    header = read_header(content, str(source))
    if is_bundle(source):
        raise Refused(f"{source} is packed already")
    with ThreadPoolExecutor(1) as hashing, ThreadPoolExecutor(threads) as pool:
        digests = hashing.submit(_digests, content)
        if target.exists() and _is_of(target, digests.result()[0]):
            progress(content.nbytes)
            return False
        with _made(target) as file:
            data = content[header.num_bytes :]
            kept = [name for name in header.places if _is_worth(name, header.places, data)]
            packed = {name: chunk_rows(header.places[name].shape) for name in kept}
            head = content[: header.num_bytes].tobytes()
            room = _room(header.places, packed, head)
            out = _Tensors(file, room)
            progress(header.num_bytes)
            for name, place in header.places.items():
                if name in packed:
                    words = data[_of(place)].view("<u2")
                    _write_packed(out, name, place, words, _Coding(pool, threads, progress))
                else:
                    out.write(name, place.dtype, place.shape, [data[_of(place)]])
                    progress(place.end - place.begin)
            sha256, xxh3 = digests.result()
            metadata = about(head, packed, num_bytes=content.nbytes, sha256=sha256, xxh3=xxh3)
            file.seek(0)
            file.write(write_header(out.places, metadata, room))
    return True


class _Tensors:
    """The tensors of a file that is written from its end of the header on."""

    def __init__(self, file: BinaryIO, room: int) -> None:
        file.seek(room)
        self._file = file
        self._room = room
        self.places: dict[str, Place] = {}

    def write(
        self, key: str, dtype: str, shape: tuple[int, ...], pieces: Iterable[NDArray[np.generic]]
    ) -> None:
        """One, in pieces."""
        begin = self._file.tell() - self._room
        for piece in pieces:
            self._file.write(np.ascontiguousarray(piece).view(np.uint8).data)
        self.places[key] = Place(dtype, shape, begin, self._file.tell() - self._room)

    def write_array(self, key: str, array: NDArray[np.unsignedinteger[Any]]) -> None:
        """One of whole numbers."""
        self.write(key, f"U{8 * array.itemsize}", array.shape, [array])


def _write_packed(
    out: _Tensors, name: str, place: Place, words: NDArray[np.uint16], coding: _Coding
) -> None:
    """Four parts of a tensor; of its frames, no more than the tensor's are held."""
    step = chunk_rows(place.shape) * matrix(place.shape)[1]
    frames, digests = [], []

    def code(start: int) -> tuple[NDArray[np.uint8], bytes, int]:
        some = words[start : start + step]
        sm, exponents = coder.split(some)
        return sm, coder.encode(exponents), coder.digest(some)

    def planes() -> Iterator[NDArray[np.uint8]]:
        starts = range(0, words.size, step)
        for sm, frame, digest in ahead(coding.pool, code, starts, coding.threads * AHEAD):
            frames.append(frame)
            digests.append(digest)
            yield sm
            coding.progress(2 * sm.size)

    out.write(f"{name}.sm", "U8", place.shape, planes())
    out.write_array(f"{name}.exp", np.frombuffer(b"".join(frames), np.uint8))
    ends = np.cumsum([len(frame) for frame in frames])
    out.write_array(f"{name}.exp_off", np.concatenate([[0], ends]).astype("<u8"))
    out.write_array(f"{name}.xxh3", np.array(digests, "<u8"))


def _room(places: Mapping[str, Place], packed: Mapping[str, int], head: bytes) -> int:
    """Bytes that the header is sure to fit in, before what it says is known: with the largest
    numbers in it. Some spaces are left at its end, which the format allows."""
    largest: dict[str, Place] = {}
    for name, place in places.items():
        far = Place("BF16", place.shape, 1 << 52, 1 << 53)
        parts = [f"{name}.{part}" for part in ("sm", "exp", "exp_off", "xxh3")]
        largest |= dict.fromkeys(parts if name in packed else [name], far)
    longest = about(head, packed, num_bytes=1 << 53, sha256="0" * 64, xxh3="0" * 32)
    return len(write_header(largest, longest)) + 32 * len(largest)  # shapes of frames: 17 digits


def _is_worth(name: str, places: Mapping[str, Place], data: NDArray[np.uint8]) -> bool:
    """Whether it gets smaller, and none of the source's tensors has the name of a part of it."""
    place = places[name]
    if place.dtype != "BF16" or any(f"{name}.{part}" in places for part in PARTS):
        return False
    return coder.is_worth(data[_of(place)].view("<u2"))


def _unpack(source: Path, target: Path, threads: int, progress: Progress) -> bool:
    shard = Shard(source)
    if _sha256_of(target) == shard.source_sha256:
        progress(shard.contents.source_bytes)
        return False
    with _made(target) as file:
        for part in source_bytes(shard, threads):
            file.write(part)
            progress(len(part))
    return True


def _each_file(
    source: Path, target: Path, convert: Callable[[Path, Path], bool], progress: Progress
) -> list[str]:
    paths = _files(source)
    weight_files(source)
    if source.is_file():
        target_of = {source: target}
    else:
        if target.resolve() == source.resolve() or source.resolve() in target.resolve().parents:
            raise Refused(f"{target} is the folder that is read, or inside it")
        if target.exists() and not target.is_dir():
            raise Refused(f"{target} is there already, and no folder")
        target_of = {path: target / path.relative_to(source) for path in paths}
    made = []
    for path, to in target_of.items():
        if to.is_dir():
            raise Refused(f"{to} is there already, a folder")
        if convert(path, to) if _is_weights(path) else _copy(path, to, progress):
            made.append(to.name)
    return made


def _copy(source: Path, target: Path, progress: Progress) -> bool:
    size = source.stat().st_size
    if target.exists():
        if target.read_bytes() != source.read_bytes():
            raise Refused(f"{target} is there already, and another file than {source}")
        progress(size)
        return False
    with _made(target) as file, source.open("rb") as content:
        shutil.copyfileobj(content, file)
    progress(size)
    return True


def _sha256_of(target: Path) -> str | None:
    """None of what is not there, or empty, as no safetensors file is."""
    if not target.exists() or not target.stat().st_size:
        return None
    return _digests(mapped(target))[0]


def _is_of(target: Path, sha256: str) -> bool:
    try:
        shard = Shard(target)
    except BadFile as error:
        raise Refused(f"{target} is there already, and no whole bundle: {error}") from error
    if shard.source_sha256 != sha256:
        raise Refused(f"{target} is there already, packed from another file")
    return True


@contextmanager
def _made(target: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its place when the block ends well, and is gone if not.

    One process makes it at a time; what one that was killed has left is written over."""
    if target.exists():
        raise Refused(f"{target} is there already, and another file than would be made")
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f".{target.name}.making")
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Refused(f"{target} is being made by another process") from error
        if not _is_at(path, file):
            raise Refused(f"{target} is being made by another process")
        if target.exists():
            path.unlink()
            raise Refused(f"{target} is there already, since a moment ago")
        try:
            with path.open("r+b") as content:
                content.truncate(0)
                yield content
                content.flush()
                os.fsync(content.fileno())
            path.replace(target)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Whether an open file still has that name: whoever had its lock may have moved it since."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _digests(content: NDArray[np.uint8]) -> tuple[str, str]:
    """SHA-256 and XXH3 of 128 bits, in hexadecimal."""
    sha256, xxh3 = hashlib.sha256(), xxhash.xxh3_128()
    for start in range(0, content.size, _HASHED):
        sha256.update(content[start : start + _HASHED].data)
        xxh3.update(content[start : start + _HASHED].data)
    return sha256.hexdigest(), xxh3.hexdigest()


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise Refused(f"{source} is not there")
    return sorted(
        path for path in source.rglob("*") if path.is_file() and not path.name.endswith(".making")
    )


def _is_weights(path: Path) -> bool:
    return path.suffix == ".safetensors"


def _of(place: Place) -> slice:
    return slice(place.begin, place.end)
