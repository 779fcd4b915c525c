"""Which files a model's weights lie in, and their digest. Opens no tensor."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import msgspec
from msgspec import Struct

from infire.model.config import BadModel

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


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
    """As `edgefire.json` says, else the SHA-256 of the weight files, one after the other."""
    try:
        about = (folder / "edgefire.json").read_bytes()
        return msgspec.json.decode(about, type=_About).model_digest
    except FileNotFoundError:
        digest = sha256()
    except msgspec.DecodeError as error:
        raise BadModel(f"{folder / 'edgefire.json'}: {error}") from error
    for path in weight_paths(folder):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
