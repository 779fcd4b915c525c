"""From a model folder to a native runner that is ready. Knows no request and no scheduler."""

from __future__ import annotations

import logging
from pathlib import Path
from time import perf_counter

from infire.grammar import read_templates
from infire.kernels.cpu.build import CannotBuild, library_path
from infire.kernels.cpu.library import MAX_HEAD_DIM, Library
from infire.kv_layout import KVLayout, WeightCodec
from infire.kv_pools import kv_groups, longest, num_blocks
from infire.loaded import Loaded
from infire.model.config import read_config
from infire.model.families import model_config
from infire.native.cache import Cache
from infire.native.resident import resident
from infire.native.runner import NativeRunner
from infire.weight_files import model_digest

_logger = logging.getLogger(__name__)


def load_native(  # noqa: PLR0913  one parameter a setting
    folder: Path,
    *,
    cache: Path,
    weights: str,
    kv_tokens: int,
    block_tokens: int,
    max_running: int,
    max_step_tokens: int,
    threads: int,
    march: str = "native",
) -> Loaded:
    """Map the weights of `folder` in the form "u12" or "bf16", and make one step with them.

    Kernels and packed weights are made in `cache` the first time. Raises `CannotBuild` where there
    can be no kernels, `BadModel` for a folder that cannot be served.
    """
    began = perf_counter()
    library = Library(library_path(cache, march=march), threads)
    config = model_config(read_config(folder))
    if config.head_dim > MAX_HEAD_DIM or config.head_dim % 2:
        raise CannotBuild(f"kernels compute heads of up to {MAX_HEAD_DIM}, not {config.head_dim}")
    digest = model_digest(folder)
    layout = KVLayout(
        groups=kv_groups(config, block_tokens),
        dtype="bfloat16",
        model_digest=digest,
        codec=WeightCodec(weights),  # both forms are exact
    )
    counts = tuple(
        num_blocks(group, kv_tokens, max_running, max_step_tokens) for group in layout.groups
    )
    templates = read_templates(folder, config.vocab_size)
    runner = NativeRunner(
        config,
        resident(folder, config, digest, form=weights, cache=cache, threads=threads),
        Cache(layout, counts),
        library,
        num_slots=max_running,
        max_step_tokens=max_step_tokens,
        max_tokens=longest(config, layout, counts),
        templates=templates,
    )
    runner.warm_up()
    _logger.info("%s weights, kernels for %s", weights, library.instructions)
    return Loaded(
        runner=runner,
        templates=templates,
        layout=layout,
        num_blocks=counts,
        context_window=config.context_window,
        vocab_size=config.vocab_size,
        model_digest=digest,
        device="cpu",
        dtype=layout.dtype,
        load_s=perf_counter() - began,
    )
