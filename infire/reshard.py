"""How KV of one number of tensor-parallel ranks becomes KV of another: which bytes go where.

In an export, a group is a table: a row for each layer, plane and token, in it the rank's heads side
by side. Another number of ranks has the same rows, cut elsewhere, so what goes from one export to
another is a strip of columns. Pure: no file and no array.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from infire.kv_layout import DTYPE_BYTES, KVGroup, KVLayout, difference


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """`num_rows` pieces of `width` bytes; a stride is from the begin of one to that of the next."""

    source: int  # the rank whose export they are in
    source_start: int
    source_stride: int
    target_start: int
    target_stride: int
    width: int
    num_rows: int


def as_it_is(source: KVLayout, target: KVLayout, parts: Sequence[int]) -> bool:
    """Whether the export of the one part is the KV of the target's rank, byte for byte."""
    if len(parts) != 1:
        return False
    return all(
        source.heads(theirs, parts[0]) == target.heads(ours, target.tp_rank)
        for theirs, ours in zip(source.groups, target.groups, strict=True)
    )


def plan(
    source: KVLayout, target: KVLayout, num_tokens: int, parts: Sequence[int] | None = None
) -> tuple[Strip, ...]:
    """All that makes the KV of `num_tokens` tokens of the target's rank, every byte once.

    It comes from `parts`: ranks of the source whose exports there are, without it as few as do.
    ValueError where the two do not fit, or heads are on none of them.
    """
    if found := difference(source, target):
        raise ValueError(f"no KV for these ranks: {found}")
    strips: list[Strip] = []
    source_base = target_base = 0
    for theirs, ours in zip(source.groups, target.groups, strict=True):
        rows = _rows(ours, num_tokens)
        unit = ours.head_dim * DTYPE_BYTES[target.dtype]
        for rank, heads in _shares(source, theirs, parts or source.parts, target, ours):
            at = source.heads(theirs, rank).start, target.heads(ours, target.tp_rank).start
            strip = Strip(
                source=rank,
                source_start=source_base + (heads.start - at[0]) * unit,
                source_stride=theirs.num_heads * unit,
                target_start=target_base + (heads.start - at[1]) * unit,
                target_stride=ours.num_heads * unit,
                width=len(heads) * unit,
                num_rows=rows,
            )
            if rows:
                strips.append(strip)
        source_base += rows * theirs.num_heads * unit
        target_base += rows * ours.num_heads * unit
    return tuple(strips)


def plan_pieces(
    source: KVLayout,
    target: KVLayout,
    ends: Sequence[int],
    parts: Sequence[int] | None = None,
) -> tuple[Strip, ...]:
    """As `plan`, of exports in pieces that end at these tokens: each is one export more."""
    strips: list[Strip] = []
    for start, end in target.pieces(ends[-1], ends):
        base = source.exported_bytes(start), target.exported_bytes(start)
        strips += [
            replace(
                strip,
                source_start=strip.source_start + base[0],
                target_start=strip.target_start + base[1],
            )
            for strip in plan(source, target, end - start, parts)
        ]
    return tuple(strips)


def _rows(group: KVGroup, num_tokens: int) -> int:
    return len(group.layers) * group.planes * (num_tokens - group.first_visible(num_tokens))


def _shares(
    source: KVLayout, theirs: KVGroup, parts: Sequence[int], target: KVLayout, ours: KVGroup
) -> list[tuple[int, range]]:
    """Which of the heads that the target's rank has come from which part; each from one."""
    wanted = target.heads(ours, target.tp_rank)
    shares: dict[range, int] = {}
    for rank in parts:
        there = source.heads(theirs, rank)
        heads = range(max(there.start, wanted.start), min(there.stop, wanted.stop))
        if heads:
            shares.setdefault(heads, rank)
    if sum(map(len, shares)) != len(wanted):
        detail = f"heads {wanted.start} to {wanted.stop - 1} of {theirs.kind} layers"
        raise ValueError(f"{detail} are not all on ranks {list(parts)} of {source.tp_size}")
    return [(rank, heads) for heads, rank in shares.items()]
