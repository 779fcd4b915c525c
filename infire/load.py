"""From a model folder to a runner that is ready. Knows no request and no scheduler."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from infire.device import choose_device, choose_dtype
from infire.kv_cache import KVCache
from infire.kv_layout import KVGroup, KVLayout
from infire.model.config import ModelConfig, read_config
from infire.model.families import model_config
from infire.model.transformer import transformer
from infire.runner import ModelRunner
from infire.weights import WeightFiles, model_digest

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model in memory, warm."""

    runner: ModelRunner
    layout: KVLayout
    num_blocks: tuple[int, ...]  # per KV group
    context_window: int  # tokens
    vocab_size: int
    model_digest: str
    device: str
    dtype: str
    load_s: float


def load_model(  # noqa: PLR0913  one parameter a setting
    folder: Path,
    *,
    device: str,
    dtype: str,
    kv_tokens: int,
    block_tokens: int,
    max_running: int,
    max_step_tokens: int,
    threads: int,
) -> Loaded:
    """Map the weights of `folder` and make one step with them.

    `threads` holds for the whole process. Raises `BadModel` for a folder that cannot be served,
    `NoDevice` for a device that does not work.
    """
    began = perf_counter()
    torch.set_num_threads(threads)
    config = model_config(read_config(folder))
    where, trouble = choose_device(device)
    if trouble is not None:
        _logger.warning("computing on the CPU: %s", trouble)
    kind = choose_dtype(dtype, where)
    weights = WeightFiles(folder, device=where, dtype=kind)
    layout = KVLayout(
        groups=kv_groups(config, block_tokens),
        dtype=str(kind).removeprefix("torch."),
        model_digest=model_digest(folder),
    )
    num_blocks = tuple(
        _num_blocks(group, kv_tokens, max_running, max_step_tokens) for group in layout.groups
    )
    max_tokens = _max_tokens(config, layout, num_blocks)
    runner = ModelRunner(
        transformer(config, weights, max_tokens=max_tokens),
        KVCache(layout, num_blocks, where),
        num_slots=max_running,
        max_tokens=max_tokens,
    )
    runner.warm_up()
    return Loaded(
        runner=runner,
        layout=layout,
        num_blocks=num_blocks,
        context_window=config.context_window,
        vocab_size=config.vocab_size,
        model_digest=layout.model_digest,
        device=str(where),
        dtype=layout.dtype,
        load_s=perf_counter() - began,
    )


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


def _num_blocks(group: KVGroup, kv_tokens: int, max_running: int, max_step_tokens: int) -> int:
    """Blocks for `kv_tokens`; fewer where all that can run together sees less."""
    blocks = -(-kv_tokens // group.block_tokens)
    if group.window is None:
        return blocks
    seen = -(-(group.window - 1 + max_step_tokens) // group.block_tokens) + 2
    return min(blocks, seen * max_running)


def _max_tokens(config: ModelConfig, layout: KVLayout, num_blocks: tuple[int, ...]) -> int:
    """No later position can come: what has no window must be held whole."""
    held = [
        count * group.block_tokens
        for group, count in zip(layout.groups, num_blocks, strict=True)
        if group.window is None
    ]
    return min([config.context_window, *held])
