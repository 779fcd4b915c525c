"""From a model folder to a runner that is ready. Knows no request and no scheduler."""

from __future__ import annotations

import logging
from pathlib import Path
from time import perf_counter

import torch

from infire.device import choose_device, choose_dtype
from infire.grammar import read_templates
from infire.kv_cache import KVCache
from infire.kv_layout import KVLayout, WeightCodec
from infire.kv_pools import kv_groups, longest, num_blocks
from infire.loaded import Loaded
from infire.model.config import read_config
from infire.model.families import model_config
from infire.model.layers import Weights
from infire.model.transformer import transformer
from infire.runner import ModelRunner
from infire.weight_files import model_digest
from infire.weights import WeightFiles

_logger = logging.getLogger(__name__)


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
    weights: str = "bf16",
    cache: Path | None = None,
) -> Loaded:
    """Map the weights of `folder` and make one step with them.

    With `weights` "u12" a CUDA device that computes in BF16 has its matrices in 12 bits, multiplied
    by plans from `cache` or those shipped. `threads` holds for the whole process. Raises `BadModel`
    for a folder that cannot be served, `NoDevice` for a device that does not work, `BadPlans`.
    """
    began = perf_counter()
    torch.set_num_threads(threads)
    config = model_config(read_config(folder))
    where, trouble = choose_device(device)
    if trouble is not None:
        _logger.warning("computing on the CPU: %s", trouble)
    kind = choose_dtype(dtype, where)
    parameters = _parameters(
        WeightFiles(folder, device=where, dtype=kind, threads=threads),
        where,
        packed=weights == "u12" and where.type == "cuda" and kind == torch.bfloat16,
        cache=cache,
    )
    layout = KVLayout(
        groups=kv_groups(config, block_tokens),
        dtype=str(kind).removeprefix("torch."),
        model_digest=model_digest(folder),
        codec=_codec(parameters, kind),
    )
    counts = tuple(
        num_blocks(group, kv_tokens, max_running, max_step_tokens) for group in layout.groups
    )
    max_tokens = longest(config, layout, counts)
    templates = read_templates(folder, config.vocab_size)
    runner = ModelRunner(
        transformer(config, parameters, max_tokens=max_tokens),
        KVCache(layout, counts, where),
        num_slots=max_running,
        max_tokens=max_tokens,
        templates=templates,
    )
    runner.warm_up()
    return Loaded(
        runner=runner,
        templates=templates,
        layout=layout,
        num_blocks=counts,
        context_window=config.context_window,
        vocab_size=config.vocab_size,
        model_digest=layout.model_digest,
        device=str(where),
        dtype=layout.dtype,
        load_s=perf_counter() - began,
    )


def _codec(parameters: Weights, dtype: torch.dtype) -> WeightCodec:
    """What the parameters lie in; a cast is not a codec: KV of another type is another's anyway."""
    plain = isinstance(parameters, WeightFiles)
    return WeightCodec(str(dtype).removeprefix("torch.") if plain else "u12")


def _parameters(
    files: WeightFiles, device: torch.device, *, packed: bool, cache: Path | None
) -> Weights:
    if not packed:
        return files
    try:
        from infire.packed import PackedWeights, plans_for  # needs triton
    except ImportError as error:
        _logger.warning("weights stay in BF16: %s", error)
        return files
    return PackedWeights(files, device, plans_for(device, cache))
