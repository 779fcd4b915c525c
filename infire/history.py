"""What the sequences in some slots have seen and said, and the penalties for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from infire.plan import SlotOpen


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalties:
    """(R, 1) float32 each, one row a sequence."""

    repetition: Tensor  # divides a positive logit and multiplies a negative one; 1: none
    frequency: Tensor  # taken off for each time an id was said
    presence: Tensor  # taken off once an id was said


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """Ids that rows would have said besides: (A,) int64 each, a row as often as it has ids."""

    rows: Tensor
    ids: Tensor


class History:
    """Counts of token ids, for slots whose requests have penalties; the others cost nothing."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._shape = (num_slots, vocab_size)
        self._device = device
        self._seen: Tensor | None = None  # (slots, V) bool: in the prompt or in the output
        self._said: Tensor | None = None  # (slots, V) int32: how often in the output

    def open(self, opened: SlotOpen) -> None:
        """Begin the slot's history with all that its sequence consists of so far."""
        seen, said = self._tables()
        ids = torch.tensor(opened.token_ids, dtype=torch.int64, device=self._device)
        seen[opened.slot] = False
        seen[opened.slot, ids] = True
        said[opened.slot] = torch.bincount(ids[opened.num_prompt :], minlength=self._shape[1])

    def add(self, slots: Tensor, ids: Tensor) -> None:
        """Record what slots said: slots, ids: (R,) int64, in any order and number."""
        seen, said = self._tables()
        _count(seen, said, slots, ids)

    def penalise(
        self, logits: Tensor, slots: Tensor, penalties: Penalties, ahead: Ahead | None = None
    ) -> Tensor:
        """(R, V), from logits of (R, V) and slots of (R,) int64; as if `ahead` had been said."""
        all_seen, all_said = self._tables()
        seen, counts = all_seen[slots], all_said[slots]
        if ahead:
            _count(seen, counts, ahead.rows, ahead.ids)
        repetition = penalties.repetition
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(seen, repeated, logits)
        return logits - penalties.frequency * counts - penalties.presence * (counts > 0)

    def _tables(self) -> tuple[Tensor, Tensor]:
        if self._seen is None or self._said is None:
            self._seen = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
            self._said = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
        return self._seen, self._said


def _count(seen: Tensor, said: Tensor, rows: Tensor, ids: Tensor) -> None:
    """In place. seen, said: (R, V); rows, ids: (A,) int64, pairs that may repeat."""
    seen[rows, ids] = True
    said.index_put_((rows, ids), said.new_ones(()), accumulate=True)
