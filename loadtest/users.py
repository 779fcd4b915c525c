"""Locust users that speak the native streaming API and time every piece of text.

Locust's own OpenAI user reads no stream. Each request becomes rows of locust's statistics (POST,
TTFT, ITL, tokens/s, served) and one line in the file of samples, from which the report is made.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from geventhttpclient import HTTPClient
from geventhttpclient._parser import HTTPParseError
from geventhttpclient.response import HTTPSocketPoolResponse
from locust import User, between, task
from locust.env import Environment

from loadtest.places import EUROPE, NORTH_AMERICA, city
from loadtest.prompts import prompts
from loadtest.samples import Reading, Refused, Sample, write_line

TIMEOUT_S = 120.0  # without a byte
NAME = "run, streamed"


class StreamUser(User):
    """Asks, reads to the end, thinks for a moment, asks again."""

    abstract = True
    continent: str
    wait_time = between(0.5, 1.5)
    numbers = itertools.count()

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        seed = next(self.numbers)
        options = environment.parsed_options
        assert options is not None  # made by the command line, of which locustfile.py is part
        assert environment.host is not None  # by --host
        self._samples = Path(options.samples)
        self._path = f"/client/v4/accounts/{options.account}/ai/run/{options.model}"
        self._max_tokens = options.max_tokens
        self._prompts = prompts(seed)
        self._headers = {
            "authorization": f"Bearer {options.token}",
            "content-type": "application/json",
            **city(self.continent, seed).headers,
        }
        self._client = HTTPClient.from_url(
            environment.host, network_timeout=TIMEOUT_S, connection_timeout=TIMEOUT_S
        )

    def on_stop(self) -> None:
        self._client.close()

    @task
    def ask(self) -> None:
        sample = self._measure(next(self._prompts))
        with self._samples.open("ab") as file:
            file.write(write_line(sample))
        fire(self.environment, sample)

    def _measure(self, prompt: str) -> Sample:
        messages = [{"role": "user", "content": prompt}]
        asked = {"messages": messages, "max_tokens": self._max_tokens, "stream": True}
        reading = Reading(time.monotonic)
        region, error = "", None
        sent = time.monotonic()
        try:
            answer = self._client.post(self._path, msgspec.json.encode(asked), self._headers)
            with answer:
                region = str(answer.get("x-served-by", ""))
                if answer.status_code != 200:
                    raise Refused(f"HTTP {answer.status_code}: {answer.read().decode()[:200]}")
                reading.read(lines_of(answer))
        except (OSError, HTTPParseError, msgspec.DecodeError, Refused) as exc:
            error = str(exc) if isinstance(exc, Refused) else f"{type(exc).__name__}: {exc}"
        return Sample(
            client=self.continent,
            region=region,
            sent=sent,
            ended=time.monotonic(),
            texts=tuple(reading.texts),
            completion_tokens=reading.completion_tokens,
            error=error,
        )


class EuropeanUser(StreamUser):
    continent = EUROPE
    weight = 1


class NorthAmericanUser(StreamUser):
    continent = NORTH_AMERICA
    weight = 1


def lines_of(answer: HTTPSocketPoolResponse) -> Iterator[bytes]:
    """Each line as soon as it is here; ends where the body does, cut short or not."""
    while line := answer.readline(b"\n"):
        yield line


def fire(environment: Environment, sample: Sample) -> None:
    """Rows of locust's statistics. Its "response time" is ms, but for tokens/s, which is a rate."""

    def row(kind: str, name: str, value: float, length: int = 0) -> None:
        environment.events.request.fire(  # type: ignore[no-untyped-call]
            request_type=kind,
            name=name,
            response_time=value,
            response_length=length,
            exception=Refused(sample.error) if kind == "POST" and sample.error else None,
            context={},
        )

    row("POST", NAME, 1000 * (sample.ended - sample.sent), sample.completion_tokens)
    row("served", f"{sample.client} by {sample.region or 'none'}", 0.0)
    if sample.error is None:
        if sample.ttft_s is not None:
            row("TTFT", sample.client, 1000 * sample.ttft_s)
        for gap in sample.gaps_s:
            row("ITL", sample.client, 1000 * gap)
        if sample.tokens_per_s is not None:
            row("tokens/s", sample.client, sample.tokens_per_s)
