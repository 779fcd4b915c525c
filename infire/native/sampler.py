"""How each slot samples, as records that the compiled kernels read. Knows no logits and no KV.

The semantics are `infire.sampler`'s; `sample.cpp` computes them. A step costs the host a few calls
on arrays, whatever the requests of its rows ask for.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from infire.kernels.cpu.library import SampleArgs, aligned
from infire.plan import Row, RowResult, SlotOpen
from infire.request import Logprob, SamplingParams

# `SampleRow` of ops.h: how one request samples in a step.
ROW = np.dtype(
    [
        ("first", np.int64),
        ("num_drafts", np.int64),
        ("drafts", np.uintp),
        ("index", np.int64),
        ("seed", np.uint64),
        ("temperature", np.float64),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("repetition", np.float64),
        ("frequency", np.float64),
        ("presence", np.float64),
        ("num_biases", np.int64),
        ("bias_ids", np.uintp),
        ("bias_values", np.uintp),
        ("seen", np.uintp),
        ("said", np.uintp),
        ("num_top", np.int64),
        ("limit", np.int64),
        ("allowed", np.uintp),
    ]
)
MOST_CANDIDATES = 64  # as in candidates.h
CANDIDATES_BYTES = 1088  # sizeof(Candidates)
MOST_IDS = 1 << 19  # of a vocabulary: a row of logits fits into a thread's scratch memory
_GREEDY_BELOW = 1e-5  # a temperature by which float32 logits can no longer be divided


class Sampler:
    """Keeps how each slot samples, and the memory through which logits become ids.

    In a step: `prepare`, then the head and `sample` with `args`, then `results`.

    `limits`, (R,) int64, tells the head what to do at each sampled position: 0, write the logits
    to row n of `args.logits`; otherwise collect so many candidates, and write nothing.
    """

    def __init__(
        self, *, vocab_size: int, num_slots: int, max_sampled: int, num_threads: int
    ) -> None:
        if vocab_size > MOST_IDS:
            raise ValueError(f"a vocabulary of {vocab_size} exceeds {MOST_IDS}")
        self._vocab_size = vocab_size
        self._slots = np.zeros(num_slots, ROW)
        self._rows = np.zeros(num_slots, ROW)
        # One row of words a record: numpy copies those an order of magnitude faster.
        self._slot_words = self._slots.view(np.int64).reshape(num_slots, -1)
        self._row_words = self._rows.view(np.int64).reshape(num_slots, -1)
        self._biases: dict[int, tuple[NDArray[np.int32], NDArray[np.float32]]] = {}
        self._histories: dict[int, tuple[NDArray[np.uint8], NDArray[np.int32]]] = {}

        self.limits = np.zeros(max_sampled, np.int64)
        self._places = np.arange(max_sampled, dtype=np.int64)
        self._sizes = np.zeros(2, np.int64)  # requests and sampled positions of the step
        self._drafts = np.zeros(max_sampled, np.int32)
        # Of these two, a page takes memory once it is written to: once a request needs it.
        self._candidates = aligned(num_threads * max_sampled, CANDIDATES_BYTES, dtype=np.uint8)
        self._logits = aligned(max_sampled, vocab_size, dtype=np.float32)
        self._ids = np.zeros(max_sampled, np.int32)
        self._num_ids = np.zeros(num_slots, np.int64)
        self._logprobs = np.zeros(max_sampled, np.float32)
        self.args = SampleArgs(
            num_rows=self._sizes[:1].ctypes.data,
            rows=self._rows.ctypes.data,
            num_sampled=self._sizes[1:].ctypes.data,
            vocabulary=vocab_size,
            logits=self._logits.ctypes.data,
            candidates=self._candidates.ctypes.data,
            ids=self._ids.ctypes.data,
            num_ids=self._num_ids.ctypes.data,
            logprobs=self._logprobs.ctypes.data,
        )
        self._make_room(most_top=0)

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
        record = self._slots[slot]
        self._biases.pop(slot, None)
        self._histories.pop(slot, None)
        self._slot_words[slot] = 0
        _write(record, sampling, self._vocab_size)
        if len(ids):
            self._biases[slot] = biases = (ids.astype(np.int32), values)
            record["num_biases"] = len(ids)
            record["bias_ids"], record["bias_values"] = (some.ctypes.data for some in biases)
        if _penalised(sampling):
            self._histories[slot] = history = _history(opened, self._vocab_size)
            record["seen"], record["said"] = (some.ctypes.data for some in history)
        if mask is not None:  # whoever opens the slot keeps it
            record["allowed"], record["limit"] = mask.ctypes.data, 0
        if record["num_top"] > self.args.most_top:
            self._make_room(most_top=int(record["num_top"]))

    def prepare(self, rows: Seq[Row]) -> int:
        """R, after writing what `args` and `limits` say of these rows, all of which sample.

        A row has one sampled position more than it has drafts, and they lie together.
        """
        count = len(rows)
        slots = [row.slot for row in rows]
        self._slot_words.take(slots, axis=0, out=self._row_words[:count], mode="clip")
        step = self._rows[:count]
        step["index"] = [row.start + row.num_new for row in rows]
        step["first"] = self._places[:count]
        num_sampled = count
        drafts = [token_id for row in rows for token_id in row.draft_ids]
        if drafts:
            num_sampled += len(drafts)
            self._place_drafts(rows, drafts)
        else:
            self.limits[:count] = step["limit"]
        self._sizes[:] = count, num_sampled
        return num_sampled

    def results(self) -> list[RowResult]:
        """What the rows of the last `prepare` got, in their order."""
        count, num_sampled = self._sizes.tolist()
        ids = self._ids[:num_sampled].tolist()
        step = self._rows[:count]
        explained = step["num_top"].max(initial=-1) >= 0
        if num_sampled == count and not explained:
            return [RowResult((token_id,)) for token_id in ids]
        firsts = step["first"].tolist()
        ends = (step["first"] + self._num_ids[:count]).tolist()
        tops = step["num_top"].tolist()
        return [
            RowResult(
                tuple(ids[first:end]),
                () if top < 0 else tuple(self._explain(n, ids[n], top) for n in range(first, end)),
            )
            for first, end, top in zip(firsts, ends, tops, strict=True)
        ]

    def _place_drafts(self, rows: Seq[Row], drafts: Seq[int]) -> None:
        step = self._rows[: len(rows)]
        counts = np.array([len(row.draft_ids) for row in rows])
        before = counts.cumsum() - counts
        self._drafts[: len(drafts)] = drafts
        step["num_drafts"] = counts
        step["drafts"] = self._drafts.ctypes.data + before * self._drafts.itemsize
        step["first"] += before
        self.limits[: len(rows) + len(drafts)] = step["limit"].repeat(counts + 1)

    def _explain(self, position: int, token_id: int, num_top: int) -> Logprob:
        ids = self._top_ids[position, :num_top].tolist()
        values = self._top_logprobs[position, :num_top].tolist()
        top = tuple(zip(ids, values, strict=True))
        return Logprob(token_id, float(self._logprobs[position]), top)

    def _make_room(self, *, most_top: int) -> None:
        """For so many of the likeliest ids at each position."""
        self._top_ids = np.empty((len(self._ids), most_top), np.int32)
        self._top_logprobs = np.empty((len(self._ids), most_top), np.float32)
        self.args.most_top = most_top
        self.args.top_ids = self._top_ids.ctypes.data
        self.args.top_logprobs = self._top_logprobs.ctypes.data


def _write(record: np.void, sampling: SamplingParams, vocab_size: int) -> None:
    greedy = sampling.temperature < _GREEDY_BELOW
    record["seed"] = sampling.seed & (1 << 64) - 1
    record["temperature"] = 0.0 if greedy else sampling.temperature
    record["top_k"] = top_k = min(sampling.top_k, vocab_size)
    record["top_p"] = sampling.top_p
    record["min_p"] = sampling.min_p
    record["repetition"] = sampling.repetition_penalty
    record["frequency"] = sampling.frequency_penalty
    record["presence"] = sampling.presence_penalty
    record["num_top"] = -1 if sampling.logprobs is None else min(sampling.logprobs, vocab_size)
    if sampling.logprobs is None and not sampling.logit_bias and not _penalised(sampling):
        limit = 1 if greedy else top_k
        record["limit"] = limit if limit <= MOST_CANDIDATES else 0


def _penalised(sampling: SamplingParams) -> bool:
    return (
        sampling.repetition_penalty,
        sampling.frequency_penalty,
        sampling.presence_penalty,
    ) != (1.0, 0.0, 0.0)


def _history(opened: SlotOpen, vocab_size: int) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Which ids a sequence has, and how often each is in its output; `sample` keeps both up."""
    ids = np.array(opened.token_ids, np.int64)
    seen = np.zeros(vocab_size, np.uint8)
    seen[ids] = 1
    said = np.bincount(ids[opened.num_prompt :], minlength=vocab_size).astype(np.int32)
    return seen, said
