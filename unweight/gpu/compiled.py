"""Every kernel as it is launched in earnest, compiled for a GPU that need not be there."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from unweight.gpu import matmul, pack, rows, scratch
from unweight.gpu.plans import BUCKETS, SHIPPED, Launch, default_launch, load

TARGETS = (80, 90, 100)
_POINTERS = {
    "x_ptr": "*bf16", "words_ptr": "*i32", "base_ptr": "*u8", "bases_ptr": "*u8", "ptr_ptr": "*i32",
    "list_ptr": "*i32", "y_ptr": "*bf16", "part_ptr": "*fp32", "lock_ptr": "*i32",
    "out_ptr": "*i16", "ids_ptr": "*i64", "counts_ptr": "*i32",
}  # fmt: skip
_MULTIPLES_OF_16 = {"N", "K", "x_stride", "y_stride", "out_stride"}
_FUSED = "fused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One kernel and what it is compiled with."""

    kernel: str
    target: int  # 90: sm_90
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 3
    planes: bool = False  # weights in two planes of bytes, not in BF16
    launch: Launch | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For a table."""
        if self.launch is not None:
            launch = self.launch
            early = ", early" if launch.early else ""
            return (
                f"fused {launch.block_n}x{launch.block_m}, {launch.warps} warps, "
                f"{launch.stages} stages, /{self.constants['SPLIT']}{early}"
            )
        if "NIBBLES" in self.constants:
            return f"{self.kernel}, bases in {'nibbles' if self.constants['NIBBLES'] else 'bytes'}"
        return f"{self.kernel} of {'two planes' if self.planes else 'BF16'}"

    @property
    def num_rows(self) -> int | None:
        """Of x, of a program of the fused kernel on sm_90: whose instructions are counted."""
        return self.launch.block_m if self.launch and self.target == 90 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    resource_usage: str  # as cuobjdump prints it
    sass: str
    shared_bytes: int


_KERNELS = {
    _FUSED: matmul.u12_matmul_kernel,
    "unpack": scratch.unpack_kernel,
    "rows": rows.rows_kernel,
    "histogram": pack.histogram_kernel,
    "pack": pack.pack_kernel,
    "list": pack.list_kernel,
}


def jobs(target: int) -> list[Job]:
    """All of a target, the fused kernel by the launches of `plans`."""
    how = 90 if target >= 90 else 80
    found = [
        *(_fused(target, launch, split) for launch, split in _launches(target)),
        *(_other("unpack", target, how, NIBBLES=nibbles) for nibbles in (True, False)),
        _other("rows", target, how, warps=1, NIBBLES=True),
    ]
    for kernel, planes in product(("histogram", "pack", "list"), (False, True)):
        found.append(_other(kernel, target, None, planes=planes, PLANED=planes))
    return found


def compiled(job: Job) -> Compiled:
    """Raises what Triton raises."""
    kernel = _KERNELS[job.kernel]
    names = kernel.arg_names
    defaults = {p.name: p.default for p in kernel.params if p.has_default}
    constants = {**defaults, **job.constants}
    signature = {name: _type(name, constants, planes=job.planes) for name in names}
    aligned = [
        i for i, name in enumerate(names) if signature[name][0] == "*" or name in _MULTIPLES_OF_16
    ]
    made = triton.compile(
        ASTSource(
            kernel,
            signature,
            {(names.index(name),): value for name, value in constants.items()},
            {(i,): [["tt.divisibility", 16]] for i in aligned},
        ),
        target=GPUTarget("cuda", job.target, 32),
        options={"num_warps": job.warps, "num_stages": job.stages, **job.options},
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(made.asm["cubin"])
        return Compiled(
            resource_usage=_cuobjdump("--dump-resource-usage", path),
            sass=_cuobjdump("-sass", path),
            shared_bytes=made.metadata.shared,
        )


def _launches(target: int) -> list[tuple[Launch, int]]:
    """Launches and splits: what `plans` takes where nobody has measured, on Hopper with what is
    shipped, and one that starts early."""
    usual = [default_launch(size) for size in BUCKETS if size <= 128]
    found = dict.fromkeys(product(usual, (1, 4)))
    if target == 90:
        shipped = [load(path) for path in sorted(SHIPPED.glob("*.json"))]
        shapes = [shape for plans in shipped for shape in plans.shapes.values()]
        found |= {
            (choice.launch, shape.split): None
            for shape in shapes
            for choice in shape.choices.values()
            if choice.launch is not None
        }
        found[replace(usual[0], early=True), 4] = None
    return list(found)


def _fused(target: int, launch: Launch, split: int) -> Job:
    constants = {
        "BN": launch.block_n, "BM": launch.block_m, "SPLIT": split, "CHUNKS": 4, "NIBBLES": True,
        "EVEN_K": True, "HOW": 90 if target >= 90 else 80, "F32": False, "PDL": launch.early,
    }  # fmt: skip
    return Job(
        kernel=_FUSED,
        target=target,
        constants=constants,
        warps=launch.warps,
        stages=launch.stages,
        launch=launch,
        options={"launch_pdl": launch.early},
    )


def _other(
    kernel: str, target: int, how: int | None, *, planes: bool = False, warps: int = 4, **more: Any
) -> Job:
    constants = more if how is None else {"HOW": how, **more}
    return Job(kernel=kernel, target=target, constants=constants, planes=planes, warps=warps)


def _type(name: str, constants: Mapping[str, Any], *, planes: bool) -> str:
    if name in constants:
        return "constexpr"
    if name in {"weights_ptr", "exponents_ptr"}:
        return "*u8" if planes else "*i16"
    return _POINTERS.get(name, "i32")


def _cuobjdump(what: str, path: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, what, path], capture_output=True, text=True, check=True).stdout
