"""A weight matrix with the pipelines that multiply by it. Knows no model.

Where a matrix is: in BF16, in 12-bit tiles, or asleep in host memory, entropy coded. How a product
with it is computed: as its plan says for that many rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import linear

from unweight.gpu.matmul import Workspace, u12_matmul
from unweight.gpu.plans import Pipeline, ShapePlan
from unweight.gpu.rest import Resting
from unweight.gpu.rows import take_rows
from unweight.gpu.scratch import unpack_on_device
from unweight.gpu.weight import DeviceTiles

Weight: TypeAlias = Tensor | DeviceTiles | Resting  # a Tensor is (N, K) bf16


@dataclass(slots=True)
class Scratch:
    """What products on one device share, as long as they run one after the other on one stream."""

    workspace: Workspace
    decoded: Tensor  # (at least N * K of the largest matrix,) bf16, or empty: then it grows

    def room(self, num_outputs: int, num_inputs: int) -> Tensor:
        """(N, K) bf16 of it. It grows as needed, which must not be while a CUDA graph is captured:
        `reserve` before."""
        self.reserve(num_outputs * num_inputs)
        return self.decoded[: num_outputs * num_inputs].view(num_outputs, num_inputs)

    def reserve(self, num_weights: int) -> None:
        """Room to decode a matrix of so many weights."""
        if num_weights > len(self.decoded):
            self.decoded = self.decoded.new_empty(num_weights)


def new_scratch(device: torch.device) -> Scratch:
    """Empty."""
    return Scratch(Workspace(device), torch.empty(0, dtype=torch.bfloat16, device=device))


class Linear:
    """y = x @ W.T, by the pipeline that the plan has for the number of rows of x.

    For as many rows as the plan has fused, a row of y is the same bits in any batch. Decoded, y is
    bit for bit the vendor's product of the BF16 matrix.
    """

    def __init__(self, weight: Weight, plan: ShapePlan, scratch: Scratch) -> None:
        self._weight = weight
        self._plan = plan
        self._scratch = scratch

    @property
    def asleep(self) -> bool:
        """Whether the matrix is in host memory."""
        return isinstance(self._weight, Resting)

    def sleep(self) -> None:
        """Give the device's memory back; until `wake`, every product transcodes the matrix."""
        if isinstance(self._weight, DeviceTiles):
            self._weight = Resting.of(self._weight)

    def wake(self) -> None:
        """Back to tiles on the device."""
        if isinstance(self._weight, Resting):
            self._weight = self._weight.wake()

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """(M, N) bf16 of x (M, K) bf16."""
        match self._weight:
            case Tensor():
                return self._dense(x, self._weight, out)
            case Resting():
                return self._from_tiles(x, self._weight.wake(), out)
            case DeviceTiles():
                return self._from_tiles(x, self._weight, out)

    def rows(self, ids: Tensor) -> Tensor:
        """(M, K) bf16, rows of W by id: of a tied output matrix, the embeddings of ids (M,)."""
        match self._weight:
            case Tensor():
                return self._weight[ids]
            case Resting():
                return take_rows(self._weight.wake(), ids)
            case DeviceTiles():
                return take_rows(self._weight, ids)

    def _from_tiles(self, x: Tensor, tiles: DeviceTiles, out: Tensor | None) -> Tensor:
        choice = self._plan.choice(len(x))
        if choice.pipeline is Pipeline.FUSED and choice.launch is not None:
            return u12_matmul(
                x,
                tiles,
                launch=choice.launch,
                split=self._plan.split,
                workspace=self._scratch.workspace,
                out=out,
            )
        room = self._scratch.room(tiles.num_outputs, tiles.num_inputs)
        return self._dense(x, unpack_on_device(tiles, out=room), out)

    def _dense(self, x: Tensor, weights: Tensor, out: Tensor | None) -> Tensor:
        if out is None:
            return linear(x, weights)
        return torch.mm(x, weights.T, out=out)
