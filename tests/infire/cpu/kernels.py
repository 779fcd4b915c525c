"""Kernels for tests: libraries for this machine and for AVX2, tensors in and out of them."""

from __future__ import annotations

import os
import platform
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infire.__main__ import default_cache
from infire.kernels.cpu.build import library_path
from infire.kernels.cpu.library import BF16, U12, Library, Matrix, address, aligned
from unweight.strips import grid, pack_bf16, pack_u12

# This machine's own instructions, and what most of x86 has: the portable code, vectors of 8.
MARCHES = ("native", "x86-64-v3") if platform.machine() == "x86_64" else ("native",)


@cache
def library(march: str, threads: int = 2) -> Library:
    return Library(library_path(default_cache(os.environ), march=march), threads)


def bits(tensor: Tensor) -> NDArray[np.uint16]:
    """Of a tensor of bfloat16."""
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


def rows(tensor: Tensor) -> NDArray[np.uint16]:
    """(T, width) bfloat16 as kernels take it: columns padded with zeros to whole vectors."""
    padded = aligned(len(tensor), -(-tensor.shape[1] // 32) * 32, dtype=np.uint16)
    padded[:, : tensor.shape[1]] = bits(tensor)
    return padded


def tensor(of: NDArray[Any], width: int) -> Tensor:
    """(T, width) bfloat16, of its bits or of floats that are rounded to it already."""
    if of.dtype == np.uint16:
        return torch.from_numpy(of.view(np.int16).copy()).view(torch.bfloat16)[:, :width]
    floats = torch.from_numpy(of.copy())[:, :width]
    rounded = floats.bfloat16()
    assert torch.equal(rounded.float().nan_to_num(7.0), floats.nan_to_num(7.0))
    return rounded


def inputs(march: str, tensor: Tensor) -> NDArray[Any]:
    """(T, width) bfloat16 as products of this build read it, padded as `rows`."""
    if library(march).input_dtype == np.uint16:
        return rows(tensor)
    return widened(rows(tensor))


def no_inputs(march: str, count: int, width: int) -> NDArray[Any]:
    """Zeros, where a kernel writes what a product will read."""
    return aligned(count, -(-width // 32) * 32, dtype=library(march).input_dtype)


def widened(of: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The floats of bfloat16's bits."""
    wide: NDArray[np.float32] = (of.astype(np.uint32) << 16).view(np.float32)
    return wide


def number(value: int) -> NDArray[np.int64]:
    return np.array([value], np.int64)


class Packed:
    """A weight matrix in strips, and the arrays it points to."""

    def __init__(self, weight: Tensor, form: str) -> None:
        num_strips, num_groups = grid(*weight.shape)
        pairs = num_groups * 4
        if form == "bf16":
            self.data = pack_bf16(bits(weight))
            self.matrix = Matrix(
                data=address(self.data), format=BF16, num_strips=num_strips, num_pairs=pairs
            )
            return
        self.strips = pack_u12(bits(weight), max_exception_share=1.0, max_size_share=99.0)
        self.matrix = Matrix(
            data=address(self.strips.data),
            format=U12,
            num_strips=num_strips,
            num_pairs=pairs,
            base=address(self.strips.base),
            ptr=address(self.strips.ptr),
            exceptions=address(self.strips.exceptions),
        )
