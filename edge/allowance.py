"""What is left to each account and key: asked before a request is answered, charged at its end.

Counting is done by a thread, behind one lock: never on the event loop. With no limit that holds for
a request, it costs nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import anyio
from anyio import CapacityLimiter, to_thread

from edge.auth import Tenant
from edge.inside import NO_ROOM
from edge.ledger import completion_tokens
from edge.limits import Limit, Rule, rules_of
from edge.meter import Admitted, Charge, Meter
from edge.metrics import Record
from edge.prices import USD_A_NEURON, Prices


class Allowance:
    """`limits` hold for every account."""

    def __init__(self, limits: Sequence[Limit], meter: Meter, prices: Prices) -> None:
        self._limits = limits
        self._meter = meter
        self._prices = prices
        self._pending: deque[Charge] = deque()  # not counted yet
        self._noted = anyio.Event()
        self._one = CapacityLimiter(1)

    async def admit(self, record: Record, tenant: Tenant, model: str) -> None:
        """Count the request, by what it has not been counted by for another model. Failure
        (RATE_LIMITED or QUOTA) where `model` may not answer it now."""
        holding = rules_of(
            tenant.account,
            tenant.key_id,
            of_key=tenant.limits,
            of_account=self._limits,
            model=model,
            task=self._prices.task(model),
        )
        rules = tuple(rule for rule in holding if rule not in record.counted)
        if not rules:
            return
        standings, failure = await to_thread.run_sync(self._admit, rules, limiter=self._one)
        record.standings += standings
        if failure is not None:
            raise failure
        record.counted |= {rule: it.at for rule, it in zip(rules, standings, strict=True)}

    def note(self, record: Record) -> None:
        """The request has ended: it is counted soon, and before this process admits another."""
        if record.is_inside and record.status in NO_ROOM:
            self._count(hit for hit in record.counted.items() if not hit[0].limit.is_amount)
        rules = [rule for rule in record.counted if rule.limit.is_amount]
        if not rules or not record.tries.answers:
            return
        prompt, completion = record.num_prompt, completion_tokens(record)
        neurons = self._prices.neurons(
            record.served_model or "",
            prompt=prompt,
            cached=record.tries.cached_tokens,
            completion=completion,
        )
        used = {
            "tokens": float(prompt + completion),
            "neurons": neurons,
            "usd": neurons * USD_A_NEURON,
        }
        self._count((rule, used[rule.limit.name]) for rule in rules)

    def _count(self, charges: Iterable[Charge]) -> None:
        self._pending.extend(charges)
        self._noted.set()

    async def run(self) -> None:
        """Count what has ended, until cancelled."""
        while True:
            await self._noted.wait()
            self._noted = anyio.Event()
            await to_thread.run_sync(self._charge, limiter=self._one)

    def close(self) -> None:
        """Count what is left."""
        self._charge()
        self._meter.close()

    def _admit(self, rules: Sequence[Rule]) -> Admitted:
        return self._meter.admit(rules, self._take())

    def _charge(self) -> None:
        self._meter.charge(self._take())

    def _take(self) -> list[Charge]:
        """In the thread that counts: who waits for it may be cancelled, and would lose them."""
        return [self._pending.popleft() for _ in range(len(self._pending))]
