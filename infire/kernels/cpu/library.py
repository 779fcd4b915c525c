"""The compiled kernels as Python sees them: what each operation is given, and a pool that runs a
pass of them. Mirrors `ops.h`; knows no model and no torch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Seq
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray


class Kind(IntEnum):
    """Of operation; in the order of `ops.h`."""

    EMBED = 0
    NORM = 1
    LINEAR = 2
    SILU = 3
    ROPE = 4
    ATTENTION = 5
    HEAD = 6
    SAMPLE = 7


class Step(Structure):
    """What changes from step to step, at one address for the life of an engine."""

    _fields_: ClassVar = [
        ("num_tokens", c_int64),
        ("num_sampled", c_int64),
        ("num_spans", c_int64),
        ("num_requests", c_int64),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("spans", c_void_p),
        ("sampled", c_void_p),
    ]


class Tables(Structure):
    """The block tables of one KV group: blocks (slots, width) int32."""

    _fields_: ClassVar = [
        ("blocks", c_void_p),
        ("width", c_int64),
        ("block_tokens", c_int64),
        ("window", c_int64),
        ("chunked", c_int64),
    ]


class Matrix(Structure):
    """(N, K) weights in strips of 16 outputs; see unweight/README.md."""

    _fields_: ClassVar = [
        ("data", c_void_p),
        ("format", c_int64),
        ("num_strips", c_int64),
        ("num_pairs", c_int64),
        ("base", c_void_p),
        ("ptr", c_void_p),
        ("exceptions", c_void_p),
    ]


BF16, U12 = 0, 1  # Matrix.format
MAX_HEAD_DIM = 256  # of attention


class EmbedArgs(Structure):
    _fields_: ClassVar = [
        ("step", c_void_p),
        ("table", c_void_p),
        ("out", c_void_p),
        ("ld_out", c_int64),
    ]


class NormArgs(Structure):
    _fields_: ClassVar = [
        ("num_rows", c_void_p),
        ("index", c_void_p),
        ("x", c_void_p),
        ("delta", c_void_p),
        ("ld_x", c_int64),
        ("weight", c_void_p),
        ("eps", c_double),
        ("size", c_int64),
        ("out", c_void_p),
        ("ld_out", c_int64),
        ("keep", c_int64),
    ]


class LinearArgs(Structure):
    _fields_: ClassVar = [
        ("num_rows", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("x", c_void_p),
        ("ld_x", c_int64),
        ("y", c_void_p),
        ("ld_y", c_int64),
    ]


class SiluArgs(Structure):
    _fields_: ClassVar = [
        ("num_rows", c_void_p),
        ("x", c_void_p),
        ("ld_x", c_int64),
        ("size", c_int64),
        ("out", c_void_p),
        ("ld_out", c_int64),
    ]


class RopeArgs(Structure):
    _fields_: ClassVar = [
        ("step", c_void_p),
        ("tables", c_void_p),
        ("qkv", c_void_p),
        ("ld_qkv", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("eps", c_double),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
    ]


class AttentionArgs(Structure):
    _fields_: ClassVar = [
        ("step", c_void_p),
        ("tables", c_void_p),
        ("qkv", c_void_p),
        ("ld_qkv", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("k", c_void_p),
        ("v", c_void_p),
        ("scale", c_double),
        ("out", c_void_p),
        ("ld_out", c_int64),
    ]


class SampleArgs(Structure):
    _fields_: ClassVar = [
        ("num_rows", c_void_p),
        ("rows", c_void_p),
        ("num_sampled", c_void_p),
        ("vocabulary", c_int64),
        ("logits", c_void_p),
        ("candidates", c_void_p),
        ("ids", c_void_p),
        ("num_ids", c_void_p),
        ("logprobs", c_void_p),
        ("most_top", c_int64),
        ("top_ids", c_void_p),
        ("top_logprobs", c_void_p),
    ]


class HeadArgs(Structure):
    _fields_: ClassVar = [
        ("num_rows", c_void_p),
        ("weight", c_void_p),
        ("x", c_void_p),
        ("ld_x", c_int64),
        ("vocabulary", c_int64),
        ("limits", c_void_p),
        ("logits", c_void_p),
        ("candidates", c_void_p),
    ]


class _Entry(Structure):
    _fields_: ClassVar = [("kind", c_int64), ("args", c_void_p)]


def address(of: NDArray[Any] | Structure | None) -> int | None:
    """Where it lies in memory; whoever passes it on keeps it alive."""
    if of is None or isinstance(of, Structure):
        return None if of is None else ctypes.addressof(of)
    place: int = of.ctypes.data
    return place


def aligned(*shape: int, dtype: Any) -> NDArray[Any]:
    """Zeros that begin at a multiple of 64 bytes; pages are taken when they are written."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(count + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    array: NDArray[Any] = memory[begin : begin + count].view(dtype).reshape(shape)
    return array


class Tape:
    """The operations of one pass, in order, with what they are given."""

    def __init__(self, operations: Seq[tuple[Kind, Structure]]) -> None:
        self._args = [args for _, args in operations]  # kept alive
        self.kinds = [kind for kind, _ in operations]
        self.entries = (_Entry * len(operations))(
            *[_Entry(int(kind), ctypes.addressof(args)) for kind, args in operations]
        )
        self.nanoseconds = np.zeros(len(operations), np.int64)  # of each, where it is asked for


class Library:
    """The compiled kernels, and threads to run them."""

    def __init__(self, path: Path, num_threads: int) -> None:
        self._dll = dll = ctypes.CDLL(str(path))
        dll.infire_new_pool.restype = c_void_p
        dll.infire_new_pool.argtypes = [c_int64]
        dll.infire_free_pool.argtypes = [c_void_p]
        dll.infire_run.argtypes = [c_void_p, POINTER(_Entry), c_int64, c_int64, c_void_p]
        dll.infire_run.restype = None
        dll.infire_instructions.restype = ctypes.c_char_p
        dll.infire_input_bytes.restype = c_int64
        self.num_threads = num_threads
        self._pool = dll.infire_new_pool(num_threads)

    @property
    def instructions(self) -> str:
        """What the kernels were compiled for: avx512_bf16, avx2, neon or portable."""
        name: bytes = self._dll.infire_instructions()
        return name.decode()

    @property
    def input_dtype(self) -> np.dtype[Any]:
        """Of activations that products read: the bits of bfloat16, or float32 rounded to it."""
        return np.dtype(np.uint16 if self._dll.infire_input_bytes() == 2 else np.float32)

    def run(self, tape: Tape, *, num_threads: int | None = None, timed: bool = False) -> None:
        """One pass, on all threads or the first few. Waits for its end; other threads may go on."""
        self._dll.infire_run(
            self._pool,
            tape.entries,
            len(tape.entries),
            num_threads or self.num_threads,
            tape.nanoseconds.ctypes.data if timed else None,
        )

    def close(self) -> None:
        """End the threads. Not while a pass runs."""
        self._dll.infire_free_pool(self._pool)
        self._pool = None
