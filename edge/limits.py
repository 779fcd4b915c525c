"""What an account, or one of its keys, may use: which limits hold for a request. Pure.

A limit is written NAME=COUNT/PERIOD. What it counts is in its name:

    text-generation, text-embeddings, ...  requests for models of that task, in a sliding window
    @cf/...                                requests for that model, likewise
    requests                               all of them, likewise
    tokens, neurons, usd                   what answers took, in calendar periods of UTC

Knows no clock and no file: `edge.meter` counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, cast

Period = Literal["s", "min", "hour", "day", "month"]

WINDOW_S: dict[Period, float] = {"s": 1.0, "min": 60.0, "hour": 3600.0}
AMOUNTS = frozenset({"tokens", "neurons", "usd"})
MOST_COUNTED = 100_000  # requests of one window: each is kept until it is out of the window

_LIMIT = re.compile(
    r"(?P<name>@?[a-z0-9][\w./@-]{0,127})=(?P<most>\d{1,12}(\.\d{1,6})?)/(?P<period>s|min|hour|day|month)"
)


@dataclass(frozen=True, slots=True)
class Limit:
    """At most so much of it in any such period."""

    name: str
    most: float
    period: Period

    @property
    def is_amount(self) -> bool:
        """Whether it counts what answers took, which is known when they end."""
        return self.name in AMOUNTS

    def __str__(self) -> str:
        return f"{self.name}={self.most:.15g}/{self.period}"


@dataclass(frozen=True, slots=True)
class Rule:
    """A limit, and whose use is counted together."""

    limit: Limit
    bucket: str


@dataclass(frozen=True, slots=True)
class Standing:
    """How a rule stands once a request was let in."""

    limit: Limit
    remaining: float
    reset_s: float  # until there is as much as could ever be
    at: float = 0.0  # Unix seconds: when a request was counted


# As documented on 2026-07-02; https://developers.cloudflare.com/workers-ai/platform/limits/
WORKERS_AI = (
    Limit("text-generation", 300, "min"),
    Limit("text-embeddings", 3000, "min"),
    Limit("@cf/baai/bge-large-en-v1.5", 1500, "min"),
    Limit("summarization", 1500, "min"),
    Limit("text-classification", 2000, "min"),
    Limit("image-classification", 3000, "min"),
    Limit("object-detection", 3000, "min"),
    Limit("automatic-speech-recognition", 720, "min"),
    Limit("text-to-speech", 720, "min"),
    Limit("image-to-text", 720, "min"),
    Limit("text-to-image", 720, "min"),
    Limit("translation", 720, "min"),
    Limit("neurons", 10_000, "day"),
)
PRESETS: dict[str, tuple[Limit, ...]] = {"off": (), "workers-ai": WORKERS_AI}
TASKS = tuple(it.name for it in WORKERS_AI if not it.is_amount and not it.name.startswith("@"))
_MODEL = re.compile(r"@[\w.-]+/[\w.-]+/[\w.-]+")  # as catalogues have them


def parse_limit(text: str) -> Limit:
    """NAME=COUNT/PERIOD; ValueError says what is wrong with it."""
    match = _LIMIT.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not NAME=COUNT/PERIOD, as text-generation=300/min")
    limit = Limit(match["name"], float(match["most"]), cast("Period", match["period"]))
    if limit.is_amount:
        return limit
    if limit.period not in WINDOW_S:
        raise ValueError(f"{text!r}: requests are counted by s, min or hour")
    if limit.most > MOST_COUNTED or not limit.most.is_integer():
        raise ValueError(f"{text!r}: must be a whole number up to {MOST_COUNTED:,}")
    return limit


def check_name(limit: Limit) -> None:
    """ValueError for a name that no request has, which would limit nothing."""
    known = ("requests", *sorted(AMOUNTS), *TASKS)
    if limit.name not in known and not _MODEL.fullmatch(limit.name):
        raise ValueError(f"'{limit}': {limit.name} is no model and none of {', '.join(known)}")


def rules_of(
    account: str,
    key_id: str,
    *,
    of_key: Iterable[Limit],
    of_account: Iterable[Limit],
    model: str,
    task: str,
) -> tuple[Rule, ...]:
    """What holds for one request. A key's own limit, counted for that key alone, goes before its
    account's of the same name and period; and a model's before its task's."""
    named = {(it.name, it.period): Rule(it, f"account {account}") for it in of_account}
    named |= {(it.name, it.period): Rule(it, f"key {key_id}") for it in of_key}
    wanted = {"requests", model, task, *AMOUNTS}
    rules = [rule for rule in named.values() if rule.limit.name in wanted]
    by_model = {rule.limit.period for rule in rules if rule.limit.name == model}
    return tuple(
        rule for rule in rules if rule.limit.name != task or rule.limit.period not in by_model
    )


def period_of(period: Period, now: float) -> tuple[float, float]:
    """Begin and end of the calendar period around `now`, in Unix seconds."""
    if period in WINDOW_S:
        length = WINDOW_S[period]
        begin = now // length * length
        return begin, begin + length
    at = datetime.fromtimestamp(now, UTC)
    midnight = at.replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        return midnight.timestamp(), (midnight + timedelta(days=1)).timestamp()
    first = midnight.replace(day=1)
    return first.timestamp(), (first + timedelta(days=32)).replace(day=1).timestamp()


def headers_of(standings: Iterable[Standing]) -> list[tuple[bytes, bytes]]:
    """`x-ratelimit-*` as OpenAI's clients know them: of requests, and of tokens, the tightest."""
    headers: list[tuple[bytes, bytes]] = []
    for kind in ("requests", "tokens"):
        of_kind = [it for it in standings if _kind(it.limit) == kind]
        if not of_kind:
            continue
        it = min(of_kind, key=lambda standing: standing.remaining)
        for name, value in (
            ("limit", f"{it.limit.most:.0f}"),
            ("remaining", f"{max(0.0, it.remaining):.0f}"),
            ("reset", f"{it.reset_s:.3f}s"),
        ):
            headers.append((f"x-ratelimit-{name}-{kind}".encode(), value.encode()))
    return headers


def _kind(limit: Limit) -> str:
    return limit.name if limit.is_amount else "requests"
