"""The scheduler's decision, as a value: self-contained, serialisable, what rank 0 broadcasts.

A runner keeps a table of slots; a plan says what changes in it and which rows compute. Nothing
here refers to a `Sequence`, so a plan can be replayed on another process or rank.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

from msgspec import Struct

from infire.request import Grammar, Logprob, SamplingParams


class SlotOpen(Struct, frozen=True, kw_only=True):
    """A slot gets a new tenant; everything the runner kept there is forgotten."""

    slot: int
    token_ids: tuple[int, ...]  # everything known so far: inputs, and history for penalties
    num_prompt: int
    sampling: SamplingParams
    adapter: str | None = None
    grammar: Grammar | None = None


class Sampled(Struct, frozen=True):
    """The input id is what row `row` of step `step` sampled: not known when the plan was made."""

    step: int
    row: int


# Made by the thousand a second, and never part of a cycle: `gc=False` keeps them from starting
# collections.
class Row(Struct, frozen=True, kw_only=True, gc=False):
    """What one slot computes in this step: positions start .. start + num_new - 1.

    With drafts, also the positions of these: the row then samples after its last known token and
    after each draft, and its result is the drafts up to the first that was not sampled, and one
    id more.
    """

    slot: int
    start: int
    num_new: int
    ids: tuple[int, ...] | Sampled  # num_new ids; `Sampled` when they come from a step in flight
    new_blocks: tuple[tuple[int, ...], ...] = ()  # per KV group: appended to the slot's block table
    new_tags: tuple[tuple[int, ...], ...] = ()  # of these blocks, as they were handed out
    draft_ids: tuple[int, ...] = ()  # proposed continuation, verified in this step
    sample: bool = True  # False: a chunk that does not reach the last known token


class StepPlan(Struct, frozen=True, kw_only=True):
    step: int  # counts up from 1
    opens: tuple[SlotOpen, ...] = ()
    rows: tuple[Row, ...] = ()
    closes: tuple[int, ...] = ()  # slots free from before this step on

    def __bool__(self) -> bool:
        return bool(self.rows)


class RowResult(Struct, frozen=True, gc=False):
    """What one row sampled: none for an inner chunk, several when drafts were accepted."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    stale: bool = False  # nothing was computed: a block of the row is no longer its own
    ended: bool = False  # by its grammar, nothing may follow
    fault: str = ""  # why its grammar allows no id: nothing was sampled


class Runner(Protocol):
    """Computes plans. `CountingRunner` (tests) and `infire.runner.ModelRunner` are the two."""

    def run(self, plan: StepPlan) -> Seq[RowResult]:
        """One forward pass; one result a row, in the plan's order."""

    def save(self, block: int) -> bytes:
        """The KV in a block of the one group, as `load` takes it."""

    def load(self, block: int, content: bytes) -> None:
        """Have in a block what `save` gave of another, or of this one, in any process."""

    def export(self, block_ids: Seq[Seq[int]], num_tokens: int, path: str, start: int = 0) -> int:
        """Write KV to a new file at `path`, laid out as `KVLayout.exported_bytes`; its size.

        `block_ids` is a block table a group, as rows have it: what lies before a window is a hole
        (see `infire.blocks`), which neither this nor `adopt` touches. From `start` on it is one
        more piece of a file that has the tokens before it.
        """

    def adopt(
        self, block_ids: Seq[Seq[int]], num_tokens: int, path: str, piece_ends: Seq[int] = ()
    ) -> None:
        """Read what `export` wrote, in pieces that end there, into these blocks. ValueError on a
        file of another size, or pieces that cannot be."""
