"""Rounds of several servers, one running at a time, each round begun by another of them.

A server that fails misses its round, which is written down, and stops no other.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

from loadtest.bench.client import client
from loadtest.bench.measure import Plan, Served, measure, warm_up
from loadtest.bench.ours import Ours, Refused
from loadtest.bench.rounds import Missed, Round
from loadtest.bench.servers import Contestant, NotUp
from loadtest.bench.streams import BrokenStream
from routing.errors import Failure
from routing.keys import NoKey

FAILURES = (NotUp, BrokenStream, Refused, Failure, NoKey, TimeoutError)  # of a server
WHY_LETTERS = 200  # of a failure, in a note


class Record:
    """What was measured and what was not, each written down when it is known."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "rounds.jsonl"
        self._rounds: list[Round] = []
        self._missed: list[Missed] = []

    @property
    def rounds(self) -> list[Round]:
        """Ours first, one server's together."""
        return sorted(self._rounds, key=lambda one: (not one.ours, one.server))

    @property
    def missed(self) -> list[Missed]:
        return list(self._missed)

    def add(self, one: Round) -> None:
        self._rounds.append(one)
        self._write(one)

    def miss(
        self, contestant: Contestant, number: int, what: str, failures: BaseExceptionGroup
    ) -> None:
        one = Missed(
            server=contestant.name,
            version=contestant.version,
            round=number,
            what=what,
            why=why(failures),
        )
        sys.stderr.write(f"{what} not measured: {one.why}\n")
        self._missed.append(one)
        self._write(one)

    def _write(self, one: Round | Missed) -> None:
        with self._file.open("ab") as file:
            file.write(msgspec.json.encode(one) + b"\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is compared, how often, and where it is written down."""

    contestants: tuple[Contestant, ...]
    plan: Plan
    rounds: int
    memory_rounds: int
    folder: Path  # logs, and rounds.jsonl with every measured round

    @property
    def log(self) -> Path:
        return self.folder / "servers.log"

    async def measure(self) -> Record:
        """Every round, each begun by another contestant."""
        record = Record(self.folder)
        for number in range(self.rounds):
            first = number % len(self.contestants)
            for contestant in (*self.contestants[first:], *self.contestants[:first]):
                sys.stderr.write(f"round {number + 1} of {self.rounds}: {contestant.name}\n")
                try:
                    await self._measure_one(contestant, number, record)
                except* FAILURES as failures:
                    record.miss(contestant, number, "figures", failures)
        return record

    async def _measure_one(self, contestant: Contestant, number: int, record: Record) -> None:
        if number == 0:
            await contestant.first_token_s(self.log)  # fills caches: of files, of compiled code
        start_s = await contestant.first_token_s(self.log)
        served = await self._served(contestant, number)
        peak_bytes = None
        if number < self.memory_rounds:
            peak_bytes = await self._peak_bytes(contestant, number, record)
        one = Round(
            server=contestant.name,
            version=contestant.version,
            ours=isinstance(contestant, Ours),
            round=number,
            served=served,
            start_s=start_s,
            peak_bytes=peak_bytes,
        )
        record.add(one)

    async def _served(self, contestant: Contestant, number: int) -> Served:
        async with contestant.serving(self.log) as target, client(target) as asking:
            await warm_up(asking, self.plan)
            return await measure(asking, self.plan, number)

    async def _peak_bytes(self, contestant: Contestant, number: int, record: Record) -> int | None:
        """None where the server fails when it is filled: its other figures stay."""
        try:
            return await contestant.peak_bytes(self.log)
        except* FAILURES as failures:
            record.miss(contestant, number, "peak memory", failures)
        return None


def why(failures: BaseExceptionGroup) -> str:
    """What failed, on one line."""
    said = []
    for failure in failures.exceptions:
        if isinstance(failure, BaseExceptionGroup):
            said.append(why(failure))
        else:
            said.append(" ".join(f"{type(failure).__name__}: {failure}".split()))
    return "; ".join(said)[:WHY_LETTERS]
