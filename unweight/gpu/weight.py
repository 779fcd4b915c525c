"""A weight matrix in 12-bit tiles on a device. Knows the layout and torch, not how it is used."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unweight.tiles import CHUNK, OUTPUTS, U12Tiles, grid


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceTiles:
    """The arrays of `U12Tiles` on one device, words as the signed ones of torch.

    R = ceil(N / 64) blocks of outputs, T = ceil(K / 128) tiles in each, C = ceil(K / 1024) chunks.
    """

    words: Tensor  # (R, T, 3, 64, 16) int32
    base: Tensor  # (64 * R,) uint8, or (32 * R,) of nibbles
    first_base: int
    ptr: Tensor  # (R * C + 1,) int32
    exceptions: Tensor  # (E,) int32
    num_outputs: int  # N
    num_inputs: int  # K

    @property
    def nibbles(self) -> bool:
        """Whether bases are in 4 bits."""
        return len(self.base) < self.words.shape[0] * OUTPUTS

    @property
    def num_bytes(self) -> int:
        """Of all four arrays."""
        arrays = (self.words, self.base, self.ptr, self.exceptions)
        return sum(array.nbytes for array in arrays)

    @property
    def num_chunks(self) -> int:
        """C, the chunks of a block in which exceptions are listed."""
        return -(-self.num_inputs // CHUNK)

    def to_host(self) -> U12Tiles:
        """A copy in numpy's memory."""
        return U12Tiles(
            words=self.words.cpu().numpy().view(np.uint32),
            base=self.base.cpu().numpy(),
            first_base=self.first_base,
            ptr=self.ptr.cpu().numpy(),
            exceptions=self.exceptions.cpu().numpy().view(np.uint32),
            num_outputs=self.num_outputs,
            num_inputs=self.num_inputs,
        )


def to_device(tiles: U12Tiles, device: torch.device) -> DeviceTiles:
    """The same matrix on a device. Arrays that come from a file are for `check_tiles` first."""
    assert tiles.words.shape[:2] == grid(tiles.num_outputs, tiles.num_inputs)[:2]
    return DeviceTiles(
        words=torch.from_numpy(tiles.words.view(np.int32)).to(device),
        base=torch.from_numpy(tiles.base).to(device),
        first_base=tiles.first_base,
        ptr=torch.from_numpy(tiles.ptr).to(device),
        exceptions=torch.from_numpy(tiles.exceptions.view(np.int32)).to(device),
        num_outputs=tiles.num_outputs,
        num_inputs=tiles.num_inputs,
    )
