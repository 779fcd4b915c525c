"""The KV of every layer, in blocks; out to a file and in from one. Knows no sequence."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from infire.cells import cells_of
from infire.kv_layout import KVLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCache:
    """Views of one layer's part of its group. Each (N, P, K, D): blocks, tokens, heads, size."""

    group: int  # index of the KV group whose block tables hold
    k: Tensor
    v: Tensor

    def write(self, k: Tensor, v: Tensor, cells: Tensor) -> None:
        """Put the KV of T tokens, (T, K, D) each, into `cells`: (T,) int64, block * P + offset."""
        self.k.flatten(0, 1).index_copy_(0, cells, k)
        self.v.flatten(0, 1).index_copy_(0, cells, v)


class KVCache:
    """One tensor a group, (layers, planes, N, P, heads, size); zero until written."""

    def __init__(self, layout: KVLayout, num_blocks: Seq[int], device: torch.device) -> None:
        self.layout = layout
        self.num_blocks = tuple(num_blocks)
        self._groups = tuple(
            _zeros(
                (len(g.layers), g.planes, count, g.block_tokens, g.num_heads, g.head_dim),
                getattr(torch, layout.dtype),
                device,
            )
            for g, count in zip(layout.groups, num_blocks, strict=True)
        )
        views = {
            layer: LayerCache(group=n, k=cache[i, 0], v=cache[i, -1])
            for n, (group, cache) in enumerate(zip(layout.groups, self._groups, strict=True))
            for i, layer in enumerate(group.layers)
        }
        self.layers = tuple(views[layer] for layer in sorted(views))

    def save(self, block: int) -> bytes:
        """The bits of a block of the one group: (layers, planes, P, heads, size)."""
        (cache,) = self._groups
        return bytes(_bytes(cache[:, :, block].cpu().contiguous()))

    def load(self, block: int, content: bytes) -> None:
        """Have in a block what `save` gave."""
        (cache,) = self._groups
        found = torch.empty(cache[:, :, block].shape, dtype=cache.dtype)
        _bytes(found)[:] = content
        cache[:, :, block] = found.to(cache.device)

    def export(self, block_ids: Seq[Seq[int]], num_tokens: int, path: str, start: int = 0) -> int:
        """Write the visible KV of `num_tokens` tokens to a new file at `path`; its size in bytes.

        Laid out as `KVLayout.exported_bytes`. From `start` on, it is one more piece of the file.
        A file that cannot be finished is removed.
        """
        # A file that was here before is neither written to nor removed.
        file = Path(path).open("r+b" if start else "xb")  # noqa: SIM115
        try:
            with file:
                file.seek(0, os.SEEK_END)
                for layer, cells in self._visible(block_ids, start, num_tokens):
                    file.write(_bytes(layer.index_select(1, cells).cpu()))
                return file.tell()
        except OSError:
            Path(path).unlink()
            raise

    def adopt(
        self, block_ids: Seq[Seq[int]], num_tokens: int, path: str, piece_ends: Seq[int] = ()
    ) -> None:
        """Read what `export` wrote into these blocks. ValueError if its size is another."""
        pieces = self.layout.pieces(num_tokens, piece_ends)
        expected = self.layout.exported_bytes(num_tokens)
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected:
                raise ValueError(f"{size} bytes for the KV of {num_tokens} tokens, not {expected}")
            for start, end in pieces:
                for layer, cells in self._visible(block_ids, start, end):
                    shape = (layer.shape[0], len(cells), *layer.shape[2:])
                    tokens = torch.empty(shape, dtype=layer.dtype)
                    if file.readinto(_bytes(tokens)) != tokens.nbytes:
                        raise ValueError(f"{path} became shorter while it was read")
                    layer.index_copy_(1, cells, tokens.to(layer.device))

    def _visible(
        self, block_ids: Seq[Seq[int]], start: int, num_tokens: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Each layer as (planes, cells, heads, size), and the cells that hold visible tokens."""
        for group, cache, table in zip(self.layout.groups, self._groups, block_ids, strict=True):
            positions = np.arange(max(start, group.first_visible(num_tokens)), num_tokens)
            cells = torch.from_numpy(cells_of(group, np.asarray(table), positions))
            for layer in cache.flatten(2, 3):
                yield layer, cells.to(cache.device)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, as what is masked is still multiplied by 0, and garbage may be NaN.

    On CPU they take no memory before they are written, unlike those of `torch.zeros`.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    content = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(content).view(dtype).view(shape)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on CPU, of any type."""
    return tensor.view(-1).view(torch.uint8).numpy().data
