"""Sequences for the counting model, and what it answers to them."""

from __future__ import annotations

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


def answer(prompt: int, max_tokens: int, *, generated: int = 0) -> list[int]:
    """All that the model says to such a prompt, after what was generated."""
    return [i % VOCABULARY for i in range(prompt + generated, prompt + max_tokens)]
