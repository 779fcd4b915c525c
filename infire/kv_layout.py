"""What a block of KV holds, per group of layers. Pure: shapes and byte counts, no tensors."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from hashlib import sha256
from typing import Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace

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
    num_copies: int = 1  # neighbouring ranks with the same heads; a latent is on all, whatever this

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


class WeightCodec(Struct, frozen=True):
    """How an engine holds the weights that a model's digest names."""

    name: str
    exact: bool = True  # each weight has the bits it had, so KV is what it is with plain weights


PLAIN = WeightCodec("plain")


class KVLayout(Struct, frozen=True, kw_only=True):
    """All that two engines must share before one may read the other's KV.

    Of one rank of `tp_size`, each with some of the heads. ValueError where ranks do not add up.
    """

    groups: tuple[KVGroup, ...]
    dtype: str
    model_digest: str
    tokenizer_digest: str = ""  # of what made the ids; an engine knows none, its worker does
    codec: WeightCodec = PLAIN
    tp_rank: int = 0
    tp_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.tp_rank < self.tp_size:
            raise ValueError(f"rank {self.tp_rank} of {self.tp_size}")
        for group in self.groups:
            if group.num_copies < 1 or self.tp_size % self._copies(group):
                raise ValueError(f"{group.num_copies} copies of heads on {self.tp_size} ranks")

    def heads(self, group: KVGroup, rank: int) -> range:
        """Which of the model's KV heads are on a rank."""
        first = rank // self._copies(group) * group.num_heads
        return range(first, first + group.num_heads)

    def model_heads(self, group: KVGroup) -> int:
        """KV heads on all ranks, each counted once."""
        return self.tp_size // self._copies(group) * group.num_heads

    def cut(self, tp_size: int, tp_rank: int) -> KVLayout:
        """The same KV on another number of ranks. ValueError where heads cannot be shared out.

        With more ranks than heads, neighbours have the same one, as in vLLM (`QKVParallelLinear`).
        """
        groups = tuple(self._cut(group, tp_size) for group in self.groups)
        return replace(self, groups=groups, tp_size=tp_size, tp_rank=tp_rank)

    @property
    def parts(self) -> tuple[int, ...]:
        """The fewest ranks that together have all KV."""
        return tuple(
            rank
            for rank in range(self.tp_size)
            if rank == 0 or any(rank % self._copies(group) == 0 for group in self.groups)
        )

    @property
    def whole(self) -> KVLayout:
        """What is left where it does not matter how an engine keeps KV: all heads on one rank.

        Exported KV is in token order, without blocks; and what is exact is as good as plain.
        """
        groups = tuple(
            replace(group, num_heads=self.model_heads(group), num_copies=1, block_tokens=0)
            for group in self.groups
        )
        codec = PLAIN if self.codec.exact else self.codec
        return replace(self, groups=groups, codec=codec, tp_rank=0, tp_size=1)

    @property
    def digest(self) -> str:
        """Over `whole`: the same for engines that can use each other's KV."""
        return sha256(msgspec.msgpack.encode(self.whole)).hexdigest()

    @property
    def block_bytes(self) -> int:
        """Of a block of the first group, all layers."""
        group = self.groups[0]
        cells = len(group.layers) * group.planes * group.block_tokens
        return cells * group.num_heads * group.head_dim * DTYPE_BYTES[self.dtype]

    def pieces(self, num_tokens: int, ends: Seq[int] = ()) -> list[tuple[int, int]]:
        """First token and end of each piece of an export that was written in pieces.

        ValueError where there cannot be such an export: with windows, what is visible is known at
        the end only, so it is written in one.
        """
        ends = ends or (num_tokens,)
        starts = (0, *ends[:-1])
        windowed = any(group.window is not None for group in self.groups)
        if ends[-1] != num_tokens or any(a >= b for a, b in zip(starts, ends, strict=True)):
            raise ValueError(f"pieces of {num_tokens} tokens that end at {list(ends)}")
        if windowed and len(ends) > 1:
            raise ValueError(f"{len(ends)} pieces of KV with windows")
        return list(zip(starts, ends, strict=True))

    def exported_bytes(self, num_tokens: int) -> int:
        """Size of the KV of `num_tokens` tokens as `Runner.export` of one rank writes it.

        Group after group, layer after layer: (planes, T, num_heads, head_dim), T being the tokens
        still visible to position `num_tokens`. An export in pieces is this of each one's.
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

    def _copies(self, group: KVGroup) -> int:
        return self.tp_size if group.kind == "latent" else group.num_copies

    def _cut(self, group: KVGroup, tp_size: int) -> KVGroup:
        num_heads = self.model_heads(group)
        if group.kind == "latent":
            return replace(group, num_copies=1)
        if num_heads % tp_size == 0:
            return replace(group, num_heads=num_heads // tp_size, num_copies=1)
        if tp_size % num_heads == 0:
            return replace(group, num_heads=1, num_copies=tp_size // num_heads)
        raise ValueError(f"{num_heads} KV heads cannot be shared out to {tp_size} ranks")


def difference(theirs: KVLayout, ours: KVLayout) -> str | None:
    """What keeps their KV from being of use here, by name; None where nothing does.

    Neither the size of blocks does, nor the number of ranks, nor a codec that is exact.
    """
    if theirs == ours:  # nearly always, and looked at for each request
        return None
    there, here = _facts(theirs), _facts(ours)
    found = [
        f"{name} {_short(there[name])} (here {_short(here[name])})"
        for name in here
        if there[name] != here[name]
    ]
    return ", ".join(found) or None


def _facts(layout: KVLayout) -> dict[str, object]:
    """All of `whole`, as people call it."""
    whole = layout.whole
    return {
        "layers": [list(group.layers) for group in whole.groups],
        "kinds": [group.kind for group in whole.groups],
        "windows": [group.window for group in whole.groups],
        "heads": [group.num_heads for group in whole.groups],
        "head_dim": [group.head_dim for group in whole.groups],
        "dtype": whole.dtype,
        "model digest": whole.model_digest,
        "tokenizer digest": whole.tokenizer_digest,
        "codec": whole.codec.name if whole.codec.exact else f"{whole.codec.name}, not exact",
    }


def _short(fact: object) -> str:
    """For people: so much of a digest tells it from others, and so much of a list what it is."""
    text = fact if isinstance(fact, str) else str(fact)
    most = 12 if isinstance(fact, str) and len(fact) == 64 else 60
    return text[:most] or "none"
