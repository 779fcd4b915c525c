"""Attention over KV that lies in blocks. Knows neither layers nor sequences.

Letters: T tokens in the step, H query heads, K KV heads, D head size, N blocks, P tokens a block.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from infire.kernels.tiles import Span, Tile


def paged_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spans: Seq[Span], scale: float
) -> Tensor:
    """(T, H, D) of q's type: each token by itself, computed in float32.

    q: (T, H, D), rotated; k_cache, v_cache: (N, P, K, D). Tokens in no span get zeros.
    """
    group = q.shape[1] // k_cache.shape[2]
    out = torch.zeros_like(q)
    for span in spans:
        table = torch.from_numpy(span.blocks).to(q.device)
        keys = k_cache[table].flatten(0, 1).float().repeat_interleave(group, dim=1)
        values = v_cache[table].flatten(0, 1).float().repeat_interleave(group, dim=1)
        for n in range(span.length):
            seen = slice(int(span.oldest[n]), span.start + n + 1)
            scores = torch.einsum("hd,thd->ht", q[span.first + n].float(), keys[seen]) * scale
            mixed = torch.einsum("ht,thd->hd", scores.softmax(-1), values[seen])
            out[span.first + n] = mixed.to(q.dtype)
    return out


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, tiles: Seq[Tile], scale: float
) -> Tensor:
    """As `paged_attention_reference`, for any device, in a few large operations a tile.

    The query heads that share a KV head are folded into its queries, so no key is repeated.
    """
    num_kv, size = k_cache.shape[2:]
    group = q.shape[1] // num_kv
    out = torch.zeros_like(q)
    for tile in tiles:
        rows = tile.num_rows
        folded = q.index_select(0, tile.tokens).view(rows, -1, num_kv, group, size)
        folded = folded.permute(0, 2, 3, 1, 4).reshape(rows, num_kv, -1, size)
        keys = k_cache.index_select(0, tile.blocks).view(rows, -1, num_kv, size)
        values = v_cache.index_select(0, tile.blocks).view(rows, -1, num_kv, size)
        mixed = scaled_dot_product_attention(
            folded, keys.transpose(1, 2), values.transpose(1, 2), tile.mask, scale=scale
        )
        mixed = mixed.view(rows, num_kv, group, -1, size).permute(0, 3, 1, 2, 4)
        out.index_copy_(0, tile.tokens, mixed.reshape(-1, num_kv * group, size))
    return out
