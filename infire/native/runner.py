"""Computes plans with compiled kernels: `infire.plan.Runner` without torch. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from infire.block_tags import BlockTags, with_stale
from infire.grammar import Templates
from infire.kernels.cpu.library import Library, Tables, address
from infire.masks import Masks
from infire.model.config import ModelConfig
from infire.native.cache import Cache
from infire.native.program import Program, StepArrays
from infire.native.resident import Resident
from infire.native.sampler import Sampler
from infire.plan import Row, RowResult, SlotOpen, StepPlan
from infire.request import SamplingParams

_SILENT = RowResult()


class NativeRunner:
    """One model, its KV, and what it must remember of each slot between steps."""

    def __init__(  # noqa: PLR0913  one parameter a part
        self,
        config: ModelConfig,
        weights: Resident,
        cache: Cache,
        library: Library,
        *,
        num_slots: int,
        max_step_tokens: int,
        max_tokens: int,
        templates: Templates | None = None,
    ) -> None:
        """`templates`: of grammars, in the vocabulary of the model; None: there are none."""
        self._cache = cache
        self._library = library
        self._masks = Masks(templates, num_slots, config.vocab_size)
        groups = cache.layout.groups
        self._blocks = [
            np.zeros((num_slots, -(-max_tokens // group.block_tokens)), np.int32)
            for group in groups
        ]
        self._lengths = [[0] * num_slots for _ in groups]
        self.tags = BlockTags(groups, self._blocks, cache.num_blocks)
        self._tables = [
            Tables(
                blocks=address(blocks),
                width=blocks.shape[1],
                block_tokens=group.block_tokens,
                window=group.window or 0,
                chunked=group.kind == "chunked",
            )
            for group, blocks in zip(groups, self._blocks, strict=True)
        ]
        self._step = StepArrays(max_tokens=max_step_tokens, num_slots=num_slots)
        self._sampler = Sampler(
            vocab_size=config.vocab_size,
            num_slots=num_slots,
            max_sampled=max_step_tokens,
            num_threads=library.num_threads,
        )
        self.program = Program(
            config,
            weights,
            cache,
            self._tables,
            self._step,
            self._sampler,
            max_tokens=max_tokens,
            inputs=library.input_dtype,
        )

    def run(self, plan: StepPlan) -> list[RowResult]:
        """One forward pass; one result a row, in the plan's order."""
        self._masks.close(plan.closes)
        for opened in plan.opens:  # which also ends what was there
            for lengths in self._lengths:
                lengths[opened.slot] = 0
            self._sampler.open(opened, self._masks.open(opened))
            self.tags.open(opened.slot)
        for row in plan.rows:
            if row.new_blocks:
                for n, blocks in enumerate(row.new_blocks):
                    self._extend(n, row.slot, blocks)
                self.tags.extend(row)
        fresh = self.tags.fresh(plan.rows)
        if len(fresh) == len(plan.rows):  # as it should be
            return self._compute(plan.rows)
        return with_stale(plan.rows, fresh, self._compute(fresh) if fresh else [])

    def _compute(self, rows: Seq[Row]) -> list[RowResult]:
        self._fill(rows)
        sampling = [row for row in rows if row.sample]
        if not sampling:
            self._library.run(self.program.forward)
            return [_SILENT] * len(rows)
        self._masks.fill(sampling)
        self._step.record.num_sampled = self._sampler.prepare(sampling)
        self._library.run(self.program.sampling)
        results = self._masks.settle(sampling, self._sampler.results())
        if len(sampling) == len(rows):
            return results
        some = iter(results)
        return [next(some) if row.sample else _SILENT for row in rows]

    def save(self, block: int) -> bytes:
        """As `infire.plan.Runner`."""
        return self._cache.save(block)

    def load(self, block: int, content: bytes) -> None:
        """As `infire.plan.Runner`."""
        self._cache.load(block, content)

    def export(self, block_ids: Seq[Seq[int]], num_tokens: int, path: str, start: int = 0) -> int:
        """As `infire.plan.Runner`."""
        return self._cache.export(block_ids, num_tokens, path, start)

    def adopt(
        self, block_ids: Seq[Seq[int]], num_tokens: int, path: str, piece_ends: Seq[int] = ()
    ) -> None:
        """As `infire.plan.Runner`."""
        self._cache.adopt(block_ids, num_tokens, path, piece_ends)

    def warm_up(self) -> None:
        """Make a step, so that the first request waits for no page of the weights.

        Writes to blocks 0 of the cache: only before the first plan.
        """
        sampling = SamplingParams(max_tokens=1, seed=0)
        opened = SlotOpen(slot=0, token_ids=(0,), num_prompt=1, sampling=sampling)
        blocks = ((0,),) * len(self._tables)
        tags = ((0,),) * len(self._tables)  # no block was handed out yet
        row = Row(slot=0, start=0, num_new=1, ids=(0,), new_blocks=blocks, new_tags=tags)
        self.run(StepPlan(step=0, opens=(opened,), rows=(row,)))

    def _extend(self, group: int, slot: int, blocks: Seq[int]) -> None:
        """Append to the slot's table of a group."""
        length = self._lengths[group][slot]
        self._blocks[group][slot, length : length + len(blocks)] = blocks
        self._lengths[group][slot] = length + len(blocks)

    def _fill(self, rows: Seq[Row]) -> None:
        """The arrays of the step. A row's drafts follow its ids, and are sampled too."""
        step = self._step
        token_ids: list[int] = []
        positions: list[int] = []
        sampled: list[int] = []
        spans = []
        for row in rows:
            assert isinstance(row.ids, tuple), "one step is in flight at a time: its ids are known"
            first = len(token_ids)
            token_ids += row.ids
            token_ids += row.draft_ids
            end = len(token_ids)
            spans.append((first, row.start, end - first, row.slot))
            positions += range(row.start, row.start + end - first)
            if row.sample:
                sampled += range(end - len(row.draft_ids) - 1, end)
        step.token_ids[: len(token_ids)] = token_ids
        step.positions[: len(token_ids)] = positions
        step.sampled[: len(sampled)] = sampled
        step.spans[: len(spans)] = spans
        step.record.num_tokens = len(token_ids)
        step.record.num_spans = len(spans)
