"""What the OpenAPI document says of the store: files, batches, jobs, logs, and headers of any run.

Pure. An edge that was given no store (`--store`; `fleet up` gives one) has none of these routes.
"""

from __future__ import annotations

from typing import Any

from edge import schemas
from edge.batch_lines import ENDPOINTS
from edge.fallback import (
    ATTEMPTS,
    BACKOFF,
    DELAY,
    MODELS,
    MOST_ATTEMPTS,
    MOST_DELAY_MS,
    MOST_TIMEOUT_MS,
    TIMEOUT,
)
from edge.gateway import KEY, MOST_CACHE_S, MOST_KEY_CHARS, MOST_METADATA, MOST_METADATA_CHARS
from edge.openapi_parts import (
    NUMBER,
    OBJECT,
    Operation,
    Parameter,
    enveloped,
    headers,
    with_body,
    without_body,
)
from edge.schemas import Schema
from routing.errors import Code

_VISIBLE: Schema = {"type": "string", "pattern": "^[!-~]+$"}
_SWITCH: Schema = {"enum": ["true", "false"]}


def _whole(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


# Of every request that runs a model.
GATEWAY = headers(
    {
        KEY: _VISIBLE | {"maxLength": MOST_KEY_CHARS},
        "x-session-affinity": _VISIBLE,
        "cf-aig-cache-ttl": _whole(1, MOST_CACHE_S),
        "cf-aig-cache-key": _VISIBLE,
        "cf-aig-skip-cache": _SWITCH,
        "cf-aig-collect-log": _SWITCH,
        "cf-aig-collect-log-payload": _SWITCH,
        "cf-aig-metadata": {
            "type": "string",
            "contentMediaType": "application/json",
            "description": f"A JSON object of up to {MOST_METADATA} strings, numbers and booleans.",
            "maxLength": MOST_METADATA_CHARS,
        },
        TIMEOUT: _whole(1, MOST_TIMEOUT_MS),
        ATTEMPTS: _whole(1, MOST_ATTEMPTS),
        DELAY: _whole(0, MOST_DELAY_MS),
        BACKOFF: {"enum": ["constant", "linear", "exponential"]},
        MODELS: _VISIBLE | {"description": "Models to turn to, with commas between."},
    }
)
# What such a request is refused with besides: its key is in use, or came with another body.
GATEWAY_CODES = (Code.CONFLICT, Code.KEY_REUSED)
# Of the native routes, whose requests may be queued.
QUEUE: list[Parameter] = [
    {"name": "queueRequest", "in": "query", "schema": _SWITCH},
    {"name": "webhook", "in": "query", "schema": {"type": "string", "format": "uri"}},
]
QUEUED: Schema = {
    "type": "object",
    "required": ["status", "request_id", "model"],
    "properties": {
        "status": {"enum": ["queued", "running"]},
        "request_id": schemas.TEXT,
        "model": schemas.TEXT,
    },
}

_LIST: Schema = {
    "type": "object",
    "required": ["object", "data", "has_more"],
    "properties": {"object": {"const": "list"}, "data": {"type": "array"}},
}
_FILE = {"type": "object", "required": ["id", "object", "bytes", "filename", "purpose"]}
_BATCH = {"type": "object", "required": ["id", "object", "status", "endpoint", "request_counts"]}
_UPLOAD: Schema = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"const": "batch"},
    },
}
_NEW_BATCH: Schema = {
    "type": "object",
    "required": ["input_file_id", "endpoint", "completion_window"],
    "properties": {
        "input_file_id": schemas.TEXT,
        "endpoint": {"enum": [*ENDPOINTS]},
        "completion_window": {"const": "24h"},
        "metadata": schemas.METADATA,
    },
}
_GONE = (Code.NOT_FOUND,)


def of_v1(v1: str) -> dict[str, Any]:
    """OpenAI's files and batches."""
    after = {"after": schemas.TEXT}
    return {
        f"{v1}/files": {
            "post": _form(with_body("Upload a file.", _UPLOAD, _FILE)),
            "get": without_body(
                "The account's files.",
                _LIST,
                after | {"purpose": schemas.TEXT, "limit": _whole(1, 10_000)},
            ),
        },
        f"{v1}/files/{{file}}": {
            "get": without_body("A file.", _FILE, more=_GONE),
            "delete": without_body("Delete a file.", OBJECT, more=_GONE),
        },
        f"{v1}/files/{{file}}/content": {
            "get": without_body(
                "What is in a file.", {}, media="application/octet-stream", more=_GONE
            )
        },
        f"{v1}/batches": {
            "post": with_body("Begin a batch.", _NEW_BATCH, _BATCH, more=_GONE),
            "get": without_body("The account's batches.", _LIST, after | {"limit": _whole(1, 100)}),
        },
        f"{v1}/batches/{{batch}}": {"get": without_body("A batch.", _BATCH, more=_GONE)},
        f"{v1}/batches/{{batch}}/cancel": {
            "post": without_body("Cancel a batch.", _BATCH, more=(*_GONE, Code.CONFLICT))
        },
    }


def of_account(ai: str) -> dict[str, Any]:
    """Request logs, and the secret that webhooks are signed with."""
    rows = enveloped({"type": "array", "items": {"type": "object"}})
    time: Schema = {"type": "string", "format": "date-time"}
    search = without_body(
        "Requests that ran a model.",
        rows,
        {
            "search": schemas.TEXT,
            "model": schemas.TEXT,
            "status": _whole(100, 599),
            "from": time,
            "to": time,
            "page": NUMBER | {"maximum": 100_000},
            "per_page": _whole(1, 100),
        },
    )
    secret = {"type": "object", "required": ["secret"]}
    return {
        f"{ai}/logs": {"get": search},
        f"{ai}/logs/{{log}}": {"get": without_body("One of them.", enveloped(OBJECT), more=_GONE)},
        f"{ai}/webhooks/secret": {"get": without_body("The account's secret.", enveloped(secret))},
    }


def _form(operation: Operation) -> Operation:
    """The same with its body as a form."""
    [sent] = operation["requestBody"]["content"].values()
    return operation | {"requestBody": {"required": True, "content": {"multipart/form-data": sent}}}
