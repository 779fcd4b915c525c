"""What an engine takes on, and why it refuses the rest. Pure; knows no queue and no block."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from infire.request import Sequence


class Refusal(Exception):
    """A sequence that cannot be run. `code` is a label of `routing.errors.Code`."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one engine takes on. None: whatever the KV pool holds, whatever ids come."""

    max_step_tokens: int = 512  # tokens one forward pass computes, all rows together
    max_running: int = 64  # rows of a pass, at most
    max_draft_ids: int = 6  # ids that one row has verified in a pass, at most; 0: none ever
    # Tokens of a pass with drafts, at most. On 2 cores reading the weights takes as long as the
    # arithmetic of about 10 tokens: up to there a draft is nearly free, and past 16 a pass takes
    # longer than what most drafts save.
    max_drafted_tokens: int = 16
    context_window: int | None = None  # tokens of one sequence, prompt and output
    vocab_size: int | None = None
    prefix_cache: bool = True  # sequences that begin alike share KV blocks


def admit(seq: Sequence, *, num_adopted: int, longest: int, vocab_size: int | None) -> None:
    """Raise `Refusal` (bad_input) if `seq` can never run in `longest` tokens of KV."""
    known, max_tokens = len(seq.token_ids), seq.sampling.max_tokens
    if not 0 < seq.num_prompt <= known:
        raise _bad(f"prompt of {seq.num_prompt} tokens in {known} ids")
    if seq.num_output >= max_tokens:
        raise _bad(f"max_tokens of {max_tokens} leaves none after {seq.num_output} generated ids")
    if seq.num_prompt + max_tokens > longest:
        raise _bad(
            f"prompt of {seq.num_prompt} tokens and max_tokens of {max_tokens} "
            f"exceed the {longest} tokens that one request may have"
        )
    if not 0 <= num_adopted < known:
        raise _bad(f"KV of {num_adopted} tokens for {known} ids")
    # An id outside the vocabulary would end the whole step, and on a GPU the whole process.
    size = vocab_size or sys.maxsize
    for ids in (seq.token_ids, [token_id for token_id, _ in seq.sampling.logit_bias]):
        if ids and not 0 <= min(ids) <= max(ids) < size:
            raise _bad(f"ids from {min(ids)} to {max(ids)} in a vocabulary of {size}")


def _bad(detail: str) -> Refusal:
    return Refusal("bad_input", detail)
