"""A model's weights in the form that kernels read, in a file that every engine of a host maps.

Made once of a model folder: matrices in strips of BF16 or 12 bits (`unweight.strips`), those with
the same input fused. The file: a magic word, where its table of contents lies, arrays at multiples
of 64 bytes, the table (JSON). Whoever maps it checks all that a kernel relies on.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from infire.kernels.cpu.library import BF16, U12, Matrix, address
from infire.model.config import ModelConfig
from infire.native.parts import MatrixPart, Part, VectorPart, parts
from infire.native.tensors import TensorFiles
from infire.once import make_once
from unweight.check import BadStrips, check
from unweight.strips import (
    EXCEPTION,
    INPUTS,
    Incompressible,
    U12Strips,
    bf16_bytes,
    grid,
    pack_bf16,
    pack_u12,
)

_logger = logging.getLogger(__name__)

FORMATS = ("u12", "bf16")
_MAGIC = b"INFIRE01"  # changes with the layout of this file or of the strips
_ALIGNMENT = 64
_VECTOR_PAD = 32  # values: whole vectors of the kernels may be read to a vector's end


class BadResident(ValueError):
    """A file of resident weights that is not what it should be: it may be deleted."""


class _Array(Struct, frozen=True):
    offset: int
    num_bytes: int


class _Contents(Struct, frozen=True):
    model_digest: str
    arrays: dict[str, _Array]


class Resident:
    """The matrices and vectors of one model, mapped. Alive as long as what points into it."""

    def __init__(
        self, arrays: Mapping[str, NDArray[np.uint8]], config: ModelConfig, path: Path
    ) -> None:
        self._arrays = arrays
        self._path = path
        self._matrices: dict[str, Matrix] = {}
        self._vectors: dict[str, NDArray[np.uint16]] = {}
        for part in parts(config):
            match part:
                case MatrixPart():
                    self._matrices[part.name] = self._matrix(part)
                case VectorPart():
                    self._vectors[part.name] = self._vector(part)

    def matrix(self, name: str) -> Matrix:
        """For a kernel."""
        return self._matrices[name]

    def vector(self, name: str) -> NDArray[np.uint16] | None:
        """Padded with zeros to a multiple of 32; None if the model has no such part."""
        return self._vectors.get(name)

    @property
    def num_bytes(self) -> int:
        """Of all arrays."""
        return sum(array.nbytes for array in self._arrays.values())

    def _matrix(self, part: MatrixPart) -> Matrix:
        num_strips, num_groups = grid(part.num_outputs, part.num_inputs)
        pairs = num_groups * INPUTS // 2
        data = self._array(f"{part.name}.data")
        if f"{part.name}.base" not in self._arrays:
            if data.nbytes != bf16_bytes(part.num_outputs, part.num_inputs):
                raise BadResident(f"{self._path}: {part.name} has {data.nbytes} bytes")
            return Matrix(data=address(data), format=BF16, num_strips=num_strips, num_pairs=pairs)
        strips = U12Strips(
            data=data,
            base=self._array(f"{part.name}.base"),
            ptr=self._array(f"{part.name}.ptr").view(np.int32),
            exceptions=self._array(f"{part.name}.exceptions").view(EXCEPTION),
            num_outputs=part.num_outputs,
            num_inputs=part.num_inputs,
        )
        try:
            check(strips)
        except BadStrips as error:
            raise BadResident(f"{self._path}: {part.name}: {error}") from error
        return Matrix(
            data=address(data),
            format=U12,
            num_strips=num_strips,
            num_pairs=pairs,
            base=address(strips.base),
            ptr=address(strips.ptr),
            exceptions=address(strips.exceptions),
        )

    def _vector(self, part: VectorPart) -> NDArray[np.uint16]:
        vector = self._array(part.name).view(np.uint16)
        if len(vector) != _padded(part.size):
            raise BadResident(f"{self._path}: {part.name} has {len(vector)} values")
        return vector

    def _array(self, name: str) -> NDArray[np.uint8]:
        if name not in self._arrays:
            raise BadResident(f"{self._path} lacks {name}")
        return self._arrays[name]


def resident(
    folder: Path, config: ModelConfig, model_digest: str, *, form: str, cache: Path, threads: int
) -> Resident:
    """The weights of a model folder in the form "u12" or "bf16", out of `cache`; made there first
    if need be, by one process of all that ask; a damaged file there is made anew. Raises
    `BadModel` for weights that cannot be served, OSError where the cache cannot be written."""
    path = cache / "resident" / f"{model_digest[:32]}.{form}"

    def make(made: Path) -> None:
        write(made, folder, config, model_digest, form=form, threads=threads)

    try:
        return read(make_once(path, make), config, model_digest)
    except BadResident as error:
        _logger.warning("made anew: %s", error)
        path.unlink(missing_ok=True)
        return read(make_once(path, make), config, model_digest)


def write(
    path: Path, folder: Path, config: ModelConfig, model_digest: str, *, form: str, threads: int
) -> None:
    """Pack the weights of a model folder into a new file; a part at a time is in memory."""
    tensors = TensorFiles(folder, threads=threads)
    arrays: dict[str, _Array] = {}
    with path.open("xb") as file:
        file.write(bytes(_ALIGNMENT))
        for part in parts(config):
            for name, array in _packed(part, tensors, form, threads).items():
                offset = _append(file, array)
                arrays[name] = _Array(offset, array.nbytes)
        contents = msgspec.json.encode(_Contents(model_digest, arrays))
        end = file.tell()
        file.write(contents)
        file.seek(0)
        file.write(_MAGIC + end.to_bytes(8, "little") + len(contents).to_bytes(8, "little"))


def read(path: Path, config: ModelConfig, model_digest: str) -> Resident:
    """Map a file that `write` has made for this model. Raises `BadResident`."""
    with path.open("rb") as file:
        if not file.seek(0, 2):
            raise BadResident(f"{path} is empty")
        content = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    head = content[:_ALIGNMENT].tobytes()
    begin, length = int.from_bytes(head[8:16], "little"), int.from_bytes(head[16:24], "little")
    if head[:8] != _MAGIC or begin + length != len(content):
        raise BadResident(f"{path} is no file of resident weights, or cut short")
    try:
        contents = msgspec.json.decode(content[begin:].tobytes(), type=_Contents)
    except msgspec.DecodeError as error:
        raise BadResident(f"{path}: {error}") from error
    if contents.model_digest != model_digest:
        raise BadResident(f"{path} is of model {contents.model_digest}, not {model_digest}")
    arrays = {}
    for name, array in contents.arrays.items():
        end = array.offset + array.num_bytes
        if array.offset % _ALIGNMENT or not _ALIGNMENT <= array.offset <= end <= begin:
            raise BadResident(f"{path}: {name} at {array.offset} to {end} of {begin} bytes")
        arrays[name] = content[array.offset : end]
    return Resident(arrays, config, path)


def _packed(
    part: Part, tensors: TensorFiles, form: str, threads: int
) -> dict[str, NDArray[np.generic]]:
    """The arrays of a part, by name."""
    if isinstance(part, VectorPart):
        vector = np.zeros(_padded(part.size), np.uint16)
        vector[: part.size] = tensors.stack(part.tensors)
        return {part.name: vector}
    weights = tensors.stack(part.tensors, part.num_inputs)
    if form == "u12":
        try:
            strips = pack_u12(weights, threads=threads)
        except Incompressible:
            pass
        else:
            return {
                f"{part.name}.data": strips.data,
                f"{part.name}.base": strips.base,
                f"{part.name}.ptr": strips.ptr,
                f"{part.name}.exceptions": strips.exceptions,
            }
    return {f"{part.name}.data": pack_bf16(weights, threads=threads)}


def _padded(size: int) -> int:
    return -(-size // _VECTOR_PAD) * _VECTOR_PAD


def _append(file: BinaryIO, array: NDArray[np.generic]) -> int:
    """Where it lies now."""
    file.write(bytes(-file.tell() % _ALIGNMENT))
    offset = file.tell()
    file.write(np.ascontiguousarray(array).view(np.uint8).data)
    return offset
