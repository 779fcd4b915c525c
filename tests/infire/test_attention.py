"""Attention over blocks: the tiled one against the one that takes each token by itself."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from infire.kernels.paged_attention import paged_attention, paged_attention_reference
from infire.kernels.tiles import Span, TileShape, tiles_of
from infire.kv_layout import KVGroup

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Largest difference allowed, of outputs around 1: rounding of the result, and of the weights. Sums
# are made in another order; how torch orders its own differs between processors (2.1e-6 on AVX2).
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2e-2}


@dataclass
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    spans: list[Span]
    shape: TileShape


def case(
    rows: list[tuple[int, int]],  # (position of the first new token, how many)
    *,
    heads: int = 6,
    kv_heads: int = 2,
    window: int | None = None,
    chunked: bool = False,
    block_tokens: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    """Rows with random KV in blocks that are strewn over the cache; the rest of it is garbage."""
    group = KVGroup(
        kind="full" if window is None else "chunked" if chunked else "sliding",
        layers=(0,),
        num_heads=kv_heads,
        head_dim=16,
        window=window,
        block_tokens=block_tokens,
    )
    counts = [-(-(start + new) // block_tokens) for start, new in rows]
    ids = list(range(sum(counts) + 3))
    random.Random(5).shuffle(ids)
    spans, first = [], 0
    for (start, new), count in zip(rows, counts, strict=True):
        blocks, ids = ids[:count], ids[count:]
        positions = range(start, start + new)
        oldest = np.array([group.first_visible(position) for position in positions])
        spans.append(
            Span(first=first, start=start, blocks=np.array(blocks, np.int32), oldest=oldest)
        )
        first += new
    torch.manual_seed(3)
    num_blocks = sum(counts) + 3

    def normal(*size: int) -> Tensor:
        return torch.randn(size).to(device, dtype)

    return Case(
        q=normal(first, heads, 16),
        k=normal(num_blocks, block_tokens, kv_heads, 16) * 2,
        v=normal(num_blocks, block_tokens, kv_heads, 16),
        spans=spans,
        shape=TileShape(
            block_tokens=block_tokens,
            group=heads // kv_heads,
            dtype=dtype,
            device=torch.device(device),
        ),
    )


def tiled(given: Case) -> Tensor:
    tiles = tiles_of(given.spans, given.shape)
    return paged_attention(given.q, given.k, given.v, tiles, scale=0.25)


def assert_as_reference(given: Case) -> None:
    expected = paged_attention_reference(given.q, given.k, given.v, given.spans, scale=0.25)
    difference = (tiled(given).float() - expected.float()).abs().max().item()
    assert difference <= TOLERANCE[given.q.dtype]


ROWS = {
    "one token": [(0, 1)],
    "a whole block": [(0, 16)],
    "a prompt longer than a tile": [(0, 300)],
    "a later chunk": [(61, 133)],
    "decoding": [(n, 1) for n in (0, 15, 16, 100, 7, 999)],
    "more keys than a tile takes": [(n, 1) for n in (1500, 1400, 1300, 1200, 5000)],
    "all mixed": [(40, 1), (0, 33), (7, 1), (129, 128), (500, 1), (16, 1), (3, 2)],
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_rows_of_any_length(rows: list[tuple[int, int]], device: str) -> None:
    assert_as_reference(case(rows, device=device))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (9, 3), (8, 1)])
def test_any_sharing_of_kv_heads(heads: int, kv_heads: int) -> None:
    assert_as_reference(case(ROWS["all mixed"], heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("block_tokens", [1, 3, 16, 64])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("window", [1, 20, 64])
def test_windows(window: int, chunked: bool, block_tokens: int) -> None:
    assert_as_reference(
        case(ROWS["all mixed"], window=window, chunked=chunked, block_tokens=block_tokens)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_in_bfloat16(device: str) -> None:
    assert_as_reference(case(ROWS["all mixed"], dtype=torch.bfloat16, device=device))


def test_the_reference_is_softmax_over_what_is_seen() -> None:
    """Two tokens of one head, worked out by hand: scores 0 and log 3, so weights 1/4 and 3/4."""
    k = torch.tensor([0.0, np.log(3.0)]).view(1, 2, 1, 1)
    v = torch.tensor([8.0, 4.0]).view(1, 2, 1, 1)
    span = Span(first=0, start=0, blocks=np.array([0], np.int32), oldest=np.array([0, 0]))
    out = paged_attention_reference(torch.ones(2, 1, 1), k, v, [span], scale=1.0)
    assert out.flatten().tolist() == pytest.approx([8.0, 5.0])


def test_each_token_is_in_one_tile() -> None:
    given = case(ROWS["all mixed"])
    tokens = torch.cat([tile.tokens for tile in tiles_of(given.spans, given.shape)])
    assert sorted(tokens.tolist()) == list(range(len(given.q)))


def test_many_short_rows_share_a_tile_and_a_long_one_does_not_stretch_them() -> None:
    given = case([(100, 1)] * 20 + [(4000, 1)])
    rows = [tile.num_rows for tile in tiles_of(given.spans, given.shape)]
    assert sorted(rows) == [1, 20]


def test_a_chunk_does_not_read_what_lies_behind_its_window() -> None:
    given = case([(2000, 1)], window=32)
    (tile,) = tiles_of(given.spans, given.shape)
    assert len(tile.blocks) == 3
