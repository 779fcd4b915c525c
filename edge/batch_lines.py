"""The JSON lines of OpenAI's batches: requests in, answers out. Knows no store and no HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import msgspec

from edge.checks import BadField, Fields, as_fields, mismatch, required
from edge.jobs import Item, Status
from routing.errors import Failure

# What a batch may ask for: an address as OpenAI's clients name it, and the route that answers it.
ENDPOINTS = {
    "/v1/chat/completions": "v1/chat/completions",
    "/v1/completions": "v1/completions",
    "/v1/embeddings": "v1/embeddings",
    "/v1/responses": "v1/responses",
}

MOST_REQUESTS = 50_000
_MOST_ERRORS = 100  # of a file that are told
_MOST_NAME_CHARS = 512
_AROUND_BYTES = 10_000  # of a line, beside the body of its request

Check = Callable[[bytes], object]  # raises Failure for a body that its route would refuse


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a line cannot be a request; `line` counts from 1, None: the file as a whole."""

    code: str
    says: str
    line: int | None = None
    param: str | None = None

    @property
    def told(self) -> dict[str, Any]:
        return {"code": self.code, "line": self.line, "message": self.says, "param": self.param}


def requests(
    content: bytes, endpoint: str, check: Check, *, most_bytes: int
) -> tuple[list[tuple[str | None, bytes]], list[Problem]]:
    """Custom ids and bodies in the file's order, and what is wrong with it: all, or enough.

    `most_bytes`: of one body, as its route takes it.
    """
    found: dict[str, bytes] = {}
    problems: list[Problem] = []
    # One by one: of all lines at once a file may have as many as bytes.
    for number, line in enumerate(BytesIO(content), 1):
        if not line.strip():
            continue
        try:
            name, body = _request(line, endpoint, check, most_bytes)
            if name in found:
                raise BadField("/custom_id", f"the custom_id {name!r} is not unique")
            found[name] = body
        except Failure as failure:
            param = failure.pointer if isinstance(failure, BadField) else None
            problems.append(Problem("invalid_request", failure.detail, number, param))
        if len(found) > MOST_REQUESTS:
            says = f"a batch holds at most {MOST_REQUESTS} requests"
            problems.append(Problem("too_many_requests", says))
        if len(found) > MOST_REQUESTS or len(problems) >= _MOST_ERRORS:
            break
    if not found and not problems:
        problems = [Problem("empty_file", "the file holds no requests")]
    return list(found.items()), problems


def _request(line: bytes, endpoint: str, check: Check, most_bytes: int) -> tuple[str, bytes]:
    if len(line) > most_bytes + _AROUND_BYTES:
        raise BadField("", f"a body may have {most_bytes} bytes, and the line has {len(line)}")
    try:
        fields = as_fields("", msgspec.json.decode(line))
    except RecursionError:
        raise BadField("", "the line is nested too deeply") from None
    except ValueError as malformed:
        raise BadField("", f"the line is not valid JSON: {malformed}") from None
    fields.need("custom_id", "method", "url", "body")
    name = fields.text("custom_id") or ""
    if not 0 < len(name) <= _MOST_NAME_CHARS:
        raise BadField("/custom_id", f"'/custom_id' must have 1 to {_MOST_NAME_CHARS} characters")
    if fields.text("method") != "POST":
        raise BadField("/method", "'/method' must be 'POST'")
    if fields.text("url") != endpoint:
        raise BadField("/url", f"'/url' must be '{endpoint}', the endpoint of the batch")
    return name, checked(fields.value("body"), "/body", check)


def checked(value: Any, pointer: str, check: Check) -> bytes:
    """The body of one of several requests; a refusal names its field in the whole of them."""
    if not isinstance(value, dict):
        raise mismatch(pointer, value, "object")
    if Fields(value, pointer).flag("stream"):
        raise BadField(f"{pointer}/stream", f"'{pointer}/stream': what is queued is not streamed")
    body = msgspec.json.encode(value)
    try:
        check(body)
    except BadField as bad:
        raise _inside(bad, pointer) from None
    return body


def _inside(bad: BadField, pointer: str) -> BadField:
    says = bad.detail.removeprefix("AiError: Bad input: Error: ")
    named = says.replace(f"'{bad.pointer or '/'}'", f"'{pointer}{bad.pointer}'")
    if named == says:
        named = f"in '{pointer}': {says}"
    return BadField(f"{pointer}{bad.pointer}", named)


def answers(batch: str, items: list[Item], ended: Status) -> Iterator[tuple[bool, bytes]]:
    """A line of each: whether it belongs to the output, else to the errors."""
    for item in items:
        line: dict[str, Any] = {"id": f"batch_req_{batch}_{item.place}", "custom_id": item.name}
        if item.answer is None:
            code = "batch_cancelled" if ended == "cancelled" else "batch_expired"
            says = f"the batch was {ended} before this request was answered"
            line |= {"response": None, "error": {"code": code, "message": says}}
        else:
            response = {
                "status_code": item.status,
                "request_id": item.request_id,
                "body": msgspec.Raw(item.answer),
            }
            line |= {"response": response, "error": None}
        yield item.status == 200, msgspec.json.encode(line) + b"\n"


def need_endpoint(fields: Fields) -> str:
    """A supported `endpoint`."""
    endpoint = fields.text("endpoint")
    if endpoint is None:
        raise BadField("/endpoint", required("", "endpoint"))
    if endpoint not in ENDPOINTS:
        known = ", ".join(f"'{name}'" for name in ENDPOINTS)
        raise BadField("/endpoint", f"'/endpoint' must be one of {known}")
    return endpoint
