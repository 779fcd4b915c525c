"""What engines without a model have in common: flags, layout, and what they say of themselves."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from infire.admission import Limits
from infire.kv_layout import KVGroup, KVLayout
from infire.notes import Hello
from infire.scheduler import Scheduler
from loadtest.bench.host_model import CONTEXT_WINDOW, VOCABULARY


def engine_flags() -> ArgumentParser:
    """Those of `infire serve` that are not about computing, and how long a step takes."""
    flags = ArgumentParser()
    flags.add_argument("--step-s", type=float, required=True, help="how long a step takes")
    flags.add_argument("--fd", type=int, required=True)
    flags.add_argument("--model", required=True)
    flags.add_argument("--kv-tokens", type=int, required=True)
    flags.add_argument("--block-tokens", type=int, required=True)
    flags.add_argument("--max-step-tokens", type=int, required=True)
    flags.add_argument("--max-running", type=int, required=True)
    return flags


def limits_of(given: Namespace) -> Limits:
    return Limits(
        max_step_tokens=given.max_step_tokens,
        max_running=given.max_running,
        context_window=CONTEXT_WINDOW,
        vocab_size=VOCABULARY,
    )


def layout_of(model: str, *, block_tokens: int, dtype: str) -> KVLayout:
    """One layer of one head of one number."""
    group = KVGroup(
        kind="full", layers=(0,), num_heads=1, head_dim=1, window=None, block_tokens=block_tokens
    )
    return KVLayout(groups=(group,), dtype=dtype, model_digest=model)


def hello_of(model: str, layout: KVLayout, scheduler: Scheduler, *, device: str) -> Hello:
    return Hello(
        model=model,
        model_digest=layout.model_digest,
        layout=layout,
        context_window=CONTEXT_WINDOW,
        max_sequence_tokens=scheduler.max_sequence_tokens,
        vocab_size=VOCABULARY,
        device=device,
        dtype=layout.dtype,
        threads=1,
        load_s=0.0,
    )
