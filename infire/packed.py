"""A model's matrices in 12-bit tiles on its device, one at a time through BF16. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path

import torch
from torch import Tensor

from infire.weights import WeightFiles
from unweight.gpu.linear import Linear, new_scratch
from unweight.gpu.pack import pack_on_device
from unweight.gpu.plans import Plans, find
from unweight.strips import Incompressible


class PackedWeights:
    """As `WeightFiles`, with matrices as `unweight` has them. What does not pay in 12 bits stays in
    BF16. All products are for one stream."""

    def __init__(self, files: WeightFiles, device: torch.device, plans: Plans) -> None:
        self._files = files
        self._plans = plans
        self._scratch = new_scratch(device)

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of that name; raises `MissingTensor`, `WrongShape`."""
        return self._files.take(name, *shape)

    def matrices(self, tensors: Seq[tuple[str, int]], num_inputs: int) -> list[Tensor | Linear]:
        """One, of all stacked: a launch less for each of the others."""
        dense = self._files.matrices(tensors, num_inputs)
        stacked = dense[0] if len(dense) == 1 else torch.cat(dense)
        del dense
        try:
            tiles = pack_on_device(stacked)
        except Incompressible:
            return [stacked]
        return [Linear(tiles, self._plans.plan(*stacked.shape), self._scratch)]


def plans_for(device: torch.device, cache: Path | None) -> Plans:
    """Of this GPU: measured here and kept in `cache`, else shipped, else rules of thumb. Raises
    `BadPlans`."""
    folders = [] if cache is None else [cache / "plans"]
    return find(torch.cuda.get_device_name(device), *folders)
