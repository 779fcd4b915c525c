"""What a limit says, and which hold for a request."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from edge.limits import (
    PRESETS,
    WORKERS_AI,
    Limit,
    Rule,
    Standing,
    headers_of,
    parse_limit,
    period_of,
    rules_of,
)

LLAMA, BGE = "@cf/meta/llama-3.1-8b-instruct", "@cf/baai/bge-large-en-v1.5"


def rules(
    *of_key: Limit,
    of_account: tuple[Limit, ...] = WORKERS_AI,
    model: str = LLAMA,
    task: str = "text-generation",
) -> tuple[Rule, ...]:
    return rules_of("a", "k", of_key=of_key, of_account=of_account, model=model, task=task)


def test_the_documented_limits_hold_for_an_account() -> None:
    assert rules() == (
        Rule(Limit("text-generation", 300, "min"), "account a"),
        Rule(Limit("neurons", 10_000, "day"), "account a"),
    )
    embeddings = rules(model="@cf/baai/bge-m3", task="text-embeddings")
    assert embeddings[0].limit == Limit("text-embeddings", 3000, "min")
    assert PRESETS["off"] == ()


def test_a_models_limit_goes_before_its_tasks() -> None:
    names = [rule.limit.name for rule in rules(model=BGE, task="text-embeddings")]
    assert names == [BGE, "neurons"]


def test_a_keys_limit_goes_before_its_accounts_and_is_counted_alone() -> None:
    own = (Limit("text-generation", 900, "min"), Limit("usd", 5, "month"))
    assert rules(*own) == (
        Rule(own[0], "key k"),
        Rule(Limit("neurons", 10_000, "day"), "account a"),
        Rule(own[1], "key k"),
    )


def test_limits_of_two_periods_hold_both() -> None:
    own = (Limit("text-generation", 5, "s"), Limit("requests", 1000, "hour"))
    limits = [str(rule.limit) for rule in rules(*own)]
    assert limits == [
        "text-generation=300/min",
        "neurons=10000/day",
        "text-generation=5/s",
        "requests=1000/hour",
    ]


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("text-generation=300/min", Limit("text-generation", 300, "min")),
        ("requests=1/s", Limit("requests", 1, "s")),
        ("tokens=1000000/day", Limit("tokens", 1_000_000, "day")),
        ("usd=0.5/month", Limit("usd", 0.5, "month")),
        (f"{BGE}=1500/min", Limit(BGE, 1500, "min")),
    ],
)
def test_limits_are_written_as_they_are_read(text: str, limit: Limit) -> None:
    assert parse_limit(text) == limit
    assert parse_limit(str(limit)) == limit


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "tokens", "tokens=5", "tokens=5/", "tokens=5/year", "tokens=-5/day"),
        *("tokens=1e9/day", "TOKENS=5/day", "tokens=5/day ", "usd=nan/day", "requests=1.5/min"),
        *("requests=5/day", "text-generation=5/month", "requests=100001/min", "=5/min"),
    ],
)
def test_what_is_no_limit_is_refused_with_what_was_said(text: str) -> None:
    with pytest.raises(ValueError, match=r"NAME=COUNT/PERIOD|counted by|whole number") as caught:
        parse_limit(text)
    assert repr(text) in str(caught.value)


def unix(*parts: int) -> float:
    return datetime(*parts, tzinfo=UTC).timestamp()  # type: ignore[misc,arg-type]


def test_periods_are_those_of_the_calendar_in_utc() -> None:
    now = unix(2026, 12, 31, 23, 59, 59)
    assert period_of("day", now) == (unix(2026, 12, 31), unix(2027, 1, 1))
    assert period_of("month", now) == (unix(2026, 12, 1), unix(2027, 1, 1))
    assert period_of("hour", now) == (unix(2026, 12, 31, 23), unix(2027, 1, 1))
    assert period_of("min", now) == (unix(2026, 12, 31, 23, 59), unix(2027, 1, 1))
    assert period_of("day", unix(2027, 1, 1)) == (unix(2027, 1, 1), unix(2027, 1, 2))
    assert period_of("month", unix(2028, 2, 29, 12)) == (unix(2028, 2, 1), unix(2028, 3, 1))


def test_headers_tell_of_the_tightest() -> None:
    told = headers_of(
        [
            Standing(Limit("text-generation", 300, "min"), 12, 60.0),
            Standing(Limit("requests", 5, "s"), 3, 1.0),
            Standing(Limit("neurons", 10_000, "day"), 1, 5.0),
            Standing(Limit("tokens", 100, "day"), -7.5, 9.25),
        ]
    )
    assert told == [
        (b"x-ratelimit-limit-requests", b"5"),
        (b"x-ratelimit-remaining-requests", b"3"),
        (b"x-ratelimit-reset-requests", b"1.000s"),
        (b"x-ratelimit-limit-tokens", b"100"),
        (b"x-ratelimit-remaining-tokens", b"0"),
        (b"x-ratelimit-reset-tokens", b"9.250s"),
    ]
    assert headers_of([]) == []
