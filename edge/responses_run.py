"""The endpoints of OpenAI's Responses: the turn before is recalled, and this one is stored.

An answer is stored before its end is told, so whoever has read it may go on from it, at any edge
of the host. Knows no SQLite, and not how events are spelled.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime

import msgspec
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Scope

from edge import responses
from edge.api import Api
from edge.ask import Ask
from edge.checks import BadField
from edge.complete import Caller
from edge.door import record_of
from edge.response import JSON
from edge.responses import Turn, is_reference, recalled
from edge.responses_answer import Answer
from edge.responses_items import Item
from edge.responses_store import Earlier, ResponsesStore, Stored
from edge.run import Run, Service, authorization
from edge.spelled import Spelled
from routing.errors import Code, Failure
from routing.logs import log

_PREFIX = {"message": "msg", "reasoning": "rs", "function_call": "fc"}  # of an item's id
_MOST_LISTED = 100

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]


class Responses(Api):
    route = "responses"

    def parse(self, body: bytes, scope: Scope) -> Ask:
        return responses.parse(body)

    def answer(self, ask: Ask, request_id: str) -> Spelled:
        assert isinstance(ask, Turn)
        created = int(datetime.now(UTC).timestamp())
        return Answer(ask, request_id=request_id, created=created)


class RunResponses(Run):
    def __init__(self, service: Service, store: ResponsesStore) -> None:
        super().__init__(service, Responses())
        self._store = store

    async def _ask(self, body: bytes, scope: Scope, caller: Caller) -> Ask:
        turn = await super()._ask(body, scope, caller)
        assert isinstance(turn, Turn)
        return await recall(self._store, turn, caller.tenant.account)

    async def _keep(self, ask: Ask, spelled: Spelled, caller: Caller) -> None:
        """What cannot be stored is told all the same; going back to it is refused then."""
        assert isinstance(ask, Turn)
        assert isinstance(spelled, Answer)
        if not ask.stored:
            return
        stored = Stored(
            id=spelled.response["id"],
            previous=ask.previous,
            response=spelled.response,
            input=[_named(item, at, caller.request_id) for at, item in enumerate(ask.items)],
        )
        try:
            await self._store.put(caller.tenant.account, stored)
        except Failure as failure:
            log(logger, "not stored", request_id=caller.request_id, why=failure.detail)


async def recall(store: ResponsesStore, turn: Turn, account: str) -> Turn:
    """The turn with what it goes back to; BadField when that is not there."""
    if not turn.refers:
        return turn
    chain: Sequence[Earlier] = ()
    if turn.previous is not None:
        found = await store.chain(account, turn.previous)
        if found is None:
            says = f"Previous response with id '{turn.previous}' not found."
            raise BadField("/previous_response_id", says)
        chain = found
    earlier = [item for one in chain for item in one.items]
    items = {item["id"]: item for item in earlier}
    for at, item in enumerate(turn.items):
        if is_reference(item) and item["id"] not in items:
            items |= await _referred(store, account, item["id"], at)
    return recalled(turn, earlier, items)


async def _referred(store: ResponsesStore, account: str, item_id: str, at: int) -> dict[str, Item]:
    """The items of the response that this one is part of: its id is in theirs."""
    _, _, rest = item_id.partition("_")
    stored = await store.get(account, f"resp_{rest.partition('_')[0]}")
    items = () if stored is None else (*stored.input, *stored.response["output"])
    found = {item["id"]: item for item in items}
    if item_id not in found:
        raise BadField(f"/input/{at}/id", f"Item with id '{item_id}' not found.")
    return found


def _named(item: Item, at: int, request_id: str) -> Item:
    """An item of the input with an id, its client's if it has one."""
    prefix = _PREFIX.get(item["type"], "item")
    return {"id": f"{prefix}_{request_id}_in{at}"} | item


def routes(
    prefix: str, service: Service, store: ResponsesStore, around: Callable[[ASGIApp, str], ASGIApp]
) -> list[Route]:
    """`prefix`: the path up to /responses. `around`: what goes around an endpoint that runs a
    model, by its route as in logs."""
    base = f"{prefix}/responses"

    async def found(request: Request) -> tuple[str, Stored]:
        """Account and response that are asked for; Failure unless both are the key's."""
        account, response_id = _account(request, service), request.path_params["response_id"]
        stored = await store.get(account, response_id)
        if stored is None:
            raise Failure(Code.NOT_FOUND, f"Response with id '{response_id}' not found.")
        return account, stored

    async def retrieve(request: Request) -> Response:
        _, stored = await found(request)
        return _json(stored.response)

    async def delete(request: Request) -> Response:
        account, stored = await found(request)
        await store.delete(account, stored.id)
        return _json({"id": stored.id, "object": "response", "deleted": True})

    async def input_items(request: Request) -> Response:
        _, stored = await found(request)
        return _json(_page(stored.input, request.query_params))

    return [
        Route(base, around(RunResponses(service, store), Responses.route), methods=["POST"]),
        Route(f"{base}/{{response_id}}", _of_method(retrieve, delete), methods=["GET", "DELETE"]),
        Route(f"{base}/{{response_id}}/input_items", input_items, methods=["GET"]),
    ]


def _of_method(get: Handler, delete: Handler) -> Handler:
    async def either(request: Request) -> Response:
        return await (delete if request.method == "DELETE" else get)(request)

    return either


def _account(request: Request, service: Service) -> str:
    record = record_of(request.scope)
    record.route = Responses.route
    account = request.path_params.get("account_id")
    tenant = service.verifier.tenant(authorization(request.headers), account)
    record.account, record.tenant = tenant.account, tenant
    return tenant.account


def _page(items: Sequence[Item], query: QueryParams) -> dict[str, object]:
    """The items after the one called `after`, the last ones first unless `order` is asc."""
    limit, order, after = query.get("limit", "20"), query.get("order", "desc"), query.get("after")
    if not limit.isdecimal() or not 1 <= int(limit[:9]) <= _MOST_LISTED:
        raise BadField("/limit", f"'limit' must be 1 to {_MOST_LISTED}")
    if order not in {"asc", "desc"}:
        raise BadField("/order", "'order' must be one of 'asc', 'desc'")
    listed = list(items) if order == "asc" else list(reversed(items))
    if after is not None:
        ids = [item["id"] for item in listed]
        listed = listed[ids.index(after) + 1 :] if after in ids else []
    shown = listed[: int(limit)]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(shown) < len(listed),
    }


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type=JSON)
