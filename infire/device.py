"""Where and in which type to compute: what this machine can do, found out by trying."""

from __future__ import annotations

from time import perf_counter

import torch
from torch.nn.functional import linear

_TRIAL_S = 0.1  # for each of the two types
_TRIAL_ROWS = 32


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


def choose_dtype(name: str, device: torch.device, hidden_size: int, inner_size: int) -> torch.dtype:
    """The type of that name, "auto" taking the faster one on `device`.

    On CPU it is timed, for at most 0.2 s, on a layer of the model's own size: not every CPU
    computes in bfloat16, and some do so slowly.
    """
    match name:
        case "bfloat16":
            return torch.bfloat16
        case "float32":
            return torch.float32
        case "auto" if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        case "auto":
            kinds = (torch.bfloat16, torch.float32)
            return min(kinds, key=lambda kind: _trial_s(kind, hidden_size, inner_size))
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


def _trial_s(dtype: torch.dtype, hidden_size: int, inner_size: int) -> float:
    """Seconds of the fastest pass through one layer."""
    weight = torch.ones(inner_size, hidden_size, dtype=dtype)
    x = torch.ones(_TRIAL_ROWS, hidden_size, dtype=dtype)
    fastest = float("inf")
    began = now = perf_counter()
    while now - began < _TRIAL_S:
        linear(x, weight)
        before, now = now, perf_counter()
        fastest = min(fastest, now - before)
    return fastest
