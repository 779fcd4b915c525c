"""What the device can do at most: bytes a second, and products a second."""

from __future__ import annotations

import torch

from unweight.gpu.timing import time_us


def copy_tb_s(device: torch.device, num_bytes: int = 4 << 30) -> float:
    """Terabytes a second, read and written, of a large element-wise copy."""
    source = torch.zeros(num_bytes // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    us = time_us(lambda _: torch.add(source, 1, out=target), num_copies=2, rounds=5)
    return 2 * num_bytes / us / 1e6


def matmul_tflop_s(device: torch.device, size: int = 8192) -> float:
    """Of a large BF16 product of random numbers, as the vendor's library has it."""
    one, other = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(one)
    us = time_us(lambda _: torch.mm(one, other, out=out), num_copies=4, rounds=5)
    return float(2 * size**3 / us / 1e6)
