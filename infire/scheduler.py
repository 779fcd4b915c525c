"""Decide what the next step computes. No tensors, no clock, no I/O.

A sequence is behind by `len(token_ids) - num_computed` tokens, and steps let it catch up. There is
no prefill state and no decode state: a new prompt is many behind, a decoding sequence is one
behind, and a sequence whose KV came from another worker is one behind too.

Who goes first and who gives way is for `infire.tenants` to say.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from infire.admission import Limits, Refusal, admit
from infire.blocks import BlockPool, Tables
from infire.entry import Entry, cut, make_entry, make_row, open_slot
from infire.kv_layout import KVGroup
from infire.notes import Gauges
from infire.plan import Row, RowResult, StepPlan
from infire.prefix import Chain, root
from infire.request import Sequence, Step
from infire.speculate import Drafter
from infire.step_times import StepTimes
from infire.tenants import Tenants, Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Adoption:
    """KV to be read into blocks before the next plan is made."""

    request_id: str
    block_ids: Tables  # `HOLE` before the window
    num_tokens: int


class Scheduler:
    """Owns every sequence from `add` to its end, and through `Tenants` all blocks and slots.

    One pool a KV group. A plan is made, run, and committed before the next is made; `drop` may
    come at any time, `add` too, `place` only between commit and plan.
    """

    def __init__(
        self,
        pools: Seq[BlockPool],
        groups: Seq[KVGroup],
        limits: Limits,
        *,
        model_digest: str = "",
        tier: Tier | None = None,
    ) -> None:
        self._limits = limits
        self._model_digest = model_digest
        # As many rows as a step has tokens: whoever runs can be given one token in every step.
        self._tenants = Tenants(
            pools,
            groups,
            num_slots=min(limits.max_running, limits.max_step_tokens),
            max_step_tokens=limits.max_step_tokens,
            tier=tier if len(groups) == 1 and groups[0].window is None else None,
        )
        self.take_fills = self._tenants.take_fills
        self._space = self._tenants.space
        self.take_unsaved = self._space.take_unsaved
        self.has_cached = self._space.has
        self.idle_blocks = self._space.idle
        self._forgets = self._space.forgets
        self._longest = min(self._space.longest, limits.context_window or self._space.longest)
        self._entries: dict[str, Entry] = {}
        self._held: dict[str, Entry] = {}  # finished, blocks kept for a hand-over
        self._flight: list[Entry] = []  # entries of the rows of the plan in flight
        self._planned: list[Entry] = []  # of the plan being made
        self._budget = 0  # tokens left of the plan being made
        self._times = StepTimes()
        self._num_arrived = 0
        self._num_steps = 0
        self._num_prompt_computed = 0
        self._num_output = 0
        self._num_proposed = 0
        self._num_accepted = 0
        self._num_cached = 0
        self._lost: list[tuple[str, str]] = []
        self._gained: dict[str, Entry] = {}  # to be held, and computed further since last asked

    @property
    def max_sequence_tokens(self) -> int:
        """The longest sequence, prompt and output, that this engine can ever hold."""
        return self._longest

    def add(self, seq: Sequence, num_adopted: int = 0) -> None:
        """Queue `seq`; raise `Refusal` when it can never run.

        With `num_adopted`, it waits for blocks, and `place` then asks for the KV of that many.
        """
        if seq.request_id in self._entries:
            raise Refusal("bad_input", f"request id {seq.request_id!r} is in use")
        admit(
            seq,
            num_adopted=num_adopted,
            longest=self._longest,
            vocab_size=self._limits.vocab_size,
        )
        self._num_arrived += 1
        entry = make_entry(
            seq,
            arrival=self._num_arrived,
            num_adopted=num_adopted,
            max_draft_ids=self._limits.max_draft_ids,
            chain=self._chain(seq),
        )
        self._entries[seq.request_id] = entry
        self._tenants.add(entry)

    def drop(self, request_id: str) -> None:
        """Forget a request wherever it is; its blocks are free now, or when its step ends."""
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return
        if self._held.pop(request_id, None):
            self._tenants.free_blocks(entry)
            return
        self._tenants.stop(entry)
        if entry in self._flight:
            entry.dropped = True
        elif entry.seq.slot is not None:
            self._tenants.free_slot(entry)
            self._tenants.free_blocks(entry)

    @property
    def forgets(self) -> bool:
        """Whether KV that was computed may be gone before a sequence ends."""
        return self._forgets

    def take_gained(self) -> list[tuple[Sequence, bool]]:
        """Sequences to be held that were computed further since the last call, and whether they
        are held now; but for those whose blocks are no longer their own."""
        gained, self._gained = self._gained, {}
        found = []
        for name, entry in gained.items():
            if self._entries.get(name) is not entry:
                continue
            if self._tenants.owns(entry):
                found.append((entry.seq, name in self._held))
            elif self._held.pop(name, None):  # while it runs, the next step would find out
                del self._entries[name]
                self._lost.append((name, ""))
                self._tenants.free_own_blocks(entry)
        return found

    def take_lost(self) -> list[tuple[str, str]]:
        """Requests that have ended since the last call, and what their grammar had to do with it:
        with "", a block was no longer theirs."""
        lost, self._lost = self._lost, []
        return lost

    def take_cache_news(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Keys that came into the prefix cache since the last call, and those that it lost."""
        return self._space.take_news()

    def place(self) -> list[Adoption]:
        """Give blocks to sequences whose KV comes from a file, as far as there is room.

        Their KV must be read before the next `plan`; one that cannot be read must be dropped.
        """
        placed = []
        while entry := self._tenants.next(adopted=True):
            self._tenants.start_adopted(entry)
            seq = entry.seq
            placed.append(
                Adoption(
                    request_id=seq.request_id,
                    block_ids=seq.block_ids,
                    num_tokens=seq.num_computed,
                )
            )
        return placed

    def plan(self) -> StepPlan:
        """What to compute next, in flight until `commit`; false when nothing can be computed.

        Sequences one token behind come first; then those further behind and new ones, in order;
        then drafts, with what is left.
        """
        assert not self._flight, "one plan is in flight at a time"
        num_preemptions = self._tenants.num_preemptions
        self._budget = self._limits.max_step_tokens  # enough for one token of each that runs
        behind = []
        planned = self._planned
        for entry in self._tenants.running:  # preempting removes only entries after this one
            seq = entry.seq
            num_computed = seq.num_computed
            if len(seq.token_ids) - num_computed > 1:
                behind.append(entry)
            elif num_computed < entry.num_covered:  # nearly always: there is a token for every slot
                entry.num_planned = 1
                planned.append(entry)
            else:
                self._give(entry)
        self._budget = self._limits.max_step_tokens - len(planned)
        for entry in behind:
            self._start_new(before=entry)
            if entry.seq.slot is not None:  # not preempted by one before it
                self._give(entry)
        self._start_new()
        if self._tenants.num_preemptions != num_preemptions:
            # Who gave way leaves the plan, but for one that could start again at once.
            self._planned = list(dict.fromkeys(e for e in self._planned if e.num_planned))
        self._propose()
        return self._render()

    def commit(self, plan: StepPlan, results: Seq[RowResult]) -> list[Step]:
        """Record what a plan computed: what each request gained, in the plan's order.

        A stop id or `max_tokens` ends a request, whatever its row sampled after it.
        """
        assert plan.step == self._num_steps
        entries, self._flight = self._flight, []
        steps = []
        for entry, row, result in zip(entries, plan.rows, results, strict=True):
            if row.start < entry.seq.num_prompt:
                end = min(row.start + row.num_new, entry.seq.num_prompt)
                self._num_prompt_computed += end - row.start
            if result.stale or result.fault:
                self._lose(entry, result.fault)
                continue
            if entry.dropped:
                self._tenants.free_slot(entry)
                self._tenants.free_blocks(entry)
                continue
            assert row.sample is (len(result.ids) > 0)
            assert len(result.ids) <= 1 + len(row.draft_ids)
            if step := self._advance(entry, row, result):
                steps.append(step)
        return steps

    def took(self, plan: StepPlan, seconds: float) -> None:
        """How long a plan took: what drafts cost is learned from those that could have had some."""
        num_tokens = sum(row.num_new + len(row.draft_ids) for row in plan.rows)
        if num_tokens <= self._limits.max_drafted_tokens and all(
            row.sample and row.num_new == 1 for row in plan.rows
        ):
            self._times.learn(num_tokens, seconds)

    def gauges(self, step_s: float = 0.0) -> Gauges:
        return Gauges(
            step=self._num_steps,
            running=len(self._tenants.running),
            waiting=len(self._tenants.waiting),
            held=len(self._held),
            free_blocks=self._space.num_free,
            total_blocks=self._space.num_blocks,
            prompt_tokens_computed=self._num_prompt_computed,
            output_tokens=self._num_output,
            preemptions=self._tenants.num_preemptions,
            prompt_tokens_cached=self._num_cached,
            draft_tokens_proposed=self._num_proposed,
            draft_tokens_accepted=self._num_accepted,
            step_s=step_s,
        )

    def check(self) -> None:
        """Assert what holds between any two calls."""
        held = list(self._held.values())
        self._tenants.check(held, [e for e in self._flight if e.dropped])
        known = [*self._tenants.waiting, *self._tenants.running, *held]
        assert sorted(e.seq.request_id for e in known) == sorted(self._entries)
        assert not any(e.num_planned or e.draft_ids for e in known)

    def _start_new(self, before: Entry | None = None) -> None:
        """Plan what waits and fits, as far as it comes before that entry."""
        while self._budget and (new := self._tenants.next(adopted=False, before=before)):
            self._tenants.start(new)
            if not new.seq.num_preempted:
                self._num_cached += new.cached_tokens or 0
            self._give(new)

    def _give(self, entry: Entry) -> None:
        """Plan as many tokens of `entry` as it is behind, as far as budget and blocks go."""
        seq = entry.seq
        count = min(len(seq.token_ids) - seq.num_computed, self._budget)
        if seq.num_computed + count > entry.num_covered:
            count = self._tenants.cover(entry, count)
        if count:
            self._budget -= count
            entry.num_planned = count
            self._planned.append(entry)

    def _propose(self) -> None:
        """Add drafts to the rows of a small step, the same number to each at most.

        As many as pay, if drafts turn out right as often as they did lately.
        """
        limits, planned = self._limits, self._planned
        num_tokens = limits.max_step_tokens - self._budget
        spare = min(self._budget, limits.max_drafted_tokens - num_tokens)
        if not limits.max_draft_ids or len(planned) > spare:
            return
        drafting = [
            (entry, entry.drafter)
            for entry in planned
            if entry.drafter and entry.seq.num_computed + 1 == len(entry.seq.token_ids)
        ]
        if not drafting:
            return
        share = sum(drafter.share for _, drafter in drafting) / len(drafting)
        most = spare // len(planned)
        while most and self._times.price(len(planned), len(drafting) * most) >= share:
            most //= 2
        for entry, drafter in drafting if most else ():
            self._draft(entry, drafter, most)

    def _draft(self, entry: Entry, drafter: Drafter, most: int) -> None:
        """Propose up to `most` ids, but no more than leave room for one id after them."""
        token_ids = entry.seq.token_ids
        most = min(most, entry.most_tokens - len(token_ids) - 1)
        draft_ids = drafter.propose(token_ids, most) if most > 0 else ()
        if draft_ids:
            entry.draft_ids = draft_ids[: self._tenants.cover_spare(entry, 1 + len(draft_ids)) - 1]

    def _render(self) -> StepPlan:
        planned, self._planned = self._planned, []
        if not planned:
            return StepPlan(step=self._num_steps)
        self._num_steps += 1
        self._flight = planned
        return StepPlan(
            step=self._num_steps,
            opens=tuple([open_slot(entry) for entry in planned if entry.num_sent is None]),
            rows=tuple([make_row(entry, self._space) for entry in planned]),
            closes=self._tenants.take_closes(),
        )

    def _advance(self, entry: Entry, row: Row, result: RowResult) -> Step | None:
        """Take over the ids that a row sampled."""
        seq = entry.seq
        before, end = seq.num_computed, row.start + row.num_new
        ids, finish = cut(entry, result.ids)
        if result.ended:
            finish = "stop"
        if len(ids) > 1:  # all but the last were computed in this step too, as accepted drafts
            end += len(ids) - 1
        seq.token_ids.extend(ids)
        seq.num_computed = end
        self._tenants.name(entry, before)
        if seq.hold:
            self._gained[seq.request_id] = entry
        if self._forgets:
            self._space.forget(seq.block_ids, before, end)
        if not ids:
            return None
        self._num_output += len(ids)
        if row.draft_ids:
            self._learn(entry, len(row.draft_ids), min(len(ids), len(result.ids) - 1))
        if finish:
            self._finish(entry)
        logprobs = result.logprobs
        return Step(
            request_id=seq.request_id,
            ids=ids,
            logprobs=logprobs[: len(ids)] if logprobs else (),
            finish=finish,
            num_computed=end,
            cached_tokens=entry.cached_tokens or 0,
        )

    def _chain(self, seq: Sequence) -> Chain | None:
        size = self._space.block_tokens
        if not self._limits.prefix_cache or size is None:
            return None
        return Chain(root(seq.cache_salt, self._model_digest, seq.adapter), size)

    def _lose(self, entry: Entry, fault: str) -> None:
        """End one whose blocks turned out not to be its own, or whose grammar allows nothing."""
        if not entry.dropped:
            self._tenants.stop(entry)
            del self._entries[entry.seq.request_id]
            self._lost.append((entry.seq.request_id, fault))
        self._tenants.free_slot(entry)
        self._tenants.free_own_blocks(entry)

    def _learn(self, entry: Entry, num_proposed: int, num_accepted: int) -> None:
        assert entry.drafter is not None
        entry.drafter.learn(len(entry.seq.token_ids), num_proposed, num_accepted)
        self._num_proposed += num_proposed
        self._num_accepted += num_accepted

    def _finish(self, entry: Entry) -> None:
        self._tenants.stop(entry)
        self._tenants.free_slot(entry)
        if entry.seq.hold:
            self._held[entry.seq.request_id] = entry
        else:
            del self._entries[entry.seq.request_id]
            self._tenants.free_blocks(entry)
