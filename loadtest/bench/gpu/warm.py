"""Compile many launches at once, in processes that leave them in Triton's cache on disk."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Sequence

import torch
from triton.runtime.errors import OutOfResources, PTXASError

from loadtest.bench.gpu.twin import bf16_matmul_kernel, stages
from unweight.gpu.matmul import u12_matmul_kernel
from unweight.gpu.plans import Launch

Job = tuple[Launch, int, int]  # launch, split, chunks


def compile_all(jobs: Iterable[Job], processes: int) -> None:
    """Every kernel of the jobs, for the device and the kind of numbers that the bench has."""
    listed = list(jobs)
    parts = [listed[start :: len(listed) // 8 + 1] for start in range(len(listed) // 8 + 1)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(_compile, parts, chunksize=1)


def _compile(jobs: Sequence[Job]) -> None:
    types = {"bf16": torch.bfloat16, "i32": torch.int32, "f32": torch.float32}
    for launch, split, chunks in jobs:
        words = (types["i32"], torch.uint8, types["i32"], types["i32"])
        after = (types["bf16"], types["f32"], types["i32"])
        try:
            u12_matmul_kernel.warmup(
                types["bf16"], *words, *after, 2, 4096, 4096, 33, 33, 33, 4096, 4096,
                BN=launch.block_n, BM=launch.block_m, SPLIT=split, CHUNKS=chunks,
                NIBBLES=True, EVEN_K=True, HOW=90, F32=False, PDL=launch.early,
                num_warps=launch.warps, num_stages=launch.stages, launch_pdl=launch.early,
                grid=(1,),
            )  # fmt: skip
            if launch.early or chunks > 4:  # nothing to the twin
                continue
            bf16_matmul_kernel.warmup(
                types["bf16"], types["bf16"], *after, 2, 4096, 4096, 33, 4096, 4096,
                BN=launch.block_n, BM=launch.block_m, SPLIT=split, F32=False,
                num_warps=launch.warps, num_stages=stages(launch), grid=(1,),
            )  # fmt: skip
        except (
            OutOfResources,
            PTXASError,
        ):  # too large for the device: whoever launches it finds the same
            continue
