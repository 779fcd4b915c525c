"""Measure, for shapes of matrices, which pipeline and launch is fastest at every number of rows.

Deciding is apart from measuring: `choose` takes a function that times. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product

from unweight.gpu.plans import BUCKETS, Choice, Launch, Pipeline, ShapePlan
from unweight.tiles import INPUTS

# Microseconds of one product; None where it cannot be launched (as for want of shared memory).
Timer = Callable[[Pipeline, int, Launch | None, int], float | None]

_SHARED_BYTES = 220 << 10  # of a program on Hopper, less what the epilogue takes
_FUSED_ROWS = 256  # beyond, decoding again for every 256 rows has long lost
_DECODE_ROWS = (16, 32, 64)  # what split is chosen for: batches of tokens, not prompts


def launches(num_rows: int) -> list[Launch]:
    """Launches of the fused kernel worth trying for a bucket. All of 4 warps and more, so that on
    Hopper all take the same instruction and give the same bits."""
    block_m = min(num_rows, _FUSED_ROWS)
    blocks = {16: ((64, 4), (128, 4)), 32: ((64, 4), (128, 4), (128, 8))}.get(
        block_m, ((64, 4), (128, 4), (128, 8), (256, 8)) if block_m < 256 else ((64, 8), (128, 8))
    )
    tried = []
    for (block_n, warps), stages, early in product(blocks, (2, 3, 4, 5), (False, True)):
        in_flight = stages * (block_n * INPUTS * 3 // 2 + INPUTS * block_m * 2)
        worth = 36 << 10 < in_flight <= _SHARED_BYTES and not (early and block_m > 64)
        if worth and not (stages == 5 and block_n > 64):
            tried.append(
                Launch(block_n=block_n, block_m=block_m, warps=warps, stages=stages, early=early)
            )
    return tried


def splits(num_outputs: int, num_inputs: int, multiprocessors: int = 132) -> list[int]:
    """Numbers of input ranges worth trying: enough programs, with enough tiles for each."""
    blocks, tiles = -(-num_outputs // 64), -(-num_inputs // INPUTS)
    most = max(1, 4 * multiprocessors // blocks)
    return [s for s in (1, 2, 4, 8) if s == 1 or (s <= most and tiles // s >= 6)]


def choose(
    timer: Timer, split_candidates: Iterable[int], buckets: Sequence[int] = BUCKETS
) -> ShapePlan:
    """The plan of one shape by measured times.

    The split is one for all rows: of those tried, the one whose best times at 16 to 64 rows are
    lowest, by the geometric mean.
    """
    best: dict[int, dict[int, tuple[float, Launch]]] = {}
    for split in split_candidates:
        best[split] = {size: _fastest(timer, split, size) for size in buckets}
    split = min(best, key=lambda s: _mean([best[s][b][0] for b in buckets if b in _DECODE_ROWS]))
    return ShapePlan(
        split=split, choices={size: _choice(timer, size, *best[split][size]) for size in buckets}
    )


def remeasure(timer: Timer, plan: ShapePlan, buckets: Sequence[int] = BUCKETS) -> ShapePlan:
    """The same split and launches with times of this device, and the pipelines by those. A bucket
    that decodes first takes the launch of the largest that does not."""
    known = [plan.choices[size].launch for size in sorted(plan.choices)]
    last = next((launch for launch in reversed(known) if launch), launches(_FUSED_ROWS)[-1])
    choices = {}
    for size in buckets:
        launch = plan.choices[size].launch or last
        worth = size <= 4 * _FUSED_ROWS
        fused = timer(Pipeline.FUSED, plan.split, launch, size) if worth else None
        choices[size] = _choice(timer, size, math.inf if fused is None else fused, launch)
    return ShapePlan(split=plan.split, choices=choices)


def _fastest(timer: Timer, split: int, size: int) -> tuple[float, Launch]:
    if size > _FUSED_ROWS:  # the launch of the largest bucket serves: it is timed, not tuned
        size_launches = [launches(_FUSED_ROWS)[-1]] if size <= 4 * _FUSED_ROWS else []
    else:
        size_launches = launches(size)
    timed = [(timer(Pipeline.FUSED, split, launch, size), launch) for launch in size_launches]
    ran = [(time, launch) for time, launch in timed if time is not None]
    return min(ran, key=lambda pair: pair[0], default=(math.inf, launches(_FUSED_ROWS)[-1]))


def _choice(timer: Timer, size: int, fused_us: float, launch: Launch) -> Choice:
    times = {Pipeline.FUSED: fused_us}
    for pipeline in (Pipeline.DECODED, Pipeline.RAW):
        time = timer(pipeline, 1, None, size)
        times[pipeline] = math.inf if time is None else time
    fused = times[Pipeline.FUSED] <= times[Pipeline.DECODED]
    return Choice(
        pipeline=Pipeline.FUSED if fused else Pipeline.DECODED,
        launch=launch if fused else None,
        times_us={str(name): round(us, 2) for name, us in times.items() if us < math.inf},
    )


def _mean(times: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, times)) / len(times)) if times else 0.0


def crossover(plan: ShapePlan) -> int | None:
    """The smallest bucket from which on decoding first is faster; None if it never is."""
    decoded = [size for size in sorted(plan.choices) if plan.choices[size].launch is None]
    return decoded[0] if decoded else None


def gain(plan: ShapePlan, num_rows: int) -> float:
    """Measured time of BF16 over that of the chosen pipeline."""
    times: Mapping[str, float] = plan.choice(num_rows).times_us
    return times[Pipeline.RAW] / times[plan.choice(num_rows).pipeline]
