"""Which pipeline computes a product of which size, and how its kernel is started. Knows no tensor.

Measured by `tune` on one kind of GPU, kept as JSON by its name. A shape that nobody has measured
gets a rule of thumb.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

VERSION = 1
SHIPPED = Path(__file__).parent / "tuned"
# A product of M rows is computed as the smallest of these that is not below M, or as the last.
BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_DEFAULT_FUSED = 128  # rows, up to which the fused kernel beat decoding on an H200
_DEFAULT_PROGRAMS = 256  # about two for each multiprocessor of an H200


class BadPlans(ValueError):
    """A file of plans that cannot be used; it may be deleted, and measured anew."""


class Pipeline(StrEnum):
    """How y = x @ W.T is computed."""

    RAW = "raw"  # W is kept in BF16: the vendor's product
    DECODED = "decoded"  # W in tiles, decoded to BF16 scratch, then the vendor's product
    FUSED = "fused"  # W in tiles, decoded in the registers of the product


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How the fused kernel is started: no field changes a bit of what it computes, as long as
    `warps` stays on one side of 4 (below, Hopper takes another tensor-core instruction)."""

    block_n: int  # outputs of a program: 32, 64, 128 or 256
    block_m: int  # rows of x of a program: 16 to 256
    warps: int
    stages: int  # tiles of the pipeline from memory
    early: bool  # start before the kernel before has ended (programmatic dependent launch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """For one bucket of rows."""

    pipeline: Pipeline
    launch: Launch | None  # of the fused kernel
    times_us: Mapping[str, float] = field(default_factory=dict)  # measured, of every pipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapePlan:
    """For matrices of one shape."""

    split: int  # ranges that inputs are summed in, whatever the number of rows
    choices: Mapping[int, Choice]  # by bucket

    def choice(self, num_rows: int) -> Choice:
        """Of the bucket that many rows are in."""
        return self.choices[bucket(num_rows)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plans:
    """What has been measured on one kind of GPU."""

    gpu: str  # its name, as the driver says it
    measured: str  # when and with what
    shapes: Mapping[tuple[int, int], ShapePlan]  # by (N, K)
    verified: Mapping[str, float] = field(default_factory=dict)  # see `tune.verify`

    def plan(self, num_outputs: int, num_inputs: int) -> ShapePlan:
        """As measured, else by rule of thumb."""
        return self.shapes.get((num_outputs, num_inputs)) or default_plan(num_outputs, num_inputs)


def bucket(num_rows: int) -> int:
    """The bucket of so many rows."""
    return next((size for size in BUCKETS if num_rows <= size), BUCKETS[-1])


def default_plan(num_outputs: int, num_inputs: int) -> ShapePlan:
    """For a shape that nobody has measured."""
    blocks, tiles = -(-num_outputs // 64), -(-num_inputs // 128)
    split = 1
    while blocks * split < _DEFAULT_PROGRAMS and tiles >= split * 2 * 4:
        split *= 2
    choices = {
        size: Choice(pipeline=Pipeline.FUSED, launch=default_launch(size))
        if size <= _DEFAULT_FUSED
        else Choice(pipeline=Pipeline.DECODED, launch=None)
        for size in BUCKETS
    }
    return ShapePlan(split=split, choices=choices)


def default_launch(num_rows: int) -> Launch:
    """What an H200 takes for most shapes. Sums of more than 128 rows do not fit the registers."""
    block_m = min(bucket(num_rows), 128)
    wide = block_m > 64
    return Launch(
        block_n=128 if wide else 64,
        block_m=block_m,
        warps=8 if wide else 4,
        stages={16: 4, 32: 3, 64: 3}.get(block_m, 2),
        early=False,
    )


def file_name(gpu: str) -> str:
    """Of the plans of a GPU of that name."""
    return "".join(c if c.isalnum() else "_" for c in gpu) + ".json"


def find(gpu: str, *folders: Path) -> Plans:
    """The plans for a GPU, from the first folder that has some, then those that are shipped; or
    empty ones. Raises `BadPlans`."""
    for folder in (*folders, SHIPPED):
        path = folder / file_name(gpu)
        if path.exists():
            return load(path)
    return Plans(gpu=gpu, measured="never", shapes={})


def save(plans: Plans, path: Path) -> None:
    """Whole or not at all."""
    shapes = [
        {
            "n": n,
            "k": k,
            "split": plan.split,
            "choices": {str(size): asdict(choice) for size, choice in plan.choices.items()},
        }
        for (n, k), plan in plans.shapes.items()
    ]
    content = {
        "version": VERSION,
        "gpu": plans.gpu,
        "measured": plans.measured,
        "verified": dict(plans.verified),
        "shapes": shapes,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(path.name + ".making")
    made.write_text(json.dumps(content, indent=1) + "\n")
    made.replace(path)


def load(path: Path) -> Plans:
    """Raises `BadPlans` for what `save` has not written."""
    try:
        content = json.loads(path.read_text())
        if content["version"] != VERSION:
            raise BadPlans(f"{path} is of version {content['version']}, not {VERSION}")
        shapes = {(int(row["n"]), int(row["k"])): _shape_plan(row) for row in content["shapes"]}
        return Plans(
            gpu=str(content["gpu"]),
            measured=str(content["measured"]),
            shapes=shapes,
            verified=content["verified"],
        )
    except BadPlans as error:
        raise BadPlans(str(error)) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadPlans(f"{path}: {error!r}") from error


def _shape_plan(row: Mapping[str, Any]) -> ShapePlan:
    choices = {
        int(size): Choice(
            pipeline=Pipeline(choice["pipeline"]),
            launch=None if choice["launch"] is None else _launch(choice["launch"]),
            times_us=choice["times_us"],
        )
        for size, choice in row["choices"].items()
    }
    if set(choices) != set(BUCKETS) or row["split"] not in range(1, 65):
        raise BadPlans(f"{row['n']} x {row['k']}: split {row['split']}, buckets {sorted(choices)}")
    for size, choice in choices.items():
        if (choice.pipeline is Pipeline.FUSED) != (choice.launch is not None):
            raise BadPlans(f"{row['n']} x {row['k']}, {size} rows: {choice.pipeline} as launched")
    return ShapePlan(split=row["split"], choices=choices)


def _launch(fields: Mapping[str, Any]) -> Launch:
    launch = Launch(**fields)
    sane = launch.block_n in {32, 64, 128, 256} and launch.block_m in {16, 32, 64, 128, 256}
    if not sane or launch.warps not in {1, 2, 4, 8} or launch.stages not in range(1, 9):
        raise BadPlans(f"no launch of the fused kernel: {launch}")
    return launch
