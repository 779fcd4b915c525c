"""Which models are tried for a request, how often, and how long each may take to begin.

As Cloudflare's AI Gateway has it in headers:

    cf-aig-request-timeout   ms to the first part of an answer: then 408, or the next try
    cf-aig-max-attempts      tries of each model, 1 to 5; with more than one the very last waits
    cf-aig-retry-delay       ms between them, up to 5,000
    cf-aig-backoff           constant, linear or exponential

Other models to turn to are `models` in the body, as OpenRouter has it, or the header
cf-aig-fallback-models, with commas between. Pure but for its clock; knows no API.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast, get_args

import anyio

from edge.checks import BadField, Fields, shown
from routing.errors import Code, Failure

TIMEOUT, ATTEMPTS = "cf-aig-request-timeout", "cf-aig-max-attempts"
DELAY, BACKOFF = "cf-aig-retry-delay", "cf-aig-backoff"
MODELS = "cf-aig-fallback-models"
MOST_ATTEMPTS, MOST_DELAY_MS, MOST_TIMEOUT_MS = 5, 5000, 3_600_000
MOST_MODELS = 8
_MOST_CHARS = 128  # of a model's name

Backoff = Literal["constant", "linear", "exponential"]

# What asking the same model again may mend.
_PASSES = {
    Code.TIMEOUT,
    Code.NO_CAPACITY,
    Code.UNAVAILABLE,
    Code.LOST,
    Code.DRAINING,
    Code.STALE_TOKENIZER,
    Code.INCOMPATIBLE,
    Code.INTERNAL,
}
# And what another model may: it may be there, and have a longer context.
_ANOTHER = _PASSES | {Code.UNKNOWN_MODEL, Code.BAD_INPUT}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    models: tuple[str, ...]  # in the order in which they are tried; the first was asked for
    attempts: int = 1
    delay_s: float = 0.0
    backoff: Backoff = "constant"
    first_s: float | None = None  # to the first part of an answer

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to tell about who answered."""
        return len(self.models) == 1 and self.attempts == 1

    def tries(self) -> Iterator[Try]:
        """Every try, in order."""
        for step, model in enumerate(self.models):
            for number in range(self.attempts):
                last = number == self.attempts - 1
                last_of_all = last and step == len(self.models) - 1
                waits = last_of_all and self.attempts > 1
                yield Try(
                    step=step,
                    model=model,
                    delay_s=self._delay_s(number),
                    first_s=None if waits else self.first_s,
                )

    def _delay_s(self, number: int) -> float:
        """Before the try of that number of one model: none before its first."""
        if not number:
            return 0.0
        match self.backoff:
            case "linear":
                return self.delay_s * number
            case "exponential":
                return self.delay_s * float(2 ** (number - 1))
        return self.delay_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    step: int  # of the model, from 0
    model: str
    delay_s: float
    first_s: float | None

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Which model answered."""
        return [(b"cf-aig-step", str(self.step).encode()), (b"cf-aig-model", self.model.encode())]


def plan_of(headers: Mapping[str, str], model: str, others: tuple[str, ...] = ()) -> Plan:
    """What the headers ask for. Failure(BAD_INPUT) names the header that is wrong."""
    if not model.isprintable():  # no header could say that it was tried
        raise Failure(Code.UNKNOWN_MODEL, f"No such model {shown(model)} or task")
    named = [name.strip() for name in headers.get(MODELS, "").split(",")]
    models = tuple(dict.fromkeys([model, *others, *filter(None, named)]))
    if len(models) > MOST_MODELS or max(map(len, models)) > _MOST_CHARS or not _ascii(models[1:]):
        raise BadField("", f"{MODELS}: at most {MOST_MODELS} models, by their names")
    backoff = headers.get(BACKOFF, "constant").strip().lower()
    if backoff not in get_args(Backoff):
        raise BadField("", f"{BACKOFF}: must be one of {', '.join(get_args(Backoff))}")
    timeout_ms = _number(headers, TIMEOUT, 1, MOST_TIMEOUT_MS)
    return Plan(
        models=models,
        attempts=_number(headers, ATTEMPTS, 1, MOST_ATTEMPTS) or 1,
        delay_s=(_number(headers, DELAY, 0, MOST_DELAY_MS) or 0) / 1000,
        backoff=cast("Backoff", backoff),
        first_s=None if timeout_ms is None else timeout_ms / 1000,
    )


def models_of(fields: Fields) -> tuple[str, ...]:
    """`model`, and then what `models` names besides: at least one."""
    names = [fields.text("model")] if fields.has("model") else []
    for at, name in enumerate(fields.array("models") or ()):
        if not isinstance(name, str) or not 1 <= len(name) <= _MOST_CHARS or not _ascii((name,)):
            pointer = f"{fields.at('models')}/{at}"
            raise BadField(pointer, f"'{pointer}' must be the name of a model")
        names.append(name)
    if not names:
        fields.need("model")
    if names[0] == "":
        raise BadField("/model", "Length of '/model' must be >= 1, got 0")
    models = tuple(dict.fromkeys(name for name in names if name is not None))
    if len(models) > MOST_MODELS:
        says = f"'{fields.at('models')}' must have <= {MOST_MODELS - 1} items, got {len(names) - 1}"
        raise BadField(fields.at("models"), says)
    return models


async def carry_out(
    plan: Plan, attempt: Callable[[Try], Awaitable[None]], begun: Callable[[], bool]
) -> None:
    """Try until one goes well, or has begun to answer. Raises the Failure that says most."""
    failures: list[Failure] = []
    given_up: str | None = None  # a model that will not answer, however often it is asked
    for one in plan.tries():
        if one.model == given_up:
            continue
        if failures:
            await anyio.sleep(one.delay_s)
        try:
            return await attempt(one)
        except Failure as failure:
            if begun() or failure.code not in _ANOTHER:
                raise
            failures.append(failure)
            if failure.code not in _PASSES:
                given_up = one.model
    raise next((it for it in failures if it.code is not Code.UNKNOWN_MODEL), failures[0])


@contextmanager
def first_within(seconds: float | None) -> Generator[Callable[[], None], None, None]:
    """Failure(TIMEOUT) unless the block ends, or calls what it is given, within `seconds`."""
    with anyio.CancelScope() as scope:
        if seconds is not None:
            scope.deadline = anyio.current_time() + seconds

        def come() -> None:
            scope.deadline = math.inf

        yield come
    if scope.cancelled_caught:
        raise Failure(Code.TIMEOUT, f"no first part of an answer within {seconds:g} s")


def _ascii(names: tuple[str, ...]) -> bool:
    """Fit for a header."""
    return all(name.isascii() and name.isprintable() for name in names)


def _number(headers: Mapping[str, str], name: str, low: int, high: int) -> int | None:
    text = headers.get(name)
    if text is None:
        return None
    text = text.strip()
    if text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high:
        return int(text)
    raise BadField("", f"{name}: must be a whole number from {low} to {high}")
