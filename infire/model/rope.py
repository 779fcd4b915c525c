"""How fast rotary embeddings turn. Numbers only: knows no tensors."""

from __future__ import annotations

import math

from infire.model.config import Llama3Scaling, RopeConfig


def rope_frequencies(config: RopeConfig, head_dim: int) -> list[float]:
    """Radians a token, of each of the head_dim / 2 pairs of a head."""
    frequencies = [
        1.0 / (config.stretch * config.theta ** (n / head_dim)) for n in range(0, head_dim, 2)
    ]
    if config.llama3 is None:
        return frequencies
    return [_scaled(frequency, config.llama3) for frequency in frequencies]


def _scaled(frequency: float, scaling: Llama3Scaling) -> float:
    """Llama 3.1's: https://github.com/meta-llama/llama-models, `apply_scaling`."""
    turns = scaling.original_context * frequency / (2 * math.pi)  # in the trained context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = min(max((turns - low) / (high - low), 0.0), 1.0)  # 1: as trained, 0: slowed
    return frequency * (kept + (1 - kept) / scaling.factor)
