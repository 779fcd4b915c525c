"""Tensors by name, out of a folder of safetensors files or a bundle of them. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from infire.model.config import MissingFile
from infire.weight_files import (
    DamagedWeights,
    MissingTensor,
    bundle_shard,
    expect_shape,
    weight_paths,
)
from unweight.reader import Shard
from unweight.safetensors_header import BadFile


class WeightFiles:
    """The weights of a model folder, mapped from their files.

    A tensor that is asked for in the type it is stored in, on CPU, is a view of the file's pages:
    every process on the host that maps it shares them. What is compressed in a bundle is decoded
    into memory of this process.
    """

    def __init__(
        self, folder: Path, *, device: torch.device, dtype: torch.dtype, threads: int = 1
    ) -> None:
        self._device = device
        self._dtype = dtype
        self._threads = threads
        self._file_of: dict[str, Any] = {}  # tensor: open file
        self._shard_of: dict[str, Shard] = {}  # compressed tensor: its shard
        for path in weight_paths(folder):
            shard = bundle_shard(path)
            file = _open(path)
            self._file_of |= dict.fromkeys(file.keys(), file)
            if shard is not None:
                packed = [name for name in shard.names if shard.entry(name).compressed]
                self._shard_of |= dict.fromkeys(packed, shard)

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of that name; raises `MissingTensor`, `WrongShape`."""
        if (shard := self._shard_of.get(name)) is not None:
            expect_shape(name, shard.entry(name).shape, shape)
            return self._decoded(shard, name).view(shape).to(self._device, self._dtype)
        file = self._file_of.get(name)
        if file is None:
            raise MissingTensor(f"the weights lack {name}")
        expect_shape(name, tuple(file.get_slice(name).get_shape()), shape)
        tensor: Tensor = file.get_tensor(name)
        return tensor.to(self._device, self._dtype)

    def matrices(self, tensors: Seq[tuple[str, int]], num_inputs: int) -> list[Tensor]:
        """Each by itself: a view of its file, where it can be one."""
        return [self.take(name, size, num_inputs) for name, size in tensors]

    def _decoded(self, shard: Shard, name: str) -> Tensor:
        try:
            bits = shard.bits(name, threads=self._threads)
        except BadFile as error:
            raise DamagedWeights(str(error)) from error
        return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise MissingFile(f"{path} is missing") from error
    except SafetensorError as error:
        raise DamagedWeights(f"{path} is damaged or cut short: {error}") from error
