"""What there is to ask: models, their schemas and tasks, the key itself, and the OpenAPI document.

Read-only and cheap: what regions last said of themselves, with what the catalogue knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge import listing, playground
from edge.auth import Tenant, Verifier
from edge.door import record_of
from edge.envelope import envelope
from edge.listing import Listed, listed, read_search
from edge.openapi import document
from edge.response import JSON
from edge.watch import Watch
from routing.catalogue import Catalogue
from routing.errors import Code, Failure

Answer = Callable[[list[Listed], Request], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    watch: Watch
    verifier: Verifier
    catalogue: Catalogue

    def routes(self, ai: str, v1s: tuple[str, ...]) -> list[Route]:
        """`ai`: the native API's prefix; `v1s`: those of OpenAI's."""
        native: Mapping[str, Answer] = {
            "/models/search": lambda models, request: listing.search_page(
                models, read_search(request.query_params)
            ),
            "/models/schema": lambda models, request: envelope(
                listing.model_schemas(models, _model(request))
            ),
            "/tasks/search": lambda models, request: _page(listing.tasks(models), request),
            "/authors/search": lambda models, request: _page(listing.authors(models), request),
        }
        openai: dict[str, Answer] = {
            "/regions": lambda models, request: envelope(self._regions()),
            "/models": lambda models, request: listing.openai_list(models),
            "/models/{model:path}": lambda models, request: listing.openai_model(
                models, request.path_params["model"]
            ),
        }
        paths = {ai + path: answer for path, answer in native.items()}
        paths |= {v1 + path: answer for v1 in v1s for path, answer in openai.items()}
        return [
            *(Route(path, self._page(answer), methods=["GET"]) for path, answer in paths.items()),
            Route("/client/v4/user/tokens/verify", self._verify, methods=["GET"]),
            Route("/openapi.json", _openapi, methods=["GET"]),
            *playground.routes(),
        ]

    def _regions(self) -> list[dict[str, Any]]:
        return playground.regions(self.watch.known(), self.watch.now())

    def _page(self, answer: Answer) -> Callable[[Request], Any]:
        async def page(request: Request) -> Response:
            self._tenant(request, "pages")
            await self.watch.wait_settled()
            known = self.watch.known()
            if not any(it.report for it in known):
                says = "no region has been reached yet"
                raise Failure(Code.UNAVAILABLE, says, retry_after_s=1.0)
            return _json(answer(listed(known, self.catalogue), request))

        return page

    async def _verify(self, request: Request) -> Response:
        """Whether a key is good: what Cloudflare's clients ask first."""
        tenant = self._tenant(request, "verify")
        said = {"code": 10000, "message": "This API Token is valid and active", "type": None}
        told = envelope({"id": tenant.key_id, "status": "active"})
        return _json(told | {"messages": [said]})

    def _tenant(self, request: Request, route: str) -> Tenant:
        record = record_of(request.scope)
        record.route = route
        account = request.path_params.get("account_id")
        tenant = self.verifier.tenant(request.headers.get("authorization"), account)
        record.account = tenant.account
        return tenant


def _page(rows: list[dict[str, str]], request: Request) -> dict[str, Any]:
    search = read_search(request.query_params)
    return listing.paged(rows, search.page, search.per_page, (search.page - 1) * search.per_page)


def _model(request: Request) -> str:
    model = request.query_params.get("model")
    if not model:
        raise Failure(Code.BAD_INPUT, "AiError: Bad input: Error: '?model=' names no model")
    return model


async def _openapi(request: Request) -> Response:
    record_of(request.scope).route = "openapi"
    return Response(_document(), media_type=JSON)


@cache
def _document() -> bytes:
    return msgspec.json.encode(document())


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type=JSON)
