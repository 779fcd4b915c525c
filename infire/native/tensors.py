"""Tensors by name as bfloat16, out of the safetensors files of a model folder, without torch.

Plain files are mapped; of a bundle's what is asked for is decoded, and verified. Knows no model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from infire.weight_files import (
    DamagedWeights,
    MissingTensor,
    bundle_shard,
    expect_shape,
    weight_paths,
)
from unweight.reader import Shard, mapped
from unweight.rounding import to_bf16
from unweight.safetensors_header import BadFile, Place, read_header


class TensorFiles:
    """The tensors of a folder, read from its files when they are asked for. Raises `BadModel`."""

    def __init__(self, folder: Path, *, threads: int = 1) -> None:
        self._threads = threads
        self._shards: dict[str, Shard] = {}
        self._places: dict[str, tuple[NDArray[np.uint8], Place]] = {}  # in plain files
        for path in weight_paths(folder):
            shard = bundle_shard(path)
            if shard is not None:
                self._shards |= dict.fromkeys(shard.names, shard)
                continue
            content = mapped(path)
            header = read_header(content, str(path))
            data = content[header.num_bytes :]
            self._places |= {name: (data, place) for name, place in header.places.items()}

    def stack(self, tensors: tuple[tuple[str, int], ...], *inner: int) -> NDArray[np.uint16]:
        """Tensors of names and first sizes one below the other, as `take` has each; a view of the
        file where it can be."""
        if len(tensors) == 1 and not self._is_compressed(tensors[0][0]):
            name, size = tensors[0]
            return self.take(name, size, *inner)
        stacked = np.empty((sum(size for _, size in tensors), *inner), np.uint16)
        first = 0
        for name, size in tensors:
            self._take_into(stacked[first : first + size], name)
            first += size
        return stacked

    def take(self, name: str, *shape: int) -> NDArray[np.uint16]:
        """The bits of bfloat16, rounded to nearest even where the file has more of them.

        Raises `MissingTensor`, `WrongShape`, `DamagedWeights`.
        """
        if self._is_compressed(name):
            made = np.empty(shape, np.uint16)
            self._take_into(made, name)
            return made
        dtype, data = self._stored(name, shape)
        match dtype:
            case "BF16":
                bits = data.view(np.uint16)
            case "F32":
                bits = to_bf16(data.view(np.float32))
            case "F16":
                bits = to_bf16(data.view(np.float16).astype(np.float32))
            case other:
                raise DamagedWeights(f"{name} is of type {other}, not BF16, F16 or F32")
        return bits.reshape(shape)

    def _is_compressed(self, name: str) -> bool:
        return name in self._shards and self._shards[name].entry(name).compressed

    def _take_into(self, out: NDArray[np.uint16], name: str) -> None:
        """Straight from a bundle's chunks where it is compressed."""
        if not self._is_compressed(name):
            out[:] = self.take(name, *out.shape)
            return
        shard = self._shards[name]
        entry = shard.entry(name)
        expect_shape(name, entry.shape, out.shape)
        try:
            shard.bits(name, threads=self._threads, out=out.reshape(entry.rows))
        except BadFile as error:
            raise DamagedWeights(str(error)) from error

    def _stored(self, name: str, shape: tuple[int, ...]) -> tuple[str, NDArray[np.uint8]]:
        """The type and bytes of a tensor that is in the file as it is."""
        if name in self._shards:
            shard = self._shards[name]
            entry = shard.entry(name)
            expect_shape(name, entry.shape, shape)
            return entry.dtype, shard.raw(name)
        if name not in self._places:
            raise MissingTensor(f"the weights lack {name}")
        data, place = self._places[name]
        expect_shape(name, place.shape, shape)
        return place.dtype, data[place.begin : place.end]
