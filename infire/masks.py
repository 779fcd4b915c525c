"""Which ids may follow in each slot whose request has a grammar. Knows no logits.

A runner opens slots, fills the masks of the rows that are about to sample, and tells what they
sampled. Slots without a grammar cost nothing. A grammar that turns out too complex ends its own
request; what the others of the step may say depends on none but their own.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from llguidance import LLExecutor, LLMatcher
from numpy.typing import NDArray

from infire.grammar import BadGrammar, Template, Templates, said
from infire.plan import Row, RowResult, SlotOpen

_PARALLEL = 8  # masks from which on several threads are sooner than one
_NOT_OFFERED = "this engine has no vocabulary for grammars"

Bit: TypeAlias = tuple[int, np.int32]  # the word of a mask, and the bit in it


@dataclass(slots=True)
class _State:
    """Where one sequence is in its grammar."""

    stop_ids: tuple[int, ...]
    mask: NDArray[np.int32]
    template: Template | None = None
    matcher: LLMatcher | None = None
    fault: str = ""  # why nothing can be said of what follows
    stops: list[Bit] = field(default_factory=list)  # of each stop id


class Masks:
    """One matcher a slot with a grammar, and one mask: (words,) int32, the lowest id first."""

    def __init__(self, templates: Templates | None, num_slots: int, vocab_size: int) -> None:
        self._templates = templates
        self._shape = (num_slots, -(-vocab_size // 32))
        self._masks: NDArray[np.int32] | None = None  # made for the first grammar
        self._states: dict[int, _State] = {}
        self._executor: LLExecutor | None = None
        self._ends = ends_of(templates) if templates else []

    def open(self, opened: SlotOpen) -> NDArray[np.int32] | None:
        """Begin anew in a slot, after what its sequence has said. Its mask; None: all may follow.

        The mask stays where it is for as long as the slot is this sequence's.
        """
        self._states.pop(opened.slot, None)
        if opened.grammar is None:
            return None
        if self._masks is None:
            self._masks = np.full(self._shape, -1, np.int32)
        mask: NDArray[np.int32] = self._masks[opened.slot]
        stop_ids = opened.sampling.stop_ids
        stops = [_place(token_id) for token_id in stop_ids]
        state = _State(stop_ids=stop_ids, mask=mask, stops=stops)
        self._states[opened.slot] = state
        try:
            self._begin(state, opened)
        except BadGrammar as error:
            self._fail(state, str(error))
        return mask

    def close(self, slots: Seq[int]) -> None:
        """Forget what is in these slots, if anything is."""
        if self._states:
            for slot in slots:
                self._states.pop(slot, None)

    def fill(self, rows: Seq[Row]) -> None:
        """Write the masks of those of `rows` that have one: all of them are about to sample."""
        states = self._states
        if not states:
            return
        some = [states[row.slot] for row in rows if row.slot in states]
        live = [(state, state.matcher) for state in some if state.matcher is not None]
        self._compute(live)
        for state, matcher in live:
            if matcher.is_error():
                self._fail(state, said(matcher))
                continue
            _set_ends(state, self._ends, accepting=matcher.is_accepting())
            if not state.mask.any():
                self._fail(state, "no token of this model can follow")

    def settle(self, rows: Seq[Row], results: list[RowResult]) -> list[RowResult]:
        """`results` of the `rows` that `fill` had, as they count: some ended, some failed."""
        states = self._states
        if not states:
            return results
        return [
            self._settle(states[row.slot], result) if row.slot in states else result
            for row, result in zip(rows, results, strict=True)
        ]

    def _begin(self, state: _State, opened: SlotOpen) -> None:
        """Raises `BadGrammar`."""
        if self._templates is None:
            raise BadGrammar(_NOT_OFFERED)
        assert opened.grammar is not None
        state.template = self._templates.get(opened.grammar)
        state.matcher = state.template.matcher()
        output = list(opened.token_ids[opened.num_prompt :])
        if output and not state.matcher.consume_tokens(output):
            raise BadGrammar("the answer so far does not match it")

    def _compute(self, live: Seq[tuple[_State, LLMatcher]]) -> None:
        if len(live) < _PARALLEL:
            for state, matcher in live:
                matcher.unsafe_compute_mask_ptr(state.mask.ctypes.data, state.mask.nbytes)
            return
        assert self._masks is not None
        if self._executor is None:
            self._executor = LLExecutor()
        begin, width = self._masks.ctypes.data, self._masks.strides[0]
        places = [(matcher, (state.mask.ctypes.data - begin) // width) for state, matcher in live]
        self._executor.unsafe_compute_mask_ptr(places, begin, width, len(self._masks))

    def _settle(self, state: _State, result: RowResult) -> RowResult:
        if state.matcher is None:
            return RowResult(fault=state.fault)
        (token_id,) = result.ids  # drafts are not for rows with a grammar
        if token_id in state.stop_ids:
            return result
        if not state.matcher.consume_token(token_id):
            self._fail(state, said(state.matcher))
            return RowResult(fault=state.fault)
        if not state.stop_ids and self._is_complete(state, state.matcher):
            return RowResult(result.ids, result.logprobs, ended=True)
        return result

    def _is_complete(self, state: _State, matcher: LLMatcher) -> bool:
        """Whether nothing can follow, where no id would say so."""
        return is_complete(matcher, state.mask, self._ends)

    def _fail(self, state: _State, why: str) -> None:
        """Let the row sample anything: what it gets does not count."""
        state.fault, state.matcher = why, None
        state.mask.fill(-1)
        if self._templates and state.template:  # whose tables may be full
            self._templates.forget(state.template.grammar)


def ends_of(templates: Templates) -> list[Bit]:
    """Of the ids that end any answer, as far as llguidance knows: requests have their own."""
    return [_place(token_id) for token_id in templates.vocabulary.tokenizer.eos_tokens]


def is_complete(matcher: LLMatcher, mask: NDArray[np.int32], ends: Seq[Bit]) -> bool:
    """Whether an output matches, and no longer one does. Writes to `mask`."""
    if not matcher.is_accepting():
        return False
    if not matcher.is_stopped():
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        for word, bit in ends:
            mask[word] &= ~bit
        return not mask.any() and not matcher.is_error()
    return not matcher.is_error()


def _set_ends(state: _State, ends: Seq[Bit], *, accepting: bool) -> None:
    """The ids that end an answer may follow where it matches, and those of this request only."""
    mask = state.mask
    for word, bit in ends:
        mask[word] &= ~bit
    for word, bit in state.stops:
        if accepting:
            mask[word] |= bit
        else:
            mask[word] &= ~bit


def _place(token_id: int) -> Bit:
    bit = 1 << token_id % 32
    return token_id // 32, np.int32(bit if bit < 1 << 31 else bit - (1 << 32))
