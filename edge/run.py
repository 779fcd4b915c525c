"""The endpoint of both APIs: who asks, what for, the walk, and the answer as it is made.

The status goes out with the first piece of the answer, so what fails before it still has one of its
own. Knows how neither API spells things: `Native` and `OpenAI` do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Protocol

import anyio
from anyio import to_thread
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from edge import openai, workers_ai
from edge.ask import Ask, Broke, End, Piece, Text
from edge.auth import Verifier
from edge.clients import Clients, read_body
from edge.complete import Caller, Walk
from edge.door import JSON, record_of
from edge.inside import PRIORITY, asks_inside
from edge.metrics import Record
from edge.places import Places
from edge.settings import Settings
from edge.sse import MEDIA_TYPE
from routing.abort import write_of
from routing.drain import Drain
from routing.errors import Code, Failure

_INLINE_BYTES = 100_000  # about 1 ms to parse; a longer body would hold up every other stream
_MOST_LOGGED = 128  # characters of a model's name

_STREAM_HEADERS = [
    (b"content-type", MEDIA_TYPE.encode()),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would gather events otherwise
]


class Spelled(Protocol):
    """One answer in an API's own words."""

    def frames(self, piece: Piece) -> bytes: ...
    def text_frame(self, text: str) -> bytes: ...
    def whole(self, texts: Iterable[Text], end: End) -> bytes: ...


class Api(Protocol):
    route: str  # as in logs and metrics

    def model(self, scope: Scope) -> str | None:
        """The model, where the path names it."""

    def parse(self, body: bytes, scope: Scope) -> Ask: ...
    def answer(self, ask: Ask, request_id: str) -> Spelled: ...


class Native:
    route = "run"

    def model(self, scope: Scope) -> str | None:
        # Some clients send %2F for the slashes of a model: the server has decoded the path.
        return str(scope["path_params"]["model"])

    def parse(self, body: bytes, scope: Scope) -> Ask:
        return workers_ai.parse(body, str(scope["path_params"]["model"]))

    def answer(self, ask: Ask, request_id: str) -> Spelled:
        return workers_ai.Answer()


class OpenAI:
    route = "chat_completions"

    def model(self, scope: Scope) -> str | None:
        return None

    def parse(self, body: bytes, scope: Scope) -> Ask:
        return openai.parse(body)

    def answer(self, ask: Ask, request_id: str) -> Spelled:
        created = int(datetime.now(UTC).timestamp())
        return openai.Answer(ask, request_id=request_id, created=created)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What answering a request takes; the same for all."""

    settings: Settings
    verifier: Verifier
    places: Places
    clients: Clients
    walk: Walk
    drain: Drain


class Run:
    """An ASGI endpoint."""

    def __init__(self, service: Service, api: Api) -> None:
        self._service = service
        self._api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record, settings = record_of(scope), self._service.settings
        record.route = self._api.route
        headers = Headers(scope=scope)
        inside = asks_inside(scope)
        tenant = inside or self._service.verifier.tenant(
            headers.get("authorization"), scope["path_params"]["account_id"]
        )
        record.account, record.tenant = tenant.account, tenant
        with self._service.drain.until_cut():
            await self._service.walk.wait_settled()
            if (model := self._api.model(scope)) is not None:
                await self._check(model, record)
            body = await read_body(
                scope,
                receive,
                limit_bytes=settings.body_limit_bytes,
                stalled_s=settings.stalled_reader_s,
            )
        peer = scope["client"][0] if scope["client"] else None
        caller = Caller(
            request_id=record.request_id,
            tenant=tenant,
            place=self._service.places.of(peer, headers),
            session=headers.get("x-session-affinity"),
            priority=PRIORITY if inside else 0,
        )
        work = partial(self._answer, scope, body, caller, record)
        left = await self._service.clients.attend(scope, receive, send, work)
        if left is not None:
            record.outcome = left

    async def _answer(
        self, scope: Scope, body: bytes, caller: Caller, record: Record, send: Send
    ) -> None:
        ask = await self._parse(body, scope)
        record.stream = ask.stream
        if record.served_model is None:
            await self._check(ask.model, record)
        spelled = self._api.answer(ask, record.request_id)
        reply = Reply(send, write_of(scope), spelled, record, stream=ask.stream)
        budget_s = self._service.settings.budget_s
        try:
            with anyio.fail_after(budget_s), self._service.drain.until_cut():
                async with self._service.walk.complete(ask, caller, record.tries) as completion:
                    completion.tell_at_once(reply.tell_nowait)
                    async for pieces in completion:
                        await reply.tell(pieces, completion.region)
        except TimeoutError:
            await reply.fail(Failure(Code.TIMEOUT, f"no whole answer within {budget_s:g} s"))
        except Failure as failure:
            await reply.fail(failure)

    async def _check(self, model: str, record: Record) -> None:
        record.model = model[:_MOST_LOGGED]
        await self._service.walk.wait_served(model)
        record.served_model = model

    async def _parse(self, body: bytes, scope: Scope) -> Ask:
        if len(body) <= _INLINE_BYTES:
            return self._api.parse(body, scope)
        return await to_thread.run_sync(self._api.parse, body, scope)


class Reply:
    """The response as it is made: events from the first piece on, or one JSON body at the end."""

    def __init__(
        self,
        send: Send,
        write: Callable[[bytes], bool],
        spelled: Spelled,
        record: Record,
        *,
        stream: bool,
    ) -> None:
        """`write` sends more of the body, once it has begun, if it need not wait for that."""
        self._send = send
        self._write_nowait = write
        self._spelled = spelled
        self._record = record
        self._stream = stream
        self._begun = False  # the status is out
        self._texts: list[Text] = []  # of an answer that is not streamed

    async def tell(self, pieces: list[Piece], region: str) -> None:
        """Say more of the answer. What is told at once goes out as one write."""
        last = pieces[-1]
        if self._record.first_at is None:
            self._record.first_at = time.monotonic()
            self._record.region = region
        if isinstance(last, End):
            self._record.num_output = last.usage.completion_tokens
        if self._stream:
            await self._write(b"".join(map(self._spelled.frames, pieces)), last=last, region=region)
            return
        self._texts += [piece for piece in pieces if isinstance(piece, Text)]
        if isinstance(last, End):
            await self._whole(self._spelled.whole(self._texts, last), region)

    def tell_nowait(self, text: str) -> bool:
        """Say more text, if that takes no waiting; whether it was said."""
        if self._stream:
            return self._begun and self._write_nowait(self._spelled.text_frame(text))
        if self._texts:  # else it is the first, whose time is of interest
            self._texts.append(Text(text=text))
        return bool(self._texts)

    async def fail(self, failure: Failure) -> None:
        """With a status of its own while that is possible, else as the end of the stream."""
        if not self._begun:
            raise failure
        self._record.outcome, self._record.detail = failure.code.value, failure.detail
        broke = Broke(code=failure.code, detail=failure.detail)
        await self._write(self._spelled.frames(broke), last=broke, region="")

    async def _write(self, data: bytes, *, last: Piece, region: str) -> None:
        more = isinstance(last, Text)
        if more and not data:
            return
        if not self._begun:
            await self._start([*_STREAM_HEADERS, (b"x-served-by", region.encode())])
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def _whole(self, data: bytes, region: str) -> None:
        await self._start(
            [
                (b"content-type", JSON.encode()),
                (b"content-length", str(len(data)).encode()),
                (b"x-served-by", region.encode()),
            ]
        )
        await self._send({"type": "http.response.body", "body": data})

    async def _start(self, headers: list[tuple[bytes, bytes]]) -> None:
        self._begun = True
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
