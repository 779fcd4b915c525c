"""Correctness and time of every product of one matrix, at every number of rows. No deciding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from loadtest.bench.gpu.matrices import Copies
from loadtest.bench.gpu.twin import bf16_matmul, torch_matmul
from unweight.gpu.linear import Scratch
from unweight.gpu.matmul import u12_matmul
from unweight.gpu.plans import Launch, Pipeline, ShapePlan, default_launch
from unweight.gpu.scratch import unpack_on_device
from unweight.gpu.timing import Launches, interleaved_us, time_us

ROWS = (1, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One matrix at one number of rows of x: microseconds of each round, and errors."""

    name: str
    shape: tuple[int, int]
    num_rows: int
    times_us: Mapping[str, Sequence[float]]  # torch, twin, fused, decoded
    errors: Mapping[str, float]  # |y - y64| / |y64| of each
    launch: Launch
    split: int

    def us(self, name: str) -> float:
        """The median."""
        return median(self.times_us[name])

    def gain(self, name: str) -> float:
        """The median over rounds of torch's time in the round over that of `name`."""
        pairs = zip(self.times_us["torch"], self.times_us[name], strict=True)
        return median(torch_us / us for torch_us, us in pairs)

    def spread(self, name: str) -> tuple[float, float]:
        """The smallest and largest such ratio."""
        pairs = zip(self.times_us["torch"], self.times_us[name], strict=True)
        ratios = [torch_us / us for torch_us, us in pairs]
        return min(ratios), max(ratios)


class Bench:
    """The products of one matrix, in as many copies as `Copies` has."""

    def __init__(self, copies: Copies, scratch: Scratch) -> None:
        self._copies = copies
        self._scratch = scratch
        self._device = copies.dense[0].device
        self._inputs: dict[int, Tensor] = {}

    @property
    def num_copies(self) -> int:
        return len(self._copies.dense)

    def x(self, num_rows: int) -> Tensor:
        """Random rows (M, K), of which the first is the same for every M."""
        if num_rows not in self._inputs:
            generator = torch.Generator(self._device).manual_seed(5)
            shape = num_rows, self._copies.dense[0].shape[1]
            made = torch.randn(*shape, generator=generator, device=self._device).bfloat16()
            first = self._inputs.setdefault(0, made[:1].clone())
            made[0] = first[0]
            self._inputs[num_rows] = made
        return self._inputs[num_rows]

    def launches(self, pipeline: str, num_rows: int, split: int, launch: Launch) -> Launches:
        """What launches a product with copy i of the matrix, into one output."""
        x, copies, scratch = self.x(num_rows), self._copies, self._scratch
        out = torch.full(
            (num_rows, len(copies.dense[0])), math.nan, dtype=x.dtype, device=self._device
        )

        def decoded(i: int) -> Tensor:
            room = scratch.room(*copies.dense[0].shape)
            return torch_matmul(x, unpack_on_device(copies.tiles[i], out=room), out)

        def fused(i: int) -> Tensor:
            workspace = scratch.workspace
            return u12_matmul(
                x, copies.tiles[i], launch=launch, split=split, workspace=workspace, out=out
            )

        def twin(i: int) -> Tensor:
            workspace = scratch.workspace
            return bf16_matmul(
                x, copies.dense[i], launch=launch, split=split, workspace=workspace, out=out
            )

        return {
            "torch": lambda i: torch_matmul(x, copies.dense[i], out),
            "twin": twin,
            "fused": fused,
            "decoded": decoded,
        }[pipeline]

    def timer(
        self, pipeline: Pipeline, split: int, launch: Launch | None, num_rows: int
    ) -> float | None:
        """For `tune.choose`."""
        name = {"raw": "torch", "decoded": "decoded", "fused": "fused"}[pipeline]
        started = launch or Launch(block_n=64, block_m=16, warps=4, stages=3, early=False)
        try:
            return time_us(self.launches(name, num_rows, split, started), self.num_copies)
        except (OutOfResources, PTXASError):
            return None

    def row(self, name: str, num_rows: int, plan: ShapePlan, rounds: int) -> Row:
        """Interleaved times and errors at one number of rows."""
        dense = self._copies.dense[0]
        launch = launch_of(plan, num_rows)
        contenders = {
            name: self.launches(name, num_rows, plan.split, launch)
            for name in ("torch", "twin", "fused", "decoded")
        }
        exact = self.x(num_rows).double() @ dense.double().T
        errors = {}
        for contender, launches in contenders.items():
            y = launches(0)
            assert isinstance(y, Tensor)
            errors[contender] = float((y.double() - exact).norm() / exact.norm())
        return Row(
            name=name,
            shape=(dense.shape[0], dense.shape[1]),
            num_rows=num_rows,
            times_us=interleaved_us(contenders, self.num_copies, rounds),
            errors=errors,
            launch=launch,
            split=plan.split,
        )

    def first_rows_agree(self, plan: ShapePlan) -> bool:
        """Whether the fused product of one row is the same bits at every number of rows."""
        firsts = []
        for num_rows in ROWS:
            y = self.launches("fused", num_rows, plan.split, launch_of(plan, num_rows))(0)
            assert isinstance(y, Tensor)
            firsts.append(y[0].clone().view(torch.int16))
        return all(torch.equal(first, firsts[0]) for first in firsts)


def launch_of(plan: ShapePlan, num_rows: int) -> Launch:
    """Of the fused kernel at so many rows, also where the plan would decode first."""
    launch = plan.choice(num_rows).launch
    if launch is not None:
        return launch
    return default_launch(num_rows)
