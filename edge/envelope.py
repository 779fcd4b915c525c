"""What every answer of the v4 API is wrapped in, and how a failure looks inside it. Pure."""

from __future__ import annotations

from typing import Any

from edge.ask import Usage
from routing.errors import Code, Failure

# What Cloudflare documents for these, word for word: clients match on them.
_DOCUMENTED = {
    Code.UNAUTHENTICATED: "Authentication error",
    Code.NO_CAPACITY: "Capacity temporarily exceeded, please try again.",
}


def envelope(result: Any) -> dict[str, Any]:
    """A success: {"result", "success", "errors", "messages"}."""
    return {"result": result, "success": True, "errors": [], "messages": []}


def error_envelope(failure: Failure) -> dict[str, Any]:
    """A failure, with the public code of routing.errors."""
    error = {"code": failure.code.meaning.public, "message": message(failure)}
    return {"result": None, "success": False, "errors": [error], "messages": []}


def message(failure: Failure) -> str:
    """What the client reads."""
    return _DOCUMENTED.get(failure.code, failure.detail)


def usage(used: Usage) -> dict[str, Any]:
    """Token counts under the names that both APIs share."""
    counts: dict[str, Any] = {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.prompt_tokens + used.completion_tokens,
    }
    if used.cached_tokens:
        counts["prompt_tokens_details"] = {"cached_tokens": used.cached_tokens}
    if used.reasoning_tokens:
        counts["completion_tokens_details"] = {"reasoning_tokens": used.reasoning_tokens}
    return counts
