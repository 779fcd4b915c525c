"""The one vocabulary of failure that crosses a process boundary. Knows no HTTP library."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """What a code tells each kind of reader."""

    status: int  # HTTP status shown to the client
    public: int  # Workers AI error code shown to the client
    elsewhere: bool = False  # whether another region may answer where this one did not
    openai_type: str = "invalid_request_error"  # `error.type` on /ai/v1


class Code(StrEnum):
    """Why a request failed. The value is the label used in logs and metrics."""

    BAD_INPUT = "bad_input"
    UNKNOWN_MODEL = "unknown_model"
    NO_ADAPTERS = "no_adapters"
    NO_ROUTE = "no_route"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    KEY_REUSED = "key_reused"
    WRONG_METHOD = "wrong_method"
    UNAUTHENTICATED = "unauthenticated"
    TOO_LARGE = "too_large"
    TIMEOUT = "timeout"
    ABORTED = "aborted"
    NO_CAPACITY = "no_capacity"
    RATE_LIMITED = "rate_limited"
    QUOTA = "quota"
    UNAVAILABLE = "unavailable"
    LOST = "lost"
    DRAINING = "draining"
    STALE_TOKENIZER = "stale_tokenizer"
    INCOMPATIBLE = "incompatible"
    INTERNAL = "internal"

    @property
    def meaning(self) -> Meaning:
        return _MEANINGS[self]

    @property
    def elsewhere(self) -> bool:
        """Whether another region may be asked."""
        return _MEANINGS[self].elsewhere


_SERVER = "server_error"
_MEANINGS = {
    Code.BAD_INPUT: Meaning(status=400, public=5006),
    Code.UNKNOWN_MODEL: Meaning(status=400, public=5007),
    # A model without LoRA adapters was asked for one.
    Code.NO_ADAPTERS: Meaning(status=405, public=5005),
    Code.NO_ROUTE: Meaning(status=404, public=7003),
    # An id of nothing that this account has.
    Code.NOT_FOUND: Meaning(status=404, public=7003),
    # What was asked is being done already, or cannot be done to a thing in its state.
    Code.CONFLICT: Meaning(status=409, public=7010),
    # An idempotency key that came before, with another request.
    Code.KEY_REUSED: Meaning(status=422, public=7011),
    Code.WRONG_METHOD: Meaning(status=405, public=7001),
    Code.UNAUTHENTICATED: Meaning(status=401, public=10000, openai_type="authentication_error"),
    Code.TOO_LARGE: Meaning(status=413, public=3006),
    Code.TIMEOUT: Meaning(status=408, public=3007, openai_type="timeout_error"),
    Code.ABORTED: Meaning(status=408, public=3008, openai_type="timeout_error"),
    Code.NO_CAPACITY: Meaning(
        status=429, public=3040, elsewhere=True, openai_type="rate_limit_error"
    ),
    # Too many requests of one account or key. Workers AI documents no code for it.
    Code.RATE_LIMITED: Meaning(status=429, public=2003, openai_type="rate_limit_error"),
    # What an account or key may use in a day or month is used up.
    Code.QUOTA: Meaning(status=429, public=3036, openai_type="insufficient_quota"),
    # The region is up and says that it has nothing ready for this model.
    Code.UNAVAILABLE: Meaning(status=503, public=7009, elsewhere=True, openai_type=_SERVER),
    # The process that was asked is gone, or its link is.
    Code.LOST: Meaning(status=503, public=7009, elsewhere=True, openai_type=_SERVER),
    # The process that was asked is being stopped, and has done nothing for the request.
    Code.DRAINING: Meaning(status=503, public=7009, elsewhere=True, openai_type=_SERVER),
    # The edge's tokenizer is not the region's: fetch it anew by digest and try once more.
    Code.STALE_TOKENIZER: Meaning(status=503, public=7009, elsewhere=True, openai_type=_SERVER),
    # Prefill and decode disagree about KV: never silently wrong.
    Code.INCOMPATIBLE: Meaning(status=503, public=7009, elsewhere=True, openai_type=_SERVER),
    Code.INTERNAL: Meaning(status=500, public=5000, openai_type=_SERVER),
}


class Failure(Exception):
    """A request failed for a reason its caller may be told."""

    def __init__(self, code: Code, detail: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.retry_after_s = retry_after_s
