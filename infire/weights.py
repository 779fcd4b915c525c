"""Tensors by name, out of a folder of safetensors files. Knows no model."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct
from safetensors import SafetensorError, safe_open
from torch import Tensor

from infire.model.config import BadModel, MissingFile

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


class WeightFiles:
    """The weights of a model folder, mapped from their files.

    A tensor that is asked for in the type it is stored in, on CPU, is a view of the file's pages:
    every process on the host that maps it shares them.
    """

    def __init__(self, folder: Path, *, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self._file_of: dict[str, Any] = {}  # tensor: open file
        for path in weight_paths(folder):
            file = _open(path)
            self._file_of |= dict.fromkeys(file.keys(), file)

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of that name; raises `MissingTensor`, `WrongShape`."""
        file = self._file_of.get(name)
        if file is None:
            raise MissingTensor(f"the weights lack {name}")
        found = tuple(file.get_slice(name).get_shape())
        if found != shape:
            raise WrongShape(f"{name} is {found}, and the configuration says {shape}")
        tensor: Tensor = file.get_tensor(name)
        return tensor.to(self._device, self._dtype)


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


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise MissingFile(f"{path} is missing") from error
    except SafetensorError as error:
        raise DamagedWeights(f"{path} is damaged or cut short: {error}") from error
