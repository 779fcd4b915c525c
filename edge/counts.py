"""How many tokens a prompt has, asked ahead of the request itself: Anthropic's and OpenAI's forms.

Nothing is made of them, so no region is asked, and there is no row of usage.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge import anthropic, responses
from edge.ask import Ask
from edge.clients import read_body
from edge.door import record_of
from edge.response import JSON
from edge.responses_run import recall
from edge.responses_store import ResponsesStore
from edge.run import Service, authorization

_Parse = Callable[[bytes, str], Awaitable[Ask]]  # of a body, for an account


def count_routes(prefix: str, service: Service, store: ResponsesStore) -> list[Route]:
    """`prefix`: the path up to /messages and /responses."""

    async def of_messages(body: bytes, account: str) -> Ask:
        return await to_thread.run_sync(anthropic.parse_count, body)

    async def of_response(body: bytes, account: str) -> Ask:
        turn = await to_thread.run_sync(responses.parse, body)
        return await recall(store, turn, account)

    def counts(path: str, parse: _Parse, more: dict[str, Any]) -> Route:
        async def count(request: Request) -> Response:
            num_tokens = await _count(request, service, parse)
            return Response(
                msgspec.json.encode({"input_tokens": num_tokens} | more), media_type=JSON
            )

        return Route(f"{prefix}/{path}", count, methods=["POST"])

    return [
        counts("messages/count_tokens", of_messages, {}),
        counts("responses/input_tokens", of_response, {"object": "response.input_tokens"}),
    ]


async def _count(request: Request, service: Service, parse: _Parse) -> int:
    record = record_of(request.scope)
    record.route = "count_tokens"
    account = request.path_params.get("account_id")
    tenant = service.verifier.tenant(authorization(request.headers), account)
    record.account = tenant.account
    with service.drain.until_cut():
        await service.walk.wait_settled()
        body = await read_body(
            request.scope,
            request.receive,
            limit_bytes=service.settings.body_limit_bytes,
            stalled_s=service.settings.stalled_reader_s,
        )
        ask = await parse(body, tenant.account)
        await service.walk.wait_served(ask.model)
        record.served_model = ask.model
        return await service.walk.count(ask)
