"""The native sampler with its kernel, built for one instruction set, and logits handed to it."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from infire.kernels.cpu.library import aligned
from infire.native.sampler import CANDIDATES_BYTES, Sampler
from infire.plan import Row, RowResult, SlotOpen
from infire.request import SamplingParams
from infire.sampler import Sampler as TorchSampler

Logits = NDArray[np.float32]  # (R, V)

_KERNELS = Path(__file__).parents[3] / "infire" / "kernels" / "cpu"
_DRIVER = Path(__file__).parent / "sample_driver.cpp"


def instruction_sets() -> list[str]:
    """What tests of this machine build for: all that it has, and less."""
    if platform.machine() != "x86_64":
        return ["native"]
    has_avx2 = " avx2 " in Path("/proc/cpuinfo").read_text()
    return ["native", *(["x86-64-v3"] if has_avx2 else []), "x86-64"]


class Kernel:
    """The compiled driver."""

    def __init__(self, folder: Path, march: str) -> None:
        """Compiled into `folder`, unless it is there."""
        library = folder / f"sample-{march}.so"
        command = ["g++", "-O2", "-std=gnu++20", f"-march={march}", "-fPIC", "-shared", "-pthread"]
        if not library.exists():
            files = [f"-I{_KERNELS}", str(_DRIVER), "-o", str(library)]
            subprocess.run([*command, "-w", *files], check=True)
        self._dll = ctypes.CDLL(str(library))
        self._dll.candidates_bytes.restype = ctypes.c_int64
        self._dll.best_of.restype = ctypes.c_int64

    @property
    def candidates_bytes(self) -> int:
        return int(self._dll.candidates_bytes())

    def best(
        self, row: Logits, limit: int, *, width: int, tiles: Seq[int]
    ) -> tuple[NDArray[np.int32], Logits]:
        """Ids and logits of the best of a row that is handed over tile by tile."""
        memory = aligned(CANDIDATES_BYTES, dtype=np.uint8)
        self.collect(row, limit, memory, width=width, tiles=tiles, owners=[0] * len(tiles))
        ids, logits = np.zeros(128, np.int32), np.zeros(128, np.float32)
        count = self._dll.best_of(*_pointers(memory, ids, logits))
        return ids[:count], logits[:count]

    def collect(
        self,
        row: Logits,
        limit: int,
        into: NDArray[np.uint8],
        *,
        width: int,
        tiles: Seq[int],
        owners: Seq[int],
        stride: int = 1,
    ) -> None:
        """Candidates for one position; `into` begins with those of thread 0."""
        numbers = np.array([tiles, owners], np.int64)
        self._dll.collect_row(
            *_pointers(row),
            *_integers(len(row), limit),
            *_pointers(numbers[0], numbers[1]),
            *_integers(len(tiles), width),
            *_pointers(into),
            *_integers(stride, max(owners) + 1),
        )

    def sample(self, sampler: Sampler, num_threads: int) -> None:
        self._dll.run_sample(ctypes.byref(sampler.args), *_integers(num_threads))


class Sampling:
    """A sampler, its kernel, and a stand-in for the head that gives them logits."""

    def __init__(
        self, kernel: Kernel, vocab_size: int, *, num_slots: int = 64, num_threads: int = 2
    ) -> None:
        self._kernel = kernel
        self._num_threads = num_threads
        self.sampler = Sampler(
            vocab_size=vocab_size,
            num_slots=num_slots,
            max_sampled=4 * num_slots,
            num_threads=num_threads,
        )

    def open(self, *requests: SlotOpen) -> None:
        for request in requests:
            self.sampler.open(request)

    def step(self, rows: Seq[Row], logits: Logits, *, seed: int = 0) -> list[RowResult]:
        """logits: one row a sampled position. `seed`: which thread has which tile, and when."""
        chance = np.random.default_rng(seed)
        sampler, width = self.sampler, 32
        count = sampler.prepare(rows)
        assert count == len(logits)
        for position, limit in enumerate(sampler.limits[:count].tolist()):
            if not limit:
                sampler._logits[position] = logits[position]
                continue
            sampler._logits[position] = np.nan  # nobody may look
            tiles = chance.permutation(-(-logits.shape[1] // width)).tolist()
            self._kernel.collect(
                np.ascontiguousarray(logits[position]),
                limit,
                sampler._candidates[position:],
                width=width,
                tiles=tiles,
                owners=[
                    self._num_threads - 1,
                    *chance.integers(self._num_threads, size=len(tiles)),
                ][: len(tiles)],
                stride=count,
            )
        self._kernel.sample(sampler, self._num_threads)
        return sampler.results()


def opened(
    slot: int = 0, *, prompt: Seq[int] = (), output: Seq[int] = (), **sampling: Any
) -> SlotOpen:
    return SlotOpen(
        slot=slot,
        token_ids=(*prompt, *output),
        num_prompt=len(prompt),
        sampling=SamplingParams(**({"max_tokens": 100, "seed": 1} | sampling)),
    )


def row(slot: int, position: int, drafts: Seq[int] = ()) -> Row:
    """A row of one known id, whose successor is at `position`."""
    return Row(slot=slot, start=position - 1, num_new=1, ids=(0,), draft_ids=tuple(drafts))


def by_torch(requests: Seq[SlotOpen], positions: Seq[int], logits: Logits) -> list[RowResult]:
    """What the torch sampler says of one id for each request."""
    sampler = TorchSampler(vocab_size=logits.shape[1], num_slots=64, device=torch.device("cpu"))
    for request in requests:
        sampler.open(request)
    return sampler.sample(torch.from_numpy(logits), [each.slot for each in requests], positions)


def _pointers(*arrays: NDArray[Any]) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(array.ctypes.data) for array in arrays]


def _integers(*numbers: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(number) for number in numbers]
