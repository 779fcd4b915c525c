"""Sequences for the counting model, and what it answers to them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import msgspec

from infire.request import SamplingParams, Sequence
from tests.fakes.runner import VOCABULARY


def sequence(
    request_id: str,
    prompt: int = 3,
    max_tokens: int = 4,
    *,
    generated: int = 0,
    stop_ids: tuple[int, ...] = (),
    logprobs: int | None = None,
    priority: int = 0,
    hold: bool = False,
) -> Sequence:
    """A prompt 0, 1, 2 ... of `prompt` ids, and `generated` ids already counted elsewhere."""
    return Sequence(
        request_id=request_id,
        model="counting",
        token_ids=[i % VOCABULARY for i in range(prompt + generated)],
        num_prompt=prompt,
        sampling=SamplingParams(
            max_tokens=max_tokens, seed=1, stop_ids=stop_ids, logprobs=logprobs
        ),
        priority=priority,
        hold=hold,
    )


def sequence_of(
    request_id: str,
    token_ids: Seq[int],
    max_tokens: int,
    *,
    num_prompt: int | None = None,
    speculate: bool = True,
    **more: Any,
) -> Sequence:
    """Any ids: all of them prompt, unless `num_prompt` says how many are. `more` as above."""
    seq = sequence(request_id, len(token_ids), max_tokens, **more)
    seq.token_ids = list(token_ids)
    seq.num_prompt = len(token_ids) if num_prompt is None else num_prompt
    seq.sampling = msgspec.structs.replace(seq.sampling, speculate=speculate)
    return seq


def counted(last_id: int, count: int, period: int = VOCABULARY) -> list[int]:
    """The `count` ids that the model says after `last_id`."""
    return [(last_id + n) % period for n in range(1, count + 1)]


def answer(prompt: int, max_tokens: int, *, generated: int = 0) -> list[int]:
    """All that the model says to such a prompt, after what was generated."""
    return [i % VOCABULARY for i in range(prompt + generated, prompt + max_tokens)]
