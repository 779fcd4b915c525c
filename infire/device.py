"""Where and in which type to compute: what this machine can do, found out by trying."""

from __future__ import annotations

import sys

import torch

# As torch.cpu.get_capabilities names them, of x86 and of ARM.
BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")


class NoDevice(RuntimeError):
    """The device that was asked for does not work here."""


def choose_device(name: str) -> tuple[torch.device, str | None]:
    """The device of that name; "auto" takes a GPU that works, else the CPU and says why.

    Raises `NoDevice` for "cuda" where none works.
    """
    if name == "cpu":
        return torch.device("cpu"), None
    if name not in ("auto", "cuda"):
        raise NoDevice(f"device {name!r} is not one of auto, cpu, cuda")
    trouble = _cuda_trouble()
    if trouble is None:
        return torch.device("cuda", 0), None
    if name == "cuda":
        raise NoDevice(trouble)
    return torch.device("cpu"), trouble


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of that name, "auto" taking the one that `device` computes in fast.

    The same on every call on one machine, whatever else runs there: prefill and decode workers that
    disagreed could hand each other no KV. So nothing is timed.
    """
    match name:
        case "bfloat16":
            return torch.bfloat16
        case "float32":
            return torch.float32
        case "auto" if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        case "auto":
            return torch.bfloat16 if _cpu_computes_bfloat16() else torch.float32
        case _:
            raise ValueError(f"dtype {name!r} is not one of auto, bfloat16, float32")


def _cuda_trouble() -> str | None:
    """Why CUDA cannot be used, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    try:
        torch.ones(2, device="cuda").sum().item()
    except RuntimeError as error:
        return f"the CUDA device fails: {str(error).splitlines()[0]}"
    return None


def _cpu_computes_bfloat16() -> bool:
    """Whether it has instructions for it; without, bfloat16 is widened first and slower.

    On macOS torch hands float32 to Apple's Accelerate and computes bfloat16 itself, slowly.
    """
    if sys.platform == "darwin":
        return False
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in BFLOAT16_INSTRUCTIONS)
