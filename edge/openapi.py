"""The OpenAPI 3.1 document of the public API, made of the schemas that are enforced. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from edge import schemas
from edge.schemas import Schema, nullable
from routing.errors import Code

NATIVE = "/client/v4/accounts/{account_id}/ai"
V1S = (f"{NATIVE}/v1", "/v1")
_REFUSALS = (
    Code.BAD_INPUT,
    Code.UNAUTHENTICATED,
    Code.NO_ROUTE,
    Code.TIMEOUT,
    Code.TOO_LARGE,
    Code.NO_CAPACITY,
    Code.INTERNAL,
    Code.UNAVAILABLE,
)
_ERROR: Schema = {
    "type": "object",
    "required": ["result", "success", "errors", "messages"],
    "properties": {
        "result": {"type": "null"},
        "success": {"const": False},
        "errors": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["code", "message"],
                "properties": {"code": {"type": "integer"}, "message": {"type": "string"}},
            },
        },
        "messages": {"type": "array"},
        "error": {"type": "object", "description": "OpenAI's error object, on /v1 routes."},
    },
}

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
    chat, completion = schemas.CHAT_INPUT, schemas.COMPLETION_INPUT
    native: Schema = {"oneOf": [schemas.GENERATION_INPUT, schemas.EMBEDDING_INPUT]}
    result = _enveloped({"anyOf": [schemas.GENERATION_OUTPUT, schemas.EMBEDDING_OUTPUT]})
    envelope: Schema = {
        "type": "object",
        "required": ["model", "input"],
        "properties": {"model": schemas.TEXT, "input": native},
    }
    paths: dict[str, Any] = {
        f"{NATIVE}/run/{{model}}": {"post": _post("Run a model.", native, result)},
        f"{NATIVE}/run": {"post": _post("Run the model that the body names.", envelope, result)},
    }
    for v1 in V1S:
        paths[f"{v1}/chat/completions"] = {"post": _post("OpenAI chat.", chat, _OBJECT)}
        paths[f"{v1}/completions"] = {"post": _post("OpenAI completions.", completion, _OBJECT)}
        vectors = _post("OpenAI embeddings.", schemas.EMBEDDINGS_INPUT, _OBJECT)
        paths[f"{v1}/embeddings"] = {"post": vectors}
        paths |= _later_apis(v1)
        paths[f"{v1}/models"] = {"get": _get("Models, as OpenAI lists them.", _OBJECT)}
        paths[f"{v1}/models/{{model}}"] = {"get": _get("One model.", _OBJECT)}
    page = {"page": _NUMBER | {"maximum": 1_000_000}, "per_page": _NUMBER | {"maximum": 100}}
    words = {"search": schemas.TEXT, "author": schemas.TEXT, "task": schemas.TEXT}
    listed = _enveloped({"type": "array", "items": {"type": "object"}})
    for path, says, query in (
        ("/models/search", "Models that are served now.", words | page),
        ("/tasks/search", "What models are for.", page),
        ("/authors/search", "Who made models.", page),
    ):
        paths[NATIVE + path] = {"get": _get(says, listed, query)}
    schema = _get("What a model takes and gives.", _enveloped(_OBJECT), {"model": schemas.TEXT})
    paths[f"{NATIVE}/models/schema"] = {"get": schema}
    paths[f"{NATIVE}/usage"] = {"get": _usage(listed, page)}
    for path, methods in paths.items():
        for operation in methods.values():
            operation["parameters"] += _path_parameters(path)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Edgefire", "version": version("edgefire"), "license": _LICENCE},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}],
    }


def _later_apis(v1: str) -> dict[str, Any]:
    """OpenAI's Responses and Anthropic's Messages."""
    turn, message = schemas.RESPONSES_INPUT, schemas.MESSAGES_INPUT
    items = _get("Its input items.", _OBJECT, {"limit": _NUMBER, "order": schemas.ORDER})
    stored = {
        "get": _get("A stored response.", _OBJECT),
        "delete": _get("Forget a stored response.", _OBJECT),
    }
    for operation in (items, *stored.values()):
        operation["responses"] |= _refusals(Code.NOT_FOUND)
    told = _refusals(error=_ANTHROPIC_ERROR)
    counted = _post("Tokens of a prompt.", schemas.COUNT_INPUT, _OBJECT, told)
    return {
        f"{v1}/responses": {"post": _post("OpenAI responses.", turn, _OBJECT)},
        f"{v1}/responses/{{response_id}}": stored,
        f"{v1}/responses/{{response_id}}/input_items": {"get": items},
        f"{v1}/responses/input_tokens": {"post": _post("Tokens of an input.", turn, _OBJECT)},
        f"{v1}/messages": {"post": _post("Anthropic messages.", message, _OBJECT, told)},
        f"{v1}/messages/count_tokens": {"post": counted},
    }


_LICENCE = {"name": "Apache-2.0"}
_OBJECT: Schema = {"type": "object"}
_NUMBER: Schema = {"type": "integer", "minimum": 1}
_DATE: Schema = {"type": "string", "format": "date"}


def _enveloped(result: Schema) -> Schema:
    return {
        "type": "object",
        "required": ["result", "success", "errors", "messages"],
        "properties": {
            "result": nullable(result),
            "success": {"const": True},
            "errors": {"type": "array", "maxItems": 0},
            "messages": {"type": "array"},
        },
    }


def _post(
    says: str, body: Schema, answer: Schema, refusals: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    content = {"application/json": {"schema": answer}, "text/event-stream": {"schema": {}}}
    return {
        "summary": says,
        "parameters": [],
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {
            "200": {"description": "The answer.", "content": content},
            **(refusals or _refusals()),
        },
    }


def _get(says: str, answer: Schema, query: Mapping[str, Schema] | None = None) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "query", "required": name == "model", "schema": schema}
        for name, schema in (query or {}).items()
    ]
    content = {"application/json": {"schema": answer}}
    return {
        "summary": says,
        "parameters": parameters,
        "responses": {"200": {"description": "What was asked.", "content": content}, **_refusals()},
    }


def _usage(rows: Schema, page: Mapping[str, Schema]) -> dict[str, Any]:
    query: dict[str, Schema] = {
        "from": _DATE,
        "to": _DATE,
        "model": schemas.TEXT,
        "group_by": {"enum": ["day", "model", "key"]},
    }
    get = _get("What the account used, and what it cost.", rows, query | dict(page))
    for parameter in get["parameters"]:
        parameter["required"] = False
    return get


def _refusals(*more: Code, error: Schema = _ERROR) -> dict[str, Any]:
    content = {"application/json": {"schema": error}}
    by_status = {str(code.meaning.status): code for code in (*_REFUSALS, *more)}
    return {
        status: {"description": f"Code {code.meaning.public}.", "content": content}
        for status, code in by_status.items()
    }


def _path_parameters(path: str) -> list[dict[str, Any]]:
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in names
    ]
