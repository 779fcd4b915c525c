"""Which ids may follow in each slot whose request has a grammar. Knows no logits.

A runner opens slots, fills the masks of the rows that are about to sample, and tells what they
sampled. Slots without a grammar cost nothing. A grammar that turns out too complex ends its own
request; what the others of the step may say depends on none but their own.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from time import thread_time
from typing import TypeAlias

import numpy as np
from llguidance import LLExecutor, LLMatcher
from numpy.typing import NDArray

from infire.grammar import BadGrammar, Template, Templates, said
from infire.plan import Row, RowResult, SlotOpen

_PARALLEL = 32  # masks from which on several threads are used: 16 are slower so, on 2 busy cores
_MOST_S = 0.1  # of CPU, for one mask: every stream waits for it
SLOW = "a token takes too long to check"
_NOT_OFFERED = "this engine has no vocabulary for grammars"

Bit: TypeAlias = tuple[int, np.int32]  # the word of a mask, and the bit in it


@dataclass(slots=True)
class _State:
    """Where one sequence is in its grammar."""

    stop_ids: tuple[int, ...]
    mask: NDArray[np.int32]
    output: list[int]
    template: Template | None = None
    matcher: LLMatcher | None = None
    renewed: bool = False  # begun anew, once, with empty tables
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
        output = list(opened.token_ids[opened.num_prompt :])
        state = _State(stop_ids=stop_ids, mask=mask, output=output, stops=stops)
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
        live = [state for row in rows if (state := states.get(row.slot)) and state.matcher]
        self._compute(live)
        for state in live:
            self._judge(state)

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
        if state.output and not state.matcher.consume_tokens(state.output):
            raise BadGrammar("the answer so far does not match it")

    def _judge(self, state: _State) -> None:
        """Complete a mask, or find that there is none."""
        if state.matcher is not None and state.matcher.is_error() and not state.renewed:
            self._renew(state)
        if (matcher := state.matcher) is None:
            return
        if matcher.is_error():
            self._fail(state, said(matcher))
            return
        _set_ends(state, self._ends, accepting=matcher.is_accepting())
        if not state.mask.any():
            self._fail(state, "no token of this model can follow")

    def _renew(self, state: _State) -> None:
        """Once more from the beginning: what all answers to this grammar have found together may
        have filled its tables, without any being too complex by itself."""
        assert self._templates is not None
        assert state.template is not None
        state.renewed = True
        try:
            state.template = self._templates.renew(state.template)
            state.matcher = state.template.matcher()
            if not state.output or state.matcher.consume_tokens(state.output):
                self._compute([state])
        except BadGrammar as error:
            self._fail(state, str(error))

    def _compute(self, live: Seq[_State]) -> None:
        if len(live) < _PARALLEL:
            for state in live:
                self._compute_one(state)
            return
        assert self._masks is not None
        if self._executor is None:
            self._executor = LLExecutor()
        begin, width = self._masks.ctypes.data, self._masks.strides[0]
        places = [
            (state.matcher, (state.mask.ctypes.data - begin) // width)
            for state in live
            if state.matcher is not None
        ]
        self._executor.unsafe_compute_mask_ptr(places, begin, width, len(self._masks))

    def _compute_one(self, state: _State) -> None:
        assert state.matcher is not None
        began = thread_time()
        state.matcher.unsafe_compute_mask_ptr(state.mask.ctypes.data, state.mask.nbytes)
        if thread_time() - began > _MOST_S and state.template is not None:
            assert self._templates is not None
            self._templates.blame(state.template.grammar, SLOW)
            self._fail(state, SLOW)

    def _settle(self, state: _State, result: RowResult) -> RowResult:
        if state.matcher is None:
            return RowResult(fault=state.fault)
        (token_id,) = result.ids  # drafts are not for rows with a grammar
        if token_id in state.stop_ids:
            return result
        if not state.matcher.consume_token(token_id):
            self._fail(state, said(state.matcher))
            return RowResult(fault=state.fault)
        state.output.append(token_id)
        if not state.stop_ids and is_complete(state.matcher, state.mask, self._ends):
            return RowResult(result.ids, result.logprobs, ended=True)
        return result

    def _fail(self, state: _State, why: str) -> None:
        """Let the row sample anything: what it gets does not count."""
        state.fault, state.matcher = why, None
        state.mask.fill(-1)


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
