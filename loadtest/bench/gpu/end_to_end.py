"""A layer's four products one after the other, in BF16 and as planned: what tuning was for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from loadtest.bench.gpu.matrices import LAYER, SHAPES, weights
from unweight.gpu.linear import Linear, Scratch
from unweight.gpu.pack import pack_on_device
from unweight.gpu.plans import ShapePlan
from unweight.gpu.timing import interleaved_us

_LAYERS = 8  # each with matrices of its own: 3.5 GB in BF16


def layer_us(
    plans: Mapping[tuple[int, int], ShapePlan], scratch: Scratch, rounds: int
) -> dict[int, tuple[float, float, float]]:
    """By rows: microseconds of a layer in BF16, as planned, and the median ratio. Raises
    `AssertionError` if what comes out differs by more than rounding."""
    device = torch.device("cuda")
    dense = [
        {name: weights(*SHAPES[name], seed=9 * i, device=device) for name in LAYER}
        for i in range(_LAYERS)
    ]
    planned = [
        {name: Linear(pack_on_device(layer[name]), plans[SHAPES[name]], scratch) for name in LAYER}
        for layer in dense
    ]
    found = {}
    for num_rows in (1, 8, 16, 32, 64, 128, 256, 2048):
        x = torch.randn(num_rows, SHAPES["qkv"][1], device=device).bfloat16()

        def raw(i: int, x: Tensor = x) -> Tensor:
            layer = dense[i]
            return _layer(x, lambda name, y: linear(y, layer[name]))

        def packed(i: int, x: Tensor = x) -> Tensor:
            layer = planned[i]
            return _layer(x, lambda name, y: layer[name](y))

        one, other = raw(0).double(), packed(0).double()
        assert float((one - other).norm() / one.norm()) < 0.02
        times = interleaved_us({"raw": raw, "planned": packed}, _LAYERS, rounds)
        ratios = [a / b for a, b in zip(times["raw"], times["planned"], strict=True)]
        found[num_rows] = median(times["raw"]), median(times["planned"]), median(ratios)
    return found


def _layer(x: Tensor, product: Callable[[str, Tensor], Tensor]) -> Tensor:
    hidden = product("qkv", x)[:, : SHAPES["o"][1]].contiguous()
    gate, up = product("gate_up", product("o", hidden)).chunk(2, dim=1)
    return product("down", silu(gate) * up)
