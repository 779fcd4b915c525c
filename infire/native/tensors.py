"""Tensors by name as bfloat16, out of the safetensors files of a model folder, without torch.

The format: https://huggingface.co/docs/safetensors. Knows no model.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from infire.model.config import MissingFile
from infire.weight_files import DamagedWeights, MissingTensor, WrongShape, weight_paths

_LONGEST_HEADER = 100 << 20  # bytes, as the format's own reader has it


class _Entry(Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]  # from the end of the header


class TensorFiles:
    """The tensors of a folder, read from mapped files when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._places: dict[str, tuple[NDArray[np.uint8], _Entry]] = {}
        for path in weight_paths(folder):
            content, entries = _read(path)
            self._places |= {name: (content, entry) for name, entry in entries.items()}

    def take(self, name: str, *shape: int) -> NDArray[np.uint16]:
        """The bits of bfloat16, rounded to nearest even where the file has more of them.

        Raises `MissingTensor`, `WrongShape`, `DamagedWeights`.
        """
        if name not in self._places:
            raise MissingTensor(f"the weights lack {name}")
        content, entry = self._places[name]
        if entry.shape != shape:
            raise WrongShape(f"{name} is {entry.shape}, and the configuration says {shape}")
        begin, end = entry.data_offsets
        data = content[begin:end]
        match entry.dtype:
            case "BF16":
                bits = data.view(np.uint16)
            case "F32":
                bits = rounded(data.view(np.float32))
            case "F16":
                bits = rounded(data.view(np.float16).astype(np.float32))
            case other:
                raise DamagedWeights(f"{name} is of type {other}, not BF16, F16 or F32")
        return bits.reshape(shape)


def rounded(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    words = values.view(np.uint32)
    nearest = (words + (0x7FFF + (words >> 16 & 1))) >> 16
    return np.where(np.isnan(values), words >> 16 | 0x40, nearest).astype(np.uint16)


def _read(path: Path) -> tuple[NDArray[np.uint8], dict[str, _Entry]]:
    """What follows the header of a file, mapped, and where each tensor lies in it."""
    try:
        with path.open("rb") as file:
            content = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except FileNotFoundError as error:
        raise MissingFile(f"{path} is missing") from error
    except (OSError, ValueError) as error:  # as of an empty file
        raise DamagedWeights(f"{path} cannot be read: {error}") from error
    length = int.from_bytes(content[:8].tobytes(), "little")
    if not 0 < length <= min(len(content) - 8, _LONGEST_HEADER):
        raise DamagedWeights(f"{path} is damaged or cut short: header of {length} bytes")
    try:
        entries = msgspec.json.decode(
            content[8 : 8 + length].tobytes(), type=dict[str, msgspec.Raw]
        )
        entries.pop("__metadata__", None)
        found = {name: msgspec.json.decode(raw, type=_Entry) for name, raw in entries.items()}
    except msgspec.DecodeError as error:
        raise DamagedWeights(f"{path} is damaged: {error}") from error
    data = content[8 + length :]
    for name, entry in found.items():
        begin, end = entry.data_offsets
        size = int(np.prod(entry.shape, dtype=np.int64)) * _BYTES.get(entry.dtype, 0)
        if not 0 <= begin <= end <= len(data) or (entry.dtype in _BYTES and end - begin != size):
            raise DamagedWeights(
                f"{path} is damaged or cut short: {name} at {begin} to {end} of {len(data)} bytes"
            )
    return data, found


_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
