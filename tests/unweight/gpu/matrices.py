"""Weights as trained ones are spread, with all that can be hard about them planted."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gaussian(num_outputs: int, num_inputs: int, seed: int = 0) -> NDArray[np.uint16]:
    """Normal weights of another scale in every row, cut to BF16: (N, K)."""
    random = np.random.default_rng(seed)
    scales = random.lognormal(-4, 0.4, (num_outputs, 1))
    values = (random.normal(size=(num_outputs, num_inputs)) * scales).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def hard(num_outputs: int, num_inputs: int, seed: int = 0) -> NDArray[np.uint16]:
    """As `gaussian`, with rows of zeros of both signs, subnormals and outliers, all finite."""
    weights = gaussian(num_outputs, num_inputs, seed)
    random = np.random.default_rng(seed + 1)
    weights[random.integers(num_outputs)] = 0
    weights[random.integers(num_outputs)] = 0x8000
    planted = [0x0000, 0x8000, 0x0001, 0x807F, 0x4214, 0xC248, 0x0DA2, 0x3F80]
    for word in planted:
        weights[random.integers(num_outputs), random.integers(num_inputs)] = word
    weights[-1, -1] = 0xC110  # -9, in the last corner
    return weights


def as_tensor(weights: NDArray[np.uint16]) -> Tensor:
    """The same bits as bf16, on the device that is tested."""
    return torch.from_numpy(weights.view(np.int16)).view(torch.bfloat16).to(DEVICE)


def bits(values: Tensor) -> NDArray[np.uint16]:
    """The bits of bf16."""
    return values.contiguous().cpu().view(torch.int16).numpy().view(np.uint16)
