"""Draw one id a row from filtered logits. Knows no request and keeps nothing.

Letters: R rows, V vocabulary. A row's id depends on that row alone, bit by bit: on nothing that a
neighbour asks for, on no state, and ties are broken by id.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Ids looked at before all are: sorting 49,152 takes 3 ms a row on a CPU, finding the 256 largest
# 0.1 ms, and they are nearly always enough.
_FIRST_WIDTH = 256
_MASK = (1 << 64) - 1


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) for a token: the same on every device, in any order of asking.

    SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014;
    constants as in https://prng.di.unimi.it/splitmix64.c): its output number `index`, begun at
    the mix of `seed`, so that neighbouring seeds do not give the same numbers one place apart.
    """
    return (_mix(_mix(seed) + (index + 1) * 0x9E3779B97F4A7C15) >> 32) * 2.0**-32


def _mix(z: int) -> int:
    z &= _MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def largest(values: Tensor, count: int) -> Tensor:
    """(R, count) int64: ids of the largest of each row of `values`, (R, V) float32, in order.

    Of equal ones the lowest id comes first, whatever `count` is.
    """
    bits = values.view(torch.int32)
    ordered = bits ^ (bits >> 31 & 0x7FFFFFFF)  # as integers they compare as the floats do
    ids_down = torch.arange(values.shape[-1] - 1, -1, -1, device=values.device)
    keys = (ordered.long() << 32) | ids_down
    return values.shape[-1] - 1 - (keys.topk(count).values & 0xFFFFFFFF)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """(R,) int64: the id at which the sum of a row, in order of ids, first exceeds its share.

    probabilities: (R, V), not necessarily of sum 1; uniforms: (R,) float64 in [0, 1).
    """
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    # Less than the whole sum, as 1 - u is at least 2**-32: an id of probability 0 is never met.
    shares = sums[:, -1:] * uniforms[:, None]
    found = torch.searchsorted(sums, shares, right=True).squeeze(-1)
    return found.clamp_(max=probabilities.shape[-1] - 1)  # a row of zeros


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Which ids of a row may be drawn; applied in this order. The likeliest always may."""

    top_k: Tensor  # (R,) int64: so many of the likeliest; 0: all
    top_p: Tensor  # (R,) float64: of those, the fewest that hold this part of their sum; 1: all
    min_p: Tensor  # (R,) float64: those at least so likely, relative to the likeliest

    def of(self, rows: Tensor) -> Filters:
        return Filters(top_k=self.top_k[rows], top_p=self.top_p[rows], min_p=self.min_p[rows])


def draw_filtered(
    probabilities: Tensor, uniforms: Tensor, filters: Filters, *, width: int = _FIRST_WIDTH
) -> Tensor:
    """(R,) int64: as `draw`, of what `filters` keep. Rows of `probabilities` have the sum 1.

    The `width` likeliest ids are looked at first, and more for rows where that was not enough:
    it has no effect on the outcome.
    """
    width = min(width, probabilities.shape[-1])
    ids = largest(probabilities, width)
    candidates = probabilities.gather(-1, ids).double()
    kept = _kept(candidates, filters)
    by_id = ids.argsort(-1)
    weights = (candidates * kept).gather(-1, by_id)
    drawn = by_id.gather(-1, draw(weights, uniforms)[:, None])
    chosen = ids.gather(-1, drawn).squeeze(-1)
    if width < probabilities.shape[-1]:
        undecided = torch.where(filters.top_k > 0, filters.top_k > width, kept[:, -1])
        rest = undecided.nonzero().squeeze(-1)
        if len(rest):
            chosen[rest] = draw_filtered(
                probabilities[rest], uniforms[rest], filters.of(rest), width=16 * width
            )
    return chosen


def _kept(candidates: Tensor, filters: Filters) -> Tensor:
    """(R, W) bool, a prefix of each row. candidates: (R, W) float64, the likeliest first."""
    width = candidates.shape[-1]
    sums = candidates.cumsum(-1)
    limit = filters.top_k.clamp(max=width)[:, None]
    total = torch.where(limit > 0, sums.gather(-1, (limit - 1).clamp(min=0)), 1.0)
    places = torch.arange(width, device=candidates.device)
    few = (limit == 0) | (places < limit)
    heavy = (filters.top_p[:, None] >= 1) | (sums - candidates < filters.top_p[:, None] * total)
    likely = candidates >= filters.min_p[:, None] * candidates[:, :1]
    return (few & heavy & likely) | (places == 0)
