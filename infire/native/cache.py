"""The KV of every layer, in blocks, in the memory of this process. Knows no sequence and no torch.

What `export` writes is what `infire.kv_cache` reads, and the other way round.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from infire.cells import cells_of
from infire.kernels.cpu.library import aligned
from infire.kv_layout import KVLayout


class Cache:
    """One array a group, (layers, planes, N, P, heads, size) uint16: the bits of bfloat16.

    It takes memory as blocks are written to.
    """

    def __init__(self, layout: KVLayout, num_blocks: Seq[int]) -> None:
        self.layout = layout
        self.num_blocks = tuple(num_blocks)
        self._groups = tuple(
            aligned(
                len(g.layers),
                g.planes,
                count,
                g.block_tokens,
                g.num_heads,
                g.head_dim,
                dtype=np.uint16,
            )
            for g, count in zip(layout.groups, num_blocks, strict=True)
        )
        #: of each layer: its group, and its planes (N, P, heads, size) of keys and values
        self.layers = [
            (n, cache[i, 0], cache[i, -1])
            for _, n, i, cache in sorted(
                (layer, n, i, cache)
                for n, (group, cache) in enumerate(zip(layout.groups, self._groups, strict=True))
                for i, layer in enumerate(group.layers)
            )
        ]

    def save(self, block: int) -> bytes:
        """The bits of a block of the one group: (layers, planes, P, heads, size)."""
        (cache,) = self._groups
        return cache[:, :, block].tobytes()

    def load(self, block: int, content: bytes) -> None:
        """Have in a block what `save` gave."""
        (cache,) = self._groups
        found = np.frombuffer(content, np.uint16)
        cache[:, :, block] = found.reshape(cache[:, :, block].shape)

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
                    file.write(layer.take(cells, axis=1).data)
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
                    tokens = np.empty((layer.shape[0], len(cells), *layer.shape[2:]), np.uint16)
                    if file.readinto(tokens.data) != tokens.nbytes:
                        raise ValueError(f"{path} became shorter while it was read")
                    layer[:, cells] = tokens

    def _visible(
        self, block_ids: Seq[Seq[int]], start: int, num_tokens: int
    ) -> Iterator[tuple[NDArray[np.uint16], NDArray[np.int64]]]:
        """Each layer as (planes, cells, heads, size), and the cells that hold visible tokens."""
        for group, cache, table in zip(self.layout.groups, self._groups, block_ids, strict=True):
            positions = np.arange(max(start, group.first_visible(num_tokens)), num_tokens)
            cells = cells_of(group, np.asarray(table, np.int64), positions)
            for layer in cache.reshape(*cache.shape[:2], -1, *cache.shape[4:]):
                yield layer, cells
