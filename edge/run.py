"""The endpoint of both APIs: who asks, what for, the walk, and the answer as it is made.

The status goes out with the first piece of the answer, so what fails before it still has one of its
own. Knows how neither API spells things: `Native` and `OpenAI` do.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TypeAlias

import anyio
from anyio import to_thread
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from edge import anthropic, anthropic_answer, completions, embeddings, formats, openai, workers_ai
from edge.allowance import Allowance
from edge.api import Api
from edge.ask import Ask, Broke, End, Piece, Text
from edge.auth import Tenant, Verifier
from edge.checks import BadField, Fields, read
from edge.choices import Choice, Choices
from edge.clients import Clients, read_body
from edge.complete import Caller, Walk
from edge.door import record_of
from edge.embed import EmbedWalk
from edge.embeddings import EmbedAsk
from edge.fallback import MODELS, Try, carry_out, first_within, plan_of
from edge.inside import asks_inside
from edge.metrics import Record
from edge.places import Places
from edge.response import send_whole, start_events
from edge.settings import Settings
from edge.spelled import Spelled
from edge.vectors import VectorReply
from routing.abort import write_of
from routing.drain import Drain
from routing.errors import Code, Failure

_INLINE_BYTES = 100_000  # about 1 ms to parse; a longer body would hold up every other stream
_MOST_LOGGED = 128  # characters of a model's name


class Native(Api):
    route = "run"

    def __init__(self, task_of: Callable[[str], str], max_tokens: int | None = None) -> None:
        """`task_of`: what a model is for, which decides how a body is read. `max_tokens`: of a
        request that names none; None: as on the other routes."""
        self._task_of = task_of
        self._max_tokens = max_tokens

    def model(self, scope: Scope) -> str | None:
        # Some clients send %2F for the slashes of a model: the server has decoded the path.
        return str(scope["path_params"]["model"])

    def opened(self, fields: Fields, scope: Scope) -> tuple[Fields, str]:
        """What the model is given, and which model. Raises Failure(BAD_INPUT)."""
        return fields, str(scope["path_params"]["model"])

    def parse(self, body: bytes, scope: Scope) -> Ask | EmbedAsk:
        return self._parsed(*self.opened(read(body), scope))

    def check(self, body: bytes, model: str) -> Ask | EmbedAsk:
        """What is asked of `model`, however a request names it. Raises Failure(BAD_INPUT)."""
        return self._parsed(read(body), model)

    def answer(self, ask: Ask, request_id: str) -> Spelled:
        return workers_ai.Answer(is_json=formats.is_json(ask.grammar))

    def _parsed(self, fields: Fields, model: str) -> Ask | EmbedAsk:
        if self._task_of(model) == EmbedAsk.task:
            return embeddings.parse_fields(fields, model)
        vectors = [f"'/{name}'" for name in ("text", "query") if fields.has(name)]
        if vectors and not fields.has("prompt") and not fields.has("messages"):
            says = f"{model} is for {Ask.task}: give '/prompt' or '/messages', and no {vectors[0]}"
            raise BadField("", says)
        return self._limited(workers_ai.parse_fields(fields, model))

    def _limited(self, ask: Ask) -> Ask:
        if self._max_tokens is None or ask.sampling.max_tokens is not None:
            return ask
        return replace(ask, sampling=replace(ask.sampling, max_tokens=self._max_tokens))


class Enveloped(Native):
    """Natively, with the model in the body: {"model", "input"}."""

    def model(self, scope: Scope) -> str | None:
        return None

    def opened(self, fields: Fields, scope: Scope) -> tuple[Fields, str]:
        return workers_ai.opened(fields)


class OpenAI(Api):
    """Chat completions or completions: what differs is how they are read and spelled."""

    def __init__(
        self,
        route: str,
        read: Callable[[bytes], Ask],
        spell: type[openai.Answer] | type[completions.Answer],
    ) -> None:
        self.route = route
        self._read = read
        self._spell = spell

    def parse(self, body: bytes, scope: Scope) -> Ask:
        return self._read(body)

    def answer(self, ask: Ask, request_id: str) -> Spelled:
        return self._spell(ask, request_id=request_id, created=_now())

    def choices(self, asks: Sequence[Ask], request_id: str) -> Sequence[Choice]:
        spell = partial(self._spell, request_id=request_id, created=_now())
        return [spell(ask, index=at) for at, ask in enumerate(asks)]


def chat_completions() -> OpenAI:
    return OpenAI("chat_completions", openai.parse, openai.Answer)


def text_completions() -> OpenAI:
    return OpenAI("completions", completions.parse, completions.Answer)


def _now() -> int:
    return int(datetime.now(UTC).timestamp())


class Anthropic(Api):
    route = "messages"

    def parse(self, body: bytes, scope: Scope) -> Ask:
        return anthropic.parse(body)

    def answer(self, ask: Ask, request_id: str) -> Spelled:
        return anthropic_answer.Answer(ask, request_id=request_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What answering a request takes; the same for all."""

    settings: Settings
    verifier: Verifier
    places: Places
    clients: Clients
    walk: Walk
    embeds: EmbedWalk
    allowance: Allowance
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
        tenant = self._tenant(scope, headers)
        record.account, record.tenant = tenant.account, tenant
        record.is_inside = asks_inside(scope) is not None
        with self._service.drain.until_cut():
            await self._service.walk.wait_settled()
            if (model := self._api.model(scope)) is not None and MODELS not in headers:
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
            priority=tenant.priority,
        )
        work = partial(self._answer, scope, body, caller, record)
        left = await self._service.clients.attend(scope, receive, send, work)
        if left is not None:
            record.outcome = left

    def _tenant(self, scope: Scope, headers: Headers) -> Tenant:
        """Who asks, by a key that is good now. Raises Failure."""
        verifier = self._service.verifier
        if (inside := asks_inside(scope)) is None:
            account = scope["path_params"].get("account_id")
            return verifier.tenant(authorization(headers), account)
        verifier.check(inside)
        return inside

    async def _answer(
        self, scope: Scope, body: bytes, caller: Caller, record: Record, send: Send
    ) -> None:
        ask = await self._ask(body, scope, caller)
        record.stream = ask.stream
        plan = plan_of(Headers(scope=scope), ask.model, ask.fallbacks)
        if record.served_model is None and plan.is_plain:
            await self._check(ask.model, record)
        reply: AnyReply | None = None

        async def attempt(one: Try) -> None:
            nonlocal reply
            record.begin_anew([] if plan.is_plain else one.headers)
            with first_within(one.first_s) as record.on_first:
                if record.served_model != one.model:
                    await self._check(one.model, record)
                await self._service.allowance.admit(record, caller.tenant, one.model)
                asked = ask.of(one.model)
                reply, run = self._reply(asked, caller, scope, record, send)
                await run()

        budget_s = self._service.settings.budget_s
        try:
            with anyio.fail_after(budget_s), self._service.drain.until_cut():
                await carry_out(plan, attempt, lambda: reply is not None and reply.begun)
        except TimeoutError:
            failure = Failure(Code.TIMEOUT, f"no whole answer within {budget_s:g} s")
        except Failure as exc:
            failure = exc
        else:
            return
        if reply is None:
            raise failure
        await reply.fail(failure)

    def _reply(
        self, ask: Ask | EmbedAsk, caller: Caller, scope: Scope, record: Record, send: Send
    ) -> tuple[AnyReply, Callable[[], Awaitable[None]]]:
        """The reply to `ask`, and what has it made. Raises Failure."""
        walk = self._service.walk
        walk.check_task(ask.model, ask.task)
        if isinstance(ask, EmbedAsk):
            vectors = VectorReply(send, record)
            return vectors, partial(vectors.run, self._service.embeds, ask, caller)
        if ask.choices:
            choices = Choices(send, self._api.choices(ask.choices, record.request_id), record)
            return choices, partial(choices.run, walk, ask, caller)
        spelled = self._api.answer(ask, record.request_id)
        reply = Reply(send, write_of(scope), spelled, record, stream=ask.stream)
        reply.at_end = partial(self._keep, ask, spelled, caller)
        return reply, partial(reply.run, walk, ask, caller)

    async def _keep(self, ask: Ask, spelled: Spelled, caller: Caller) -> None:
        """The answer is whole, and its end not told yet. Most APIs keep nothing of it."""

    async def _check(self, model: str, record: Record) -> None:
        record.model = model[:_MOST_LOGGED]
        await self._service.walk.wait_served(model)
        record.served_model = model

    async def _ask(self, body: bytes, scope: Scope, caller: Caller) -> Ask | EmbedAsk:
        if len(body) <= _INLINE_BYTES:
            return self._api.parse(body, scope)
        return await to_thread.run_sync(self._api.parse, body, scope)


def authorization(headers: Headers) -> str | None:
    """The bearer key's header; Anthropic's clients have one of their own for a key."""
    key = headers.get("x-api-key")
    return headers.get("authorization") or (None if key is None else f"Bearer {key}")


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
        self.at_end: Callable[[], Awaitable[None]] | None = None  # before the end is told
        self._send = send
        self._write_nowait = write
        self._spelled = spelled
        self._record = record
        self._stream = stream
        self.begun = False  # the status is out
        self._pieces: list[Piece] = []  # of an answer that is not streamed

    async def run(self, walk: Walk, ask: Ask, caller: Caller) -> None:
        """Have it answered, and say so as it is."""
        async with walk.complete(ask, caller, self._record.tries) as completion:
            self._spelled.began(self._record.tries.num_prompt)
            completion.tell_at_once(self.tell_nowait)
            async for pieces in completion:
                await self.tell(pieces, completion.region)

    async def tell(self, pieces: list[Piece], region: str) -> None:
        """Say more of the answer. What is told at once goes out as one write."""
        last = pieces[-1]
        self._record.note_piece(region, time.monotonic())
        if isinstance(last, End):
            self._record.num_output = last.usage.completion_tokens
        if self._stream:
            data = b"".join(map(self._spelled.frames, pieces))
            await self._ended(last)
            await self._write(data, last=last, region=region)
            return
        self._pieces += [piece for piece in pieces if not isinstance(piece, End)]
        if isinstance(last, End):
            data = self._spelled.whole(self._pieces, last)
            await self._ended(last)
            await self._whole(data, region)

    def tell_nowait(self, text: str) -> bool:
        """Say more text, if that takes no waiting; whether it was said."""
        if self._stream:
            frame = self._spelled.text_frame(text) if self.begun else b""
            if not frame or not self._write_nowait(frame):
                return False
            self._spelled.told(text)
            return True
        if self._pieces:  # else it is the first, whose time is of interest
            self._pieces.append(Text(text=text))
        return bool(self._pieces)

    async def fail(self, failure: Failure) -> None:
        """With a status of its own while that is possible, else as the end of the stream."""
        if not self.begun:
            raise failure
        self._record.outcome, self._record.detail = failure.code.value, failure.detail
        broke = Broke(code=failure.code, detail=failure.detail)
        await self._write(self._spelled.frames(broke), last=broke, region="")

    async def _ended(self, last: Piece) -> None:
        if isinstance(last, End) and self.at_end is not None:
            await self.at_end()

    async def _write(self, data: bytes, *, last: Piece, region: str) -> None:
        more = not isinstance(last, End | Broke)
        if more and not data:
            return
        if not self.begun:
            self.begun = True
            await start_events(self._send, region)
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def _whole(self, data: bytes, region: str) -> None:
        self.begun = True
        await send_whole(self._send, data, region)


AnyReply: TypeAlias = Reply | Choices | VectorReply
