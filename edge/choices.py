"""An answer with several choices: each is a walk of its own, all of them one response.

In usage each choice is a request of its own, the first by the request's id and the others by that
id and their number; a prompt is counted by its first choice. Knows no API.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import anyio
from anyio import CapacityLimiter
from starlette.types import Send

from edge.ask import Ask, Broke, End, Piece, Usage
from edge.complete import Caller, Walk
from edge.metrics import Record
from edge.response import send_whole, start_events
from routing.errors import Failure

MOST_AT_ONCE = 8  # of one request: it is not to have a region for itself


class Choice(Protocol):
    """One choice in an API's own words, and what goes around all of them."""

    def frames(self, piece: Piece) -> bytes: ...
    def finish(self, end: End) -> bytes: ...
    def close(self, used: Usage) -> bytes: ...
    def choice(self, pieces: Iterable[Piece], end: End) -> dict[str, Any]: ...
    def body(self, choices: Sequence[dict[str, Any]], used: Usage) -> bytes: ...


class Choices:
    """The response as it is made: events of all choices as they come, or one body at the end."""

    def __init__(self, send: Send, spelled: Sequence[Choice], record: Record) -> None:
        self._send = send
        self._spelled = spelled
        self._record = record
        self._records = [record, *(_further(record, at) for at in range(1, len(spelled)))]
        record.further += self._records[1:]
        self._writing = anyio.Lock()
        self.begun = False
        self._told: list[list[Piece]] = [[] for _ in spelled]
        self._ends: dict[int, End] = {}

    async def run(self, walk: Walk, ask: Ask, caller: Caller) -> None:
        """Have all of them answered. The failure of one is that of all."""
        asks = ask.choices
        limiter, failures = CapacityLimiter(MOST_AT_ONCE), list[Failure]()

        async def answer(at: int) -> None:
            try:
                async with limiter:
                    await self._one(walk, asks[at], caller, at)
            except Failure as failure:
                failures.append(failure)  # raised below: out of here it would be a group
                tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            for at in range(len(asks)):
                tasks.start_soon(answer, at)
        if failures:
            raise failures[0]
        await self._close(self._used(asks))

    async def fail(self, failure: Failure) -> None:
        """With a status of its own while that is possible, else as the end of the stream."""
        for record in self._records:
            record.outcome, record.detail = failure.code.value, failure.detail
        if not self.begun:
            raise failure
        broke = Broke(code=failure.code, detail=failure.detail)
        await self._write(self._spelled[0].frames(broke), more=False)

    async def _one(self, walk: Walk, ask: Ask, caller: Caller, at: int) -> None:
        record = self._records[at]
        record.counts_prompt = ask.counts_prompt
        caller = replace(caller, request_id=record.request_id)
        async with walk.complete(ask, caller, record.tries) as completion:
            async for pieces in completion:
                record.note_piece(completion.region, time.monotonic())
                if self._record.first_at is None:
                    self._record.first_at, self._record.region = record.first_at, record.region
                await self._tell(at, pieces)

    async def _tell(self, at: int, pieces: list[Piece]) -> None:
        for piece in pieces:
            match piece:
                case End():
                    self._records[at].num_output = piece.usage.completion_tokens
                    self._ends[at] = piece
                case _ if not self._record.stream:
                    self._told[at].append(piece)
        if self._record.stream:
            await self._write(b"".join([self._said(at, piece) for piece in pieces]), more=True)

    def _said(self, at: int, piece: Piece) -> bytes:
        choice = self._spelled[at]
        return choice.finish(piece) if isinstance(piece, End) else choice.frames(piece)

    async def _close(self, used: Usage) -> None:
        first = self._spelled[0]
        if self._record.stream:
            await self._write(first.close(used), more=False)
            return
        choices = [it.choice(self._told[at], self._ends[at]) for at, it in enumerate(self._spelled)]
        await send_whole(self._send, first.body(choices, used), self._region)

    @property
    def _region(self) -> str:
        return self._record.region or ""

    def _used(self, asks: Sequence[Ask]) -> Usage:
        """Of all choices, each prompt once."""
        every = [end.usage for end in self._ends.values()]
        first = [self._ends[at].usage for at, ask in enumerate(asks) if ask.counts_prompt]
        return Usage(
            prompt_tokens=sum(used.prompt_tokens for used in first),
            completion_tokens=sum(used.completion_tokens for used in every),
            cached_tokens=sum(used.cached_tokens for used in first),
            reasoning_tokens=sum(used.reasoning_tokens for used in every),
        )

    async def _write(self, data: bytes, *, more: bool) -> None:
        if more and not data:
            return
        async with self._writing:
            if not self.begun:
                self.begun = True
                await start_events(self._send, self._region)
            await self._send({"type": "http.response.body", "body": data, "more_body": more})


def _further(record: Record, at: int) -> Record:
    """The record of one more choice."""
    return replace(
        record, request_id=f"{record.request_id}-{at}", tries=type(record.tries)(), further=[]
    )
