"""Pieces of an OpenAPI document: operations, parameters, answers and refusals. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edge.schemas import Schema, nullable
from routing.errors import Code

Operation = dict[str, Any]
Parameter = dict[str, Any]

OBJECT: Schema = {"type": "object"}
NUMBER: Schema = {"type": "integer", "minimum": 1}
DATE: Schema = {"type": "string", "format": "date"}

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


def enveloped(result: Schema) -> Schema:
    """A whole answer of the v4 API around `result`."""
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


def with_body(
    says: str,
    body: Schema,
    answer: Schema,
    *,
    streams: bool = False,
    more: Sequence[Code] = (),
    error: Schema = _ERROR,
) -> Operation:
    """`streams`: whether it may answer in server-sent events. `more`: codes it refuses with,
    beside those that all have."""
    content: dict[str, Any] = {"application/json": {"schema": answer}}
    if streams:
        content["text/event-stream"] = {"schema": {}}
    given = {"200": {"description": "The answer.", "content": content}}
    return {
        "summary": says,
        "parameters": [],
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": given | _refusals(*more, error=error),
    }


def without_body(
    says: str,
    answer: Schema,
    query: Mapping[str, Schema] | None = None,
    *,
    needs: Sequence[str] = (),
    media: str = "application/json",
    more: Sequence[Code] = (),
) -> Operation:
    """`needs`: parameters that must be there."""
    parameters = [
        {"name": name, "in": "query", "required": name in needs, "schema": schema}
        for name, schema in (query or {}).items()
    ]
    given = {"description": "What was asked.", "content": {media: {"schema": answer}}}
    return {
        "summary": says,
        "parameters": parameters,
        "responses": {"200": given} | _refusals(*more),
    }


def _refusals(*more: Code, error: Schema = _ERROR) -> dict[str, Any]:
    content = {"application/json": {"schema": error}}
    by_status = {str(code.meaning.status): code for code in (*_REFUSALS, *more)}
    return {
        status: {"description": f"Code {code.meaning.public}.", "content": content}
        for status, code in by_status.items()
    }


def headers(schemas: Mapping[str, Schema]) -> list[Parameter]:
    """Parameters that may come as headers."""
    return [{"name": name, "in": "header", "schema": schema} for name, schema in schemas.items()]


def path_parameters(path: str) -> list[Parameter]:
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in names
    ]
