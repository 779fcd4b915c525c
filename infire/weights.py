"""Tensors by name, out of a folder of safetensors files. Knows no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from infire.model.config import MissingFile
from infire.weight_files import DamagedWeights, MissingTensor, WrongShape, weight_paths


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


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise MissingFile(f"{path} is missing") from error
    except SafetensorError as error:
        raise DamagedWeights(f"{path} is damaged or cut short: {error}") from error
