"""What this machine's memory and arithmetic would allow, were nothing else in the way.

Both are measured: how fast threads read memory that no cache holds, and how fast torch multiplies
matrices of the model's own sizes, in BF16 or in FP32, whichever is faster here. A step takes at
least the longer of the two.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

READ_BYTES = 256 << 20  # each thread's own: far beyond any cache
PASSES = 8  # of which the best counts: others use the machine, too
GEMM_TOKENS = 512  # rows of the activations: a prefill step
GEMM_PASSES, GEMM_S = 32, 3.0  # at most so many, begun within so long: BF16 is slow on some
GEMM_DTYPES = {"BF16": "bfloat16", "FP32": "float32"}  # as torch names them
HEADER_BYTES = 8  # of a safetensors file: the length of its JSON, little-endian


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    read_rate: float  # bytes a second, all threads together
    gemm_rate: float | None  # FLOP a second; None without torch
    gemm_dtype: str = "BF16"  # in which it was that fast

    def or_better(self, other: Machine) -> Machine:
        """The better of two measurements, figure by figure: others use the machine, too."""
        faster = max(self, other, key=lambda one: one.gemm_rate or 0.0)
        read_rate = max(self.read_rate, other.read_rate)
        return Machine(
            read_rate=read_rate, gemm_rate=faster.gemm_rate, gemm_dtype=faster.gemm_dtype
        )

    def __str__(self) -> str:
        """Both rates, as a sentence's part."""
        gemm = f"{self.gemm_rate / 1e9:.0f} GFLOP/s" if self.gemm_rate else "not measured"
        read = f"memory is read at {self.read_rate / 1e9:.1f} GB/s"
        return f"{read}, torch's {self.gemm_dtype} GEMM: {gemm}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What one token costs."""

    layer_weights: int  # in matrices of the layers
    head_weights: int  # in the matrix of the logits
    layer_shapes: tuple[tuple[int, int], ...]  # (outputs, inputs) of one layer's matrices
    num_layers: int
    kv_bytes: int  # a token of context
    attention_flops: int  # a token of output and a token of context

    def step_s(self, machine: Machine, *, batch: int, context: int, weight_bytes: float) -> float:
        """The least that a decode step of `batch` sequences of `context` tokens can take."""
        weights = self.layer_weights + self.head_weights
        num_bytes = weights * weight_bytes + batch * context * self.kv_bytes
        flops = batch * (2 * weights + context * self.attention_flops)
        arithmetic_s = flops / machine.gemm_rate if machine.gemm_rate else 0.0
        return max(num_bytes / machine.read_rate, arithmetic_s)

    def prefill_s(self, machine: Machine, num_tokens: int) -> float:
        """The least that a prompt can take: logits of its last token, causal attention."""
        flops = num_tokens * 2 * self.layer_weights + 2 * self.head_weights
        flops += num_tokens * (num_tokens + 1) // 2 * self.attention_flops
        return flops / machine.gemm_rate if machine.gemm_rate else 0.0


def read_model(folder: Path) -> Model:
    """From the configuration and the headers of the weights of a model folder."""
    config = json.loads((folder / "config.json").read_text())
    shapes = {
        name: tuple(tensor["shape"])
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in _header(file).items()
        if name != "__metadata__" and len(tensor["shape"]) == 2
    }
    layers = {name: shape for name, shape in shapes.items() if ".layers." in name}
    head = shapes.get("lm_head.weight") or shapes["model.embed_tokens.weight"]
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    kv_values = 2 * config.get("num_key_value_heads", heads) * head_size
    num_layers = config["num_hidden_layers"]
    return Model(
        layer_weights=sum(math.prod(shape) for shape in layers.values()),
        head_weights=math.prod(head),
        layer_shapes=tuple(
            (shape[0], shape[1]) for name, shape in layers.items() if ".layers.0." in name
        ),
        num_layers=num_layers,
        kv_bytes=2 * kv_values * num_layers,
        attention_flops=4 * heads * head_size * num_layers,  # two products of 2 FLOP a value
    )


def measure_machine(model: Model, threads: int) -> Machine:
    """Takes up to ten seconds, and 256 MiB a thread."""
    read_rate = _read_rate(threads)
    if find_spec("torch") is None:
        return Machine(read_rate=read_rate, gemm_rate=None)
    rates = {name: _gemm_rate(model, threads, dtype) for name, dtype in GEMM_DTYPES.items()}
    best = max(rates, key=lambda name: rates[name])
    return Machine(read_rate=read_rate, gemm_rate=rates[best], gemm_dtype=best)


def measure_apart(model: Model, threads: int) -> Machine:
    """`measure_machine` in a process of its own, with which its memory and torch's threads go."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure_machine, model, threads).result()


def _read_rate(threads: int) -> float:
    """By the C library's memchr for a byte that is not there: it reads vectors, writes nothing."""
    find = ctypes.CDLL(None).memchr
    find.restype = ctypes.c_void_p
    find.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    areas = [_area() for _ in range(threads)]
    views = [(ctypes.c_char * READ_BYTES).from_buffer(area) for area in areas]
    best_s = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(PASSES):
            began = perf_counter()
            list(pool.map(lambda view: find(ctypes.addressof(view), 1, READ_BYTES), views))
            best_s = min(best_s, perf_counter() - began)
    return threads * READ_BYTES / best_s


def _area() -> mmap.mmap:
    """Memory of its own, in huge pages where the system has them, and touched."""
    area = mmap.mmap(-1, READ_BYTES)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    ctypes.memset((ctypes.c_char * READ_BYTES).from_buffer(area), 2, READ_BYTES)
    return area


def _gemm_rate(model: Model, threads: int, dtype: str) -> float:
    import torch  # seconds, and only here

    torch.set_num_threads(threads)
    pairs = [
        tuple(torch.randn(size, k).to(getattr(torch, dtype)) for size in (GEMM_TOKENS, n))
        for n, k in model.layer_shapes
    ]
    best_s, until = math.inf, perf_counter() + GEMM_S
    for _ in range(GEMM_PASSES):
        began = perf_counter()
        if began > until and best_s < math.inf:
            break
        for rows, weight in pairs:
            torch.nn.functional.linear(rows, weight)
        best_s = min(best_s, perf_counter() - began)
    return 2 * GEMM_TOKENS * sum(n * k for n, k in model.layer_shapes) / best_s


def _header(file: Path) -> dict[str, dict[str, list[int]]]:
    """Of a safetensors file: tensors by name. https://huggingface.co/docs/safetensors"""
    with file.open("rb") as opened:
        num_bytes = int.from_bytes(opened.read(HEADER_BYTES), "little")
        header: dict[str, dict[str, list[int]]] = json.loads(opened.read(num_bytes))
        return header
