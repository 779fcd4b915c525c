"""From logits to the next ids, row by row as each request asks. Knows no model and no KV.

In this order: logit_bias, repetition penalty, frequency and presence penalties, the mask of a
grammar; then the likeliest id (temperature 0), or temperature, top_k, top_p, min_p and a draw. Log
probabilities are the model's own, before any of it. What a row gets depends on its own logits, its
own request and the position of the token: on no neighbour, no earlier draw, no device.

Drafts are verified by drawing as if there were none: each id from the model's own distribution, by
its own number, up to the first that is not the draft's. So they change no answer, drawn or greedy.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infire.history import Ahead, History, Penalties
from infire.kernels.draw import Filters, draw, draw_filtered, largest, uniform
from infire.plan import RowResult, SlotOpen
from infire.request import Logprob, SamplingParams

# What decides how a row is computed; one record a slot.
_KNOBS = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("repetition", np.float32),
        ("frequency", np.float32),
        ("presence", np.float32),
        ("num_top", np.int64),
        ("drawn", np.bool_),
        ("filtered", np.bool_),
        ("penalised", np.bool_),
        ("biased", np.bool_),
        ("explained", np.bool_),  # log probabilities are wanted
        ("masked", np.bool_),  # by a grammar
    ]
)
_GREEDY_BELOW = 1e-5  # a temperature by which float32 logits can no longer be divided
# Computed at once: more rows, and each operation's result leaves the cache (measured: 64 rows
# of 49,152 together take twice as long as 8 times 8). A GPU takes all rows together.
_CPU_LOGITS = 1 << 19
_LOWEST, _HIGHEST = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max

_Knobs: TypeAlias = NDArray[np.void]


class _Place(NamedTuple):
    """One id to be chosen."""

    slot: int
    position: int  # of the id in its sequence
    ahead: tuple[int, ...]  # drafts before it: said, if this id is to count


class Sampler:
    """Keeps how each slot samples. One transfer from the device a step: the ids.

    Log probabilities take two more, and filters one, of a few numbers.
    """

    def __init__(self, *, vocab_size: int, num_slots: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._knobs = np.zeros(num_slots, _KNOBS)
        self._seeds = [0] * num_slots
        self._biases: dict[int, tuple[NDArray[np.int64], NDArray[np.float32]]] = {}
        self._masks: dict[int, NDArray[np.int32]] = {}
        self._bits = torch.arange(32, dtype=torch.int32, device=device)
        self._history = History(num_slots, vocab_size, device)

    def open(self, opened: SlotOpen, mask: NDArray[np.int32] | None = None) -> None:
        """Give a slot to a new request. ValueError for a logit_bias outside the vocabulary.

        `mask`: a bit for each id, the lowest first, read in each step: which may be chosen.
        """
        slot, sampling = opened.slot, opened.sampling
        ids = np.array([token_id for token_id, _ in sampling.logit_bias], np.int64)
        values = np.array([value for _, value in sampling.logit_bias], np.float32)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._vocab_size:
            raise ValueError(
                f"logit_bias for ids {ids.min()} to {ids.max()} "
                f"in a vocabulary of {self._vocab_size}"
            )
        self._knobs[slot] = (*_knobs(sampling), mask is not None)
        if mask is not None:
            self._masks[slot] = mask
        self._seeds[slot] = sampling.seed
        self._biases[slot] = (ids, values)
        if self._knobs[slot]["penalised"]:
            self._history.open(opened)

    def sample(
        self,
        logits: Tensor,
        slots: Seq[int],
        positions: Seq[int],
        drafts: Seq[tuple[int, ...]] | None = None,
    ) -> list[RowResult]:
        """One id a slot, and one more for each of its drafts that was right up to the first wrong.

        logits: (R, V) of any float type, R being one a slot and one a draft, slot by slot;
        positions: of the first id to be chosen for each slot.
        """
        drafts = drafts or [()] * len(slots)
        places = [
            _Place(slot, position + n, draft[:n])
            for slot, position, draft in zip(slots, positions, drafts, strict=True)
            for n in range(len(draft) + 1)
        ]
        num_rows = len(places)
        if self._device.type == "cpu":
            num_rows = max(1, _CPU_LOGITS // self._vocab_size)
        parts = [slice(n, n + num_rows) for n in range(0, len(places), num_rows)]
        chosen = [self._choose(logits[part], places[part]) for part in parts]
        ids = torch.cat([ids for ids, _ in chosen]).tolist()
        logprobs = [row for _, rows in chosen for row in rows]
        results = []
        first = 0
        for draft in drafts:
            end = first + 1 + _num_right(draft, ids[first:])
            told = sum(logprobs[first:end], ())
            results.append(RowResult(tuple(ids[first:end]), told))
            first += 1 + len(draft)
        self._remember(slots, results)
        return results

    def _remember(self, slots: Seq[int], results: Seq[RowResult]) -> None:
        """Add what was said to the histories that count."""
        said = [
            (slot, token_id)
            for slot, result in zip(slots, results, strict=True)
            if self._knobs[slot]["penalised"]
            for token_id in result.ids
        ]
        if said:
            self._history.add(*self._on_device(np.array(said, np.int64)).unbind(1))

    def _choose(
        self, logits: Tensor, places: Seq[_Place]
    ) -> tuple[Tensor, list[tuple[Logprob, ...]]]:
        """(R,) int64, and what is to be told of each."""
        rows = self._knobs[[place.slot for place in places]]
        raw = logits.float().nan_to_num(nan=_LOWEST, posinf=_HIGHEST, neginf=_LOWEST)
        adjusted = self._adjust(raw, places, rows)
        ids = adjusted.argmax(-1)
        for filtered in (False, True):
            drawn = np.flatnonzero(rows["drawn"] & (rows["filtered"] == filtered))
            if len(drawn):
                uniforms = [
                    uniform(self._seeds[places[n].slot], places[n].position) for n in drawn.tolist()
                ]
                where = self._on_device(drawn)
                likely = adjusted.index_select(0, where)
                ids[where] = self._draw(likely, uniforms, rows[drawn], filtered=filtered)
        return ids, self._logprobs(raw, ids, rows)

    def _adjust(self, raw: Tensor, places: Seq[_Place], rows: _Knobs) -> Tensor:
        """(R, V), with biases, penalties and masks; `raw` stays as it is."""
        biased = np.flatnonzero(rows["biased"])
        penalised = np.flatnonzero(rows["penalised"])
        masked = np.flatnonzero(rows["masked"])
        if not len(biased) and not len(penalised) and not len(masked):
            return raw
        logits = raw.clone()
        if len(biased):
            ids, values = zip(*(self._biases[places[n].slot] for n in biased.tolist()), strict=True)
            of_row = np.repeat(biased, [len(some) for some in ids])
            where = (self._on_device(of_row), self._on_device(np.concatenate(ids)))
            logits.index_put_(where, self._on_device(np.concatenate(values)), accumulate=True)
        if len(penalised):
            index = self._on_device(penalised)
            penalties = Penalties(
                repetition=self._on_device(rows["repetition"][penalised, None]),
                frequency=self._on_device(rows["frequency"][penalised, None]),
                presence=self._on_device(rows["presence"][penalised, None]),
            )
            some = [places[n] for n in penalised.tolist()]
            of_slots = self._on_device(np.array([place.slot for place in some]))
            logits[index] = self._history.penalise(
                logits.index_select(0, index), of_slots, penalties, self._ahead(some)
            )
        if len(masked):
            self._forbid(logits, masked, [places[n].slot for n in masked.tolist()])
        return logits

    def _forbid(self, logits: Tensor, masked: NDArray[np.int64], slots: Seq[int]) -> None:
        """In place. No id of the lowest logit there is gets chosen, as long as there is another."""
        words = self._on_device(np.stack([self._masks[slot] for slot in slots]))
        allowed = (words[:, :, None] >> self._bits & 1).bool().flatten(1)[:, : self._vocab_size]
        index = self._on_device(masked)
        logits[index] = logits.index_select(0, index).masked_fill_(~allowed, _LOWEST)

    def _ahead(self, places: Seq[_Place]) -> Ahead | None:
        """What the drafts before each place would add to its slot's history."""
        ahead = [(n, i) for n, place in enumerate(places) for i in place.ahead]
        if not ahead:
            return None
        rows, ids = self._on_device(np.array(ahead, np.int64)).unbind(1)
        return Ahead(rows=rows, ids=ids)

    def _draw(
        self, logits: Tensor, uniforms: Seq[float], rows: _Knobs, *, filtered: bool
    ) -> Tensor:
        temperatures = self._on_device(rows["temperature"][:, None])
        # Taken off first, so that a low temperature makes no infinity of the largest.
        probabilities = ((logits - logits.amax(-1, keepdim=True)) / temperatures).softmax(-1)
        numbers = torch.tensor(uniforms, dtype=torch.float64, device=self._device)
        if not filtered:
            return draw(probabilities, numbers)
        filters = Filters(
            top_k=self._on_device(rows["top_k"]),
            top_p=self._on_device(rows["top_p"]),
            min_p=self._on_device(rows["min_p"]),
        )
        return draw_filtered(probabilities, numbers, filters)

    def _logprobs(self, raw: Tensor, ids: Tensor, rows: _Knobs) -> list[tuple[Logprob, ...]]:
        """A row each: nothing for those that did not ask."""
        told: list[tuple[Logprob, ...]] = [()] * len(rows)
        asked = np.flatnonzero(rows["explained"])
        if not len(asked):
            return told
        index = self._on_device(asked)
        logprobs = raw.index_select(0, index).log_softmax(-1)
        top_ids = largest(raw.index_select(0, index), int(rows["num_top"].max()))
        found = torch.cat((ids[index, None], top_ids), -1)
        values = logprobs.gather(-1, found).tolist()
        for n, some_ids, some in zip(asked.tolist(), found.tolist(), values, strict=True):
            count = 1 + int(rows["num_top"][n])
            (token_id, value), *top = list(zip(some_ids, some, strict=True))[:count]
            told[n] = (Logprob(token_id, value, tuple(top)),)
        return told

    def _on_device(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array.copy()).to(self._device)  # copied: a record has odd strides


def _num_right(draft: tuple[int, ...], ids: Seq[int]) -> int:
    """How many of `draft` are the first of `ids`."""
    for n, token_id in enumerate(draft):
        if token_id != ids[n]:
            return n
    return len(draft)


def _knobs(sampling: SamplingParams) -> tuple[float | bool, ...]:
    """In the order of `_KNOBS`, but for the last."""
    penalties = (
        sampling.repetition_penalty,
        sampling.frequency_penalty,
        sampling.presence_penalty,
    )
    return (
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        *penalties,
        sampling.logprobs or 0,
        sampling.temperature >= _GREEDY_BELOW,
        sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0,
        penalties != (1.0, 0.0, 0.0),
        bool(sampling.logit_bias),
        sampling.logprobs is not None,
    )
