"""The clients of a soak: each asks, reads, checks, and asks again. Knows no fault."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import anyio
import httpx2

from loadtest.bench.soak.asks import MALFORMED, NEAR, Asked, Hearing, ask, refusal, whole
from loadtest.bench.soak.fleet import BUDGET_S

BOUND_S = BUDGET_S + 30.0  # of a request, at its client; an edge may be paused in between
_SLOWLY_S = 5.0  # that a slow reader takes for an answer of full length


def now() -> float:
    """Unix seconds, as the rows of usage have them."""
    return datetime.now(UTC).timestamp()


@dataclass(kw_only=True)
class Answered:
    """What became of one request."""

    asked: Asked
    began: float
    ended: float = 0.0
    verdict: str = "hang"  # ok, left, cut, refused: ..., broke off: ..., wrong: ...
    request_id: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)  # as told


class Clients:
    """All of them. `edges` are URLs, `keys` are by tenant."""

    def __init__(self, edges: Sequence[str], keys: Mapping[str, str], seed: int) -> None:
        self.answers: list[Answered] = []
        self.stopping = False
        self._edges = edges
        self._keys = keys
        self._seed = seed
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        self._http = httpx2.AsyncClient(trust_env=False, timeout=None, limits=limits)  # BOUND_S

    async def run(self, num_clients: int) -> None:
        """Ask until told to stop, then return when every answer has come."""
        async with self._http, anyio.create_task_group() as tasks:
            for n in range(num_clients):
                tasks.start_soon(self._go_on, random.Random(f"{self._seed}/{n}"))

    async def _go_on(self, chance: random.Random) -> None:
        while not self.stopping:
            await self.one(ask(chance, len(self._edges)))
            await anyio.sleep(chance.random() * 0.2)

    async def one(self, asked: Asked) -> Answered:
        """Ask, and hear what comes of it."""
        answered = Answered(asked=asked, began=now())
        self.answers.append(answered)
        with anyio.move_on_after(BOUND_S):
            try:
                await self._hear(answered)
            except httpx2.TransportError as exc:
                answered.verdict = f"cut: {type(exc).__name__}"
            except MALFORMED as exc:
                answered.verdict = f"wrong: {exc!r}"
        answered.ended = now()
        return answered

    async def _hear(self, answered: Answered) -> None:
        asked = answered.asked
        headers = {"authorization": f"Bearer {self._keys[asked.tenant]}", **NEAR[asked.near]}
        url = self._edges[asked.edge] + asked.path
        with anyio.CancelScope() as scope:
            if asked.act == "leave" and not asked.stream:
                scope.deadline = anyio.current_time() + asked.leave_after
            async with self._http.stream("POST", url, json=asked.body, headers=headers) as response:
                answered.request_id = response.headers.get("x-request-id")
                if response.status_code != 200:
                    answered.verdict = refusal(response.status_code, await response.aread())
                elif asked.stream:
                    await self._read(answered, response)
                else:
                    answered.verdict, answered.usage = whole(asked, await response.aread())
        if scope.cancelled_caught:
            answered.verdict = "left"

    async def _read(self, answered: Answered, response: httpx2.Response) -> None:
        asked, hearing = answered.asked, Hearing()
        enough = asked.leave_after * len(asked.answer) if asked.act == "leave" else None
        async for line in response.aiter_lines():
            hearing.take(line)
            if enough is not None and len(hearing.text) > enough:
                good = hearing.begins(asked)
                answered.verdict = "left" if good else f"wrong: {hearing.text!r}"
                return
            if asked.act == "slow":
                await anyio.sleep(_SLOWLY_S / asked.max_tokens)
        answered.verdict, answered.usage = hearing.verdict(asked), hearing.usage
