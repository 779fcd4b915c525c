"""Which files a model's weights lie in, and their digest. Opens no tensor.

A file may be a shard of an Unweight bundle: its digest is that of the file that was packed, so that
a model is the same model in both forms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path

import msgspec
from msgspec import Struct

from infire.model.config import BadModel, MissingFile
from unweight.reader import Shard, is_bundle
from unweight.safetensors_header import BadFile
from unweight.source import source_bytes

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_READ = 1 << 20  # bytes


class DamagedWeights(BadModel):
    """A weight file that is not whole."""


class MissingTensor(BadModel):
    """The weights lack a tensor that the configuration promises."""


class WrongShape(BadModel):
    """A tensor has another shape than the configuration promises."""


class _Index(Struct, frozen=True):
    weight_map: dict[str, str]  # tensor: file


class _About(Struct, frozen=True):
    """`edgefire.json`, which `infire pull` leaves beside the weights."""

    model_digest: str


def weight_paths(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, one or, with an index, several; by name."""
    index = folder / _INDEX
    if not index.exists():
        return [folder / _SINGLE]
    try:
        names = set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values())
    except msgspec.DecodeError as error:
        raise BadModel(f"{index}: {error}") from error
    return [folder / name for name in sorted(names)]


def model_digest(folder: Path) -> str:
    """As `edgefire.json` says, else `weights_digest`. Of a bundle of one file that digest is taken
    from the file: what is decoded of it is verified by digests of its own.

    Raises `BadModel`."""
    try:
        about = (folder / "edgefire.json").read_bytes()
        return msgspec.json.decode(about, type=_About).model_digest
    except FileNotFoundError:
        pass
    except msgspec.DecodeError as error:
        raise BadModel(f"{folder / 'edgefire.json'}: {error}") from error
    paths = weight_paths(folder)
    if len(paths) == 1 and (shard := bundle_shard(paths[0])) is not None:
        return shard.source_sha256
    return weights_digest(paths)


def weights_digest(paths: Iterable[Path], threads: int = 1) -> str:
    """The SHA-256 of weight files, one after the other, all of each read; of shards of a bundle,
    of the files that were packed. Raises `BadModel`."""
    digest = sha256()
    for path in paths:
        try:
            for piece in _content(path, threads):
                digest.update(piece)
        except BadFile as error:
            raise DamagedWeights(str(error)) from error
    return digest.hexdigest()


def expect_shape(name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raises `WrongShape` unless a tensor is as the configuration says."""
    if found != shape:
        raise WrongShape(f"{name} is {found}, and the configuration says {shape}")


def bundle_shard(path: Path) -> Shard | None:
    """The file as a shard of a bundle, if it is one. Raises `BadModel` for what is neither that nor
    a safetensors file."""
    try:
        return Shard(path) if is_bundle(path) else None
    except FileNotFoundError as error:
        raise MissingFile(f"{path} is missing") from error
    except BadFile as error:
        raise DamagedWeights(f"{path} is damaged or cut short: {error}") from error
    except OSError as error:
        raise DamagedWeights(f"{path} cannot be read: {error}") from error


def _content(path: Path, threads: int) -> Iterator[bytes | memoryview]:
    shard = bundle_shard(path)
    if shard is not None:
        yield from source_bytes(shard, threads)
        return
    with path.open("rb") as file:
        while chunk := file.read(_READ):
            yield chunk
