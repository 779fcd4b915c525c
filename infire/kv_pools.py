"""How the KV of a model is grouped, and how much of it an engine keeps. Knows no tensors."""

from __future__ import annotations

from infire.kv_layout import KVGroup, KVLayout
from infire.model.config import ModelConfig


def kv_groups(config: ModelConfig, block_tokens: int) -> tuple[KVGroup, ...]:
    """The layers of a model, those together that forget alike."""
    return tuple(
        KVGroup(
            kind="full" if window is None else "sliding",
            layers=tuple(n for n, other in enumerate(config.windows) if other == window),
            num_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            window=window,
            block_tokens=block_tokens,
        )
        for window in dict.fromkeys(config.windows)
    )


def num_blocks(group: KVGroup, kv_tokens: int, max_running: int, max_step_tokens: int) -> int:
    """Blocks for `kv_tokens`; fewer where all that can run together sees less."""
    blocks = -(-kv_tokens // group.block_tokens)
    if group.window is None:
        return blocks
    seen = -(-(group.window - 1 + max_step_tokens) // group.block_tokens) + 2
    return min(blocks, seen * max_running)


def longest(config: ModelConfig, layout: KVLayout, counts: tuple[int, ...]) -> int:
    """Tokens of a sequence, at most: what has no window must be held whole."""
    held = [
        count * group.block_tokens
        for group, count in zip(layout.groups, counts, strict=True)
        if group.window is None
    ]
    return min([config.context_window, *held])
