"""Matrices with weights as trained ones are spread, where no trained model is at hand.

Each row is normal with a scale of its own, log-normal around 0.02 (sigma 0.35), as the rows of
trained linear layers are to a first approximation. Knows no layout.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from unweight.rounding import to_bf16

LAYERS = {
    "llama-3.1-8b-layer": {  # outputs, inputs
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (1024, 4096),
        "self_attn.v_proj": (1024, 4096),
        "self_attn.o_proj": (4096, 4096),
        "mlp.gate_proj": (14336, 4096),
        "mlp.up_proj": (14336, 4096),
        "mlp.down_proj": (4096, 14336),
    }
}


def synthetic(layer: str, seed: int = 0) -> Iterator[tuple[str, NDArray[np.uint16]]]:
    """Names and the bits (N, K) of BF16 of a layer's matrices, the same every time."""
    for n, (name, shape) in enumerate(LAYERS[layer].items()):
        yield f"{name}.weight", trained_like(*shape, seed=seed + n)


def trained_like(num_outputs: int, num_inputs: int, *, seed: int) -> NDArray[np.uint16]:
    """The bits (N, K) of BF16."""
    random = np.random.default_rng(seed)
    scales = 0.02 * np.exp(0.35 * random.standard_normal((num_outputs, 1), np.float32))
    bits = np.empty((num_outputs, num_inputs), np.uint16)
    step = max(1, (1 << 22) // num_inputs)
    for first in range(0, num_outputs, step):
        own = scales[first : first + step]
        rows = random.standard_normal((len(own), num_inputs), np.float32)
        bits[first : first + step] = to_bf16(rows * own)
    return bits
