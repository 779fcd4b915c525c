"""What a block of KV holds, per group of layers. Pure: shapes and byte counts, no tensors."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from hashlib import sha256
from typing import Literal

import msgspec
from msgspec import Struct

GroupKind = Literal["full", "sliding", "chunked", "latent"]
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class KVGroup(Struct, frozen=True, kw_only=True):
    """Layers that forget alike, and so share block tables."""

    kind: GroupKind
    layers: tuple[int, ...]  # indices into the model's layers
    num_heads: int  # KV heads on this rank; 1 for latent
    head_dim: int  # or latent width
    window: int | None = None  # tokens a sliding or chunked layer sees; None for full and latent
    block_tokens: int = 16

    @property
    def planes(self) -> int:
        """K and V, or the one latent."""
        return 1 if self.kind == "latent" else 2

    def first_visible(self, num_tokens: int) -> int:
        """The oldest position that the token at position `num_tokens` may still look at."""
        if self.window is None:
            return 0
        if self.kind == "chunked":
            return num_tokens // self.window * self.window
        return max(0, num_tokens - self.window + 1)


class KVLayout(Struct, frozen=True, kw_only=True):
    """All that two engines must share before one may read the other's KV."""

    groups: tuple[KVGroup, ...]
    dtype: str
    model_digest: str
    tp_rank: int = 0
    tp_size: int = 1

    @property
    def digest(self) -> str:
        """Over everything but the block size: exported KV is in token order, without blocks."""
        shapes = tuple(msgspec.structs.replace(group, block_tokens=0) for group in self.groups)
        return sha256(
            msgspec.msgpack.encode(msgspec.structs.replace(self, groups=shapes))
        ).hexdigest()

    def parts(self, num_tokens: int, ends: Seq[int] = ()) -> list[tuple[int, int]]:
        """First token and end of each part of an export that was written in parts.

        ValueError where there cannot be such an export: with windows, what is visible is known at
        the end only, so it is written in one.
        """
        ends = ends or (num_tokens,)
        starts = (0, *ends[:-1])
        windowed = any(group.window is not None for group in self.groups)
        if ends[-1] != num_tokens or any(a >= b for a, b in zip(starts, ends, strict=True)):
            raise ValueError(f"parts of {num_tokens} tokens that end at {list(ends)}")
        if windowed and len(ends) > 1:
            raise ValueError(f"{len(ends)} parts of KV with windows")
        return list(zip(starts, ends, strict=True))

    def exported_bytes(self, num_tokens: int) -> int:
        """Size of the KV of `num_tokens` tokens as `Runner.export` writes it.

        Group after group, layer after layer: (planes, T, num_heads, head_dim), T being the tokens
        still visible to position `num_tokens`. An export in parts is this of each one's tokens.
        """
        return (
            sum(
                len(g.layers)
                * g.planes
                * (num_tokens - g.first_visible(num_tokens))
                * g.num_heads
                * g.head_dim
                for g in self.groups
            )
            * DTYPE_BYTES[self.dtype]
        )
