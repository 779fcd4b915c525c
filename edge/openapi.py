"""The OpenAPI 3.1 document of the public API, made of the schemas that are enforced. Pure."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from edge import openapi_store, schemas
from edge.openapi_parts import (
    DATE,
    NUMBER,
    OBJECT,
    Operation,
    Parameter,
    enveloped,
    path_parameters,
    with_body,
    without_body,
)
from edge.openapi_store import GATEWAY, GATEWAY_CODES, QUEUE, QUEUED
from edge.schemas import Schema
from routing.errors import Code

NATIVE = "/client/v4/accounts/{account_id}/ai"
V1S = (f"{NATIVE}/v1", "/v1")

_ANTHROPIC_ERROR: Schema = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}


def document() -> dict[str, Any]:
    paths = _native() | openapi_store.of_account(NATIVE)
    for v1 in V1S:
        paths |= _openai(v1) | _later_apis(v1) | openapi_store.of_v1(v1)
    paths |= _listings()
    for path, methods in paths.items():
        for operation in methods.values():
            operation["parameters"] += path_parameters(path)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Edgefire", "version": version("edgefire"), "license": _LICENCE},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}],
    }


def _native() -> dict[str, Any]:
    taken: Schema = {"oneOf": [schemas.GENERATION_INPUT, schemas.EMBEDDING_INPUT]}
    given = {"anyOf": [schemas.GENERATION_OUTPUT, schemas.EMBEDDING_OUTPUT, QUEUED]}
    named: Schema = {
        "type": "object",
        "required": ["model", "input"],
        "properties": {"model": schemas.TEXT, "input": taken},
    }
    return {
        f"{NATIVE}/run/{{model}}": {"post": _run("Run a model.", taken, enveloped(given), QUEUE)},
        f"{NATIVE}/run": {
            "post": _run("Run the model that the body names.", named, enveloped(given), QUEUE)
        },
    }


def _openai(v1: str) -> dict[str, Any]:
    chat, completion, vectors = (
        schemas.CHAT_INPUT,
        schemas.COMPLETION_INPUT,
        schemas.EMBEDDINGS_INPUT,
    )
    return {
        f"{v1}/chat/completions": {"post": _run("OpenAI chat.", chat, OBJECT)},
        f"{v1}/completions": {"post": _run("OpenAI completions.", completion, OBJECT)},
        f"{v1}/embeddings": {"post": _run("OpenAI embeddings.", vectors, OBJECT)},
        f"{v1}/models": {"get": without_body("Models, as OpenAI lists them.", OBJECT)},
        f"{v1}/models/{{model}}": {"get": without_body("One model.", OBJECT)},
    }


def _later_apis(v1: str) -> dict[str, Any]:
    """OpenAI's Responses and Anthropic's Messages."""
    turn, message = schemas.RESPONSES_INPUT, schemas.MESSAGES_INPUT
    gone = (Code.NOT_FOUND,)
    paging = {"limit": NUMBER, "order": schemas.ORDER, "after": schemas.TEXT}
    counted = with_body("Tokens of a prompt.", schemas.COUNT_INPUT, OBJECT, error=_ANTHROPIC_ERROR)
    return {
        f"{v1}/responses": {"post": _run("OpenAI responses.", turn, OBJECT)},
        f"{v1}/responses/{{response_id}}": {
            "get": without_body("A stored response.", OBJECT, more=gone),
            "delete": without_body("Forget a stored response.", OBJECT, more=gone),
        },
        f"{v1}/responses/{{response_id}}/input_items": {
            "get": without_body("Its input items.", OBJECT, paging, more=gone)
        },
        f"{v1}/responses/input_tokens": {"post": with_body("Tokens of an input.", turn, OBJECT)},
        f"{v1}/messages": {
            "post": _run("Anthropic messages.", message, OBJECT, error=_ANTHROPIC_ERROR)
        },
        f"{v1}/messages/count_tokens": {"post": counted},
    }


def _listings() -> dict[str, Any]:
    page = {"page": NUMBER | {"maximum": 1_000_000}, "per_page": NUMBER | {"maximum": 100}}
    words = {"search": schemas.TEXT, "author": schemas.TEXT, "task": schemas.TEXT}
    listed = enveloped({"type": "array", "items": {"type": "object"}})
    usage: dict[str, Schema] = {
        "from": DATE,
        "to": DATE,
        "model": schemas.TEXT,
        "group_by": {"enum": ["day", "model", "key"]},
    }
    schema = without_body(
        "What a model takes and gives.", enveloped(OBJECT), {"model": schemas.TEXT}, needs=["model"]
    )
    made = {
        "/models/search": without_body("Models that are served now.", listed, words | page),
        "/models/schema": schema,
        "/tasks/search": without_body("What models are for.", listed, page),
        "/authors/search": without_body("Who made models.", listed, page),
        "/usage": without_body("What the account used, and what it cost.", listed, usage | page),
        "/v1/regions": without_body("Each region as this edge sees it.", listed),
    }
    return {NATIVE + path: {"get": operation} for path, operation in made.items()}


_LICENCE = {"name": "Apache-2.0"}


def _run(
    says: str,
    body: Schema,
    answer: Schema,
    parameters: list[Parameter] | None = None,
    **more: Any,
) -> Operation:
    """A request that runs a model."""
    made = with_body(says, body, answer, streams=True, more=GATEWAY_CODES, **more)
    return made | {"parameters": [*GATEWAY, *(parameters or ())]}
