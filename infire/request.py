"""What the engine is asked, and what it answers, in token ids. No torch, no clock, no I/O."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Struct

Reason = Literal["stop", "length"]


class SamplingParams(Struct, frozen=True, kw_only=True):
    """How to choose tokens: the one at index i depends on (seed, i) and its logits only."""

    max_tokens: int  # counts everything past `num_prompt`, also what came with a resume
    seed: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    stop_ids: tuple[int, ...] = ()
    speculate: bool = True  # guess ahead where that is faster; what is said stays the same


class Grammar(Struct, frozen=True):
    kind: Literal["json_object", "json_schema", "regex", "choice", "lark"]
    source: str


class Logprob(Struct, frozen=True, array_like=True):
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sequence(Struct, kw_only=True):
    """One request inside the engine. From `submit` on only the scheduler writes to it."""

    request_id: str
    model: str
    token_ids: list[int]  # prompt, then output
    num_prompt: int
    sampling: SamplingParams
    cache_salt: bytes = b""
    grammar: Grammar | None = None
    adapter: str | None = None
    priority: int = 0
    hold: bool = False  # on finishing, keep the blocks until they are handed over
    num_computed: int = 0  # tokens whose KV is in the cache
    block_ids: list[list[int]] = msgspec.field(default_factory=list)  # per KV group
    slot: int | None = None  # row of the runner's persistent state, while running
    num_preempted: int = 0

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt


class Step(Struct, frozen=True, kw_only=True, array_like=True):
    """What one request gained in one engine step."""

    request_id: str
    ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...] = ()
    finish: Reason | None = None
    num_computed: int = 0  # KV tokens after the step: what a ticket would cover
    cached_tokens: int = 0
