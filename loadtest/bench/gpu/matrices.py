"""The matrices of Llama-3.1-8B, with weights as trained ones are spread, and copies of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unweight.gpu.weight import DeviceTiles

SHAPES = {  # outputs, inputs
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "lm_head": (128256, 4096),
}
LAYER = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True, slots=True)
class Copies:
    """One matrix, so many times that none of it is left in L2 when its turn comes again."""

    dense: list[Tensor]  # (N, K) bf16
    tiles: list[DeviceTiles]


def weights(num_outputs: int, num_inputs: int, seed: int, device: torch.device) -> Tensor:
    """Normal with a scale to each row, and a few outliers: (N, K) bf16."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    spread = normal(num_outputs, num_inputs).mul_(normal(num_outputs, 1).mul_(0.35).exp_())
    made = spread.mul_(0.02).bfloat16()
    made[3, 17], made[min(70, num_outputs - 1), 90], made[-1, -1] = 0.0, 37.0, -50.0
    return made


def copies(dense: Tensor, tiles: DeviceTiles, number: int) -> Copies:
    """Of words and of weights; the small arrays are shared."""
    return Copies(
        dense=[dense, *(dense.clone() for _ in range(number - 1))],
        tiles=[tiles, *(_with_own_words(tiles) for _ in range(number - 1))],
    )


def _with_own_words(tiles: DeviceTiles) -> DeviceTiles:
    return DeviceTiles(
        words=tiles.words.clone(),
        base=tiles.base,
        first_base=tiles.first_base,
        ptr=tiles.ptr,
        exceptions=tiles.exceptions,
        num_outputs=tiles.num_outputs,
        num_inputs=tiles.num_inputs,
    )
