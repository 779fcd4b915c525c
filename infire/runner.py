"""Computes plans with a model: `infire.plan.Runner` for real. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from infire.batch import BlockTables, build
from infire.block_tags import BlockTags, with_stale
from infire.grammar import Templates
from infire.kernels.tiles import TileShape
from infire.kv_cache import KVCache
from infire.masks import Masks
from infire.model.transformer import Transformer
from infire.plan import Row, RowResult, SlotOpen, StepPlan
from infire.request import SamplingParams
from infire.sampler import Sampler


class ModelRunner:
    """One model, its KV, and what it must remember of each slot between steps."""

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        *,
        num_slots: int,
        max_tokens: int,
        templates: Templates | None = None,
    ) -> None:
        """`templates`: of grammars, in the vocabulary of the model; None: there are none."""
        config = model.config
        weight = model.norm.weight
        self._model = model
        self._cache = cache
        self._tables = BlockTables(cache.layout.groups, num_slots, max_tokens)
        self.tags = BlockTags(cache.layout.groups, self._tables.arrays, cache.num_blocks)
        self._sampler = Sampler(
            vocab_size=config.vocab_size, num_slots=num_slots, device=weight.device
        )
        self._masks = Masks(templates, num_slots, config.vocab_size)
        self._shapes = [
            TileShape(
                block_tokens=group.block_tokens,
                group=config.num_heads // group.num_heads,
                dtype=weight.dtype,
                device=weight.device,
            )
            for group in cache.layout.groups
        ]

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> list[RowResult]:
        """One forward pass; one result a row, in the plan's order."""
        self._masks.close(plan.closes)
        for opened in plan.opens:  # which also ends what was there
            self._tables.clear(opened.slot)
            self._sampler.open(opened, self._masks.open(opened))
            self.tags.open(opened.slot)
        for row in plan.rows:
            if row.new_blocks:
                self._tables.extend(row.slot, row.new_blocks)
                self.tags.extend(row)
        fresh = self.tags.fresh(plan.rows)
        return with_stale(plan.rows, fresh, self._compute(fresh) if fresh else [])

    def _compute(self, computed: Seq[Row]) -> list[RowResult]:
        batch = build(computed, self._tables, self._shapes)
        hidden = self._model.forward(batch, self._cache.layers)
        rows = [row for row in computed if row.sample]
        if not rows:
            return [RowResult()] * len(computed)
        self._masks.fill(rows)
        sampled = self._sampler.sample(
            self._model.logits(hidden[batch.sampled]),
            [row.slot for row in rows],
            [row.start + row.num_new for row in rows],
            [row.draft_ids for row in rows],
        )
        results = iter(self._masks.settle(rows, sampled))
        return [next(results) if row.sample else RowResult() for row in computed]

    @torch.inference_mode()
    def save(self, block: int) -> bytes:
        """As `infire.plan.Runner`."""
        return self._cache.save(block)

    @torch.inference_mode()
    def load(self, block: int, content: bytes) -> None:
        """As `infire.plan.Runner`."""
        self._cache.load(block, content)

    @torch.inference_mode()
    def export(self, block_ids: Seq[Seq[int]], num_tokens: int, path: str, start: int = 0) -> int:
        """As `infire.plan.Runner`."""
        return self._cache.export(block_ids, num_tokens, path, start)

    @torch.inference_mode()
    def adopt(
        self, block_ids: Seq[Seq[int]], num_tokens: int, path: str, piece_ends: Seq[int] = ()
    ) -> None:
        """As `infire.plan.Runner`."""
        self._cache.adopt(block_ids, num_tokens, path, piece_ends)

    def warm_up(self) -> None:
        """Make one step of a few tokens, so that the first request does not pay for it.

        Writes to blocks 0 of the cache: only before the first plan.
        """
        num_tokens = min(4, self._shapes[0].block_tokens)
        ids = (0,) * num_tokens
        sampling = SamplingParams(max_tokens=1, seed=0, top_p=0.9)
        opened = SlotOpen(slot=0, token_ids=ids, num_prompt=num_tokens, sampling=sampling)
        blocks = ((0,),) * len(self._shapes)
        row = Row(
            slot=0, start=0, num_new=num_tokens, ids=ids, new_blocks=blocks, new_tags=blocks
        )  # tag 0: no block was handed out yet
        self.run(StepPlan(step=0, opens=(opened,), rows=(row,)))
