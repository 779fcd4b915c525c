"""How the attention of a step is cut into calls of even size. Knows neither layers nor KV."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Measured on 2 cores of Zen4 with 9 query and 3 KV heads of 64. 32 rows of 128 tokens take a
# third of the time in tiles of many rows; a gather that leaves the cache takes twice as long.
_TILE_QUERIES = 128  # of one span; a later tile's keys are neither read nor computed
_TILE_KEYS = 4096  # of all rows of a tile together


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Tokens of one sequence, one after the other, and the KV that they may look at."""

    first: int  # index in the step of the first token
    start: int  # its position in the sequence
    blocks: NDArray[np.int32]  # the sequence's block table
    oldest: NDArray[np.int64]  # (length,): the oldest position that each token sees

    @property
    def length(self) -> int:
        return len(self.oldest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """What one call computes: S rows of Q tokens each, over B blocks of P cells."""

    num_rows: int
    tokens: Tensor  # (S * Q,) int64: indices in the step
    blocks: Tensor  # (S * B,) int64
    mask: Tensor  # (S, 1, H / K * Q, B * P), of the KV's type: 0 where seen, -inf elsewhere


@dataclass(frozen=True, slots=True, kw_only=True)
class TileShape:
    """What is the same for every tile of a KV group."""

    block_tokens: int  # P
    group: int  # query heads that share a KV head: H / K
    dtype: torch.dtype
    device: torch.device


def tiles_of(spans: Seq[Span], shape: TileShape) -> tuple[Tile, ...]:
    """The tiles that compute `spans`, each token once."""
    pieces = [piece for span in spans for piece in _cut(span, shape.block_tokens)]
    alone = [[piece] for piece in pieces if len(piece.oldest) > 1]
    single = [piece for piece in pieces if len(piece.oldest) == 1]
    together = _alike(single, _TILE_KEYS // shape.block_tokens)
    return tuple([_tile(batch, shape) for batch in (*alone, *together)])


@dataclass(frozen=True, slots=True)
class _Piece:
    """Part of a span, with the blocks from the oldest position it sees to its last one."""

    first: int
    start: int
    oldest: NDArray[np.int64]
    blocks: NDArray[np.int32]
    first_key: int  # position of the first cell of `blocks`


def _cut(span: Span, block_tokens: int) -> Iterator[_Piece]:
    for begin in range(0, span.length, _TILE_QUERIES):
        oldest = span.oldest[begin : begin + _TILE_QUERIES]
        start = span.start + begin
        low = int(oldest[0]) // block_tokens
        high = -(-(start + len(oldest)) // block_tokens)
        blocks = span.blocks[low:high]
        yield _Piece(span.first + begin, start, oldest, blocks, low * block_tokens)


def _alike(pieces: Seq[_Piece], max_blocks: int) -> list[list[_Piece]]:
    """Batches in which every piece has at least half the blocks of the longest."""
    batches: list[list[_Piece]] = []
    for piece in sorted(pieces, key=lambda piece: -len(piece.blocks)):
        longest = len(batches[-1][0].blocks) if batches else 0
        if (
            batches
            and 2 * len(piece.blocks) >= longest
            and (len(batches[-1]) + 1) * longest <= max_blocks
        ):
            batches[-1].append(piece)
        else:
            batches.append([piece])
    return batches


def _tile(batch: Seq[_Piece], shape: TileShape) -> Tile:
    num_blocks = max(len(piece.blocks) for piece in batch)
    blocks = np.zeros((len(batch), num_blocks), np.int64)  # a short row ends in unseen blocks
    for row, piece in zip(blocks, batch, strict=True):
        row[: len(piece.blocks)] = piece.blocks
    steps = np.arange(len(batch[0].oldest))
    firsts = np.array([[piece.first] for piece in batch])
    starts = np.array([[piece.start] for piece in batch])
    first_keys = np.array([[piece.first_key] for piece in batch])
    oldest = np.stack([piece.oldest for piece in batch])

    def on_device(array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(shape.device)

    return Tile(
        num_rows=len(batch),
        tokens=on_device((firsts + steps).ravel()),
        blocks=on_device(blocks.ravel()),
        mask=_mask(
            on_device(oldest - first_keys),
            on_device(starts + steps - first_keys),
            num_keys=num_blocks * shape.block_tokens,
            shape=shape,
        ),
    )


def _mask(oldest: Tensor, newest: Tensor, *, num_keys: int, shape: TileShape) -> Tensor:
    """(S, 1, G * Q, num_keys): 0 from `oldest` to `newest`, which are (S, Q), -inf elsewhere."""
    keys = torch.arange(num_keys, device=shape.device)
    seen = (keys >= oldest[..., None]) & (keys <= newest[..., None])
    mask = torch.zeros(seen.shape, dtype=shape.dtype, device=shape.device)
    return mask.masked_fill_(~seen, -torch.inf).repeat(1, shape.group, 1).unsqueeze(1)
