"""What loading a model comes to, whatever it computes with."""

from __future__ import annotations

from dataclasses import dataclass

from infire.grammar import Templates
from infire.kv_layout import KVLayout
from infire.plan import Runner


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model in memory, warm."""

    runner: Runner
    templates: Templates | None  # of grammars, which `runner` follows; None: there can be none
    layout: KVLayout
    num_blocks: tuple[int, ...]  # per KV group
    context_window: int  # tokens
    vocab_size: int
    model_digest: str
    device: str
    dtype: str
    load_s: float
