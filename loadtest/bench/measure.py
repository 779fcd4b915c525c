"""What one server does at each number of streams, and with long prompts. Knows no one's name."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter, process_time

import anyio
from msgspec import Struct

from loadtest.bench.client import Client
from loadtest.bench.streams import Answered, BrokenStream
from loadtest.bench.words import prompt
from loadtest.report import percentile

SINGLE_REQUESTS = 3  # one after the other, where one stream is measured: else it is over too soon
_PROBE_WORDS = 64
_SEED_STRIDE = 1_000_000  # prompts that one measurement may ask
_WARM_UP_TOKENS = 8
_WARM_UP = -1  # the measurement whose prompts warming up asks


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to ask of a server. Lengths are tokens as the server counts them."""

    concurrency: tuple[int, ...] = (1, 4, 8, 16, 32)  # streams at once, ascending
    prompt_tokens: int = 128
    output_tokens: int = 128
    waves: int = 1  # how often each stream asks anew at each level
    prefill_tokens: tuple[int, ...] = (512, 2048)
    prefill_requests: int = 3  # of each length, one after the other


class Level(Struct, frozen=True, kw_only=True):
    """So many streams at once."""

    concurrency: int
    requests: int
    num_short: int  # answers with fewer tokens than were asked for
    ttft_p50_ms: float
    ttft_p99_ms: float
    gap_p50_ms: float  # between two pieces of text of one stream
    gap_p99_ms: float
    decode_rate: float  # median over streams: tokens/s of one stream after its first token
    output_rate: float  # tokens/s of all streams, from the first request to the last answer's end
    client_share: float  # of one core, taken by the measuring itself


class Prefill(Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    rate: float  # prompt tokens / time to first token, median
    requests: int


class Served(Struct, frozen=True, kw_only=True):
    """One server's figures of one measurement."""

    levels: tuple[Level, ...]
    prefills: tuple[Prefill, ...]


class Prompts:
    """Prompts of as many tokens as asked, as one server counts them. Made by `fit`."""

    def __init__(self, overhead: int, seeds: Iterator[int]) -> None:
        self._overhead = overhead  # tokens that the chat template adds
        self._seeds = seeds

    def take(self, num_tokens: int) -> str:
        return prompt(next(self._seeds), max(1, num_tokens - self._overhead))


async def fit(client: Client, seed: int) -> Prompts:
    """Prompts for this server, other ones for every `seed` from 0.

    Its count of a first prompt shows what its chat template adds.
    """
    seeds = itertools.count(_SEED_STRIDE * (seed + 1))
    probe = await client.ask(prompt(next(seeds), _PROBE_WORDS), 1)
    return Prompts(probe.prompt_tokens - _PROBE_WORDS, seeds)


async def measure(client: Client, plan: Plan, seed: int) -> Served:
    """Every level and every prompt length of the plan. BrokenStream when an answer fails."""
    prompts = await fit(client, seed)
    levels = [await level(client, plan, count, prompts) for count in plan.concurrency]
    prefills = [await prefill(client, plan, count, prompts) for count in plan.prefill_tokens]
    return Served(levels=tuple(levels), prefills=tuple(prefills))


async def warm_up(client: Client, plan: Plan) -> None:
    """Every shape of the plan once, for servers that prepare a shape when they first see it."""
    prompts = await fit(client, _WARM_UP)
    for count in plan.concurrency:
        rows = [[prompts.take(plan.prompt_tokens)] for _ in range(count)]
        await _streams(client, rows, _WARM_UP_TOKENS)
    for count in plan.prefill_tokens:
        await client.ask(prompts.take(count), 1)


async def level(client: Client, plan: Plan, concurrency: int, prompts: Prompts) -> Level:
    """`concurrency` streams that all begin together; each asks `waves` times, without a pause."""
    waves = plan.waves if concurrency > 1 else max(plan.waves, SINGLE_REQUESTS)
    asked = [[prompts.take(plan.prompt_tokens) for _ in range(waves)] for _ in range(concurrency)]
    began, worked = perf_counter(), process_time()
    answers = await _streams(client, asked, plan.output_tokens)
    share = (process_time() - worked) / (perf_counter() - began)
    return summarise(answers, concurrency, plan.output_tokens, share)


async def prefill(client: Client, plan: Plan, num_tokens: int, prompts: Prompts) -> Prefill:
    """Prompts of `num_tokens` one after the other, with one token of output."""
    answers = [await client.ask(prompts.take(num_tokens), 1) for _ in range(plan.prefill_requests)]
    return Prefill(
        prompt_tokens=num_tokens,
        rate=statistics.median(answer.prompt_tokens / answer.ttft_s for answer in answers),
        requests=len(answers),
    )


def summarise(
    answers: Sequence[Answered], concurrency: int, output_tokens: int, client_share: float
) -> Level:
    """The figures of one level, from its answers."""
    ttft_ms = sorted(1000 * answer.ttft_s for answer in answers)
    gaps_ms = sorted(1000 * gap for answer in answers for gap in answer.gaps_s)
    rates = [rate for answer in answers if (rate := answer.decode_rate) is not None]
    took_s = max(answer.ended for answer in answers) - min(answer.sent for answer in answers)
    return Level(
        concurrency=concurrency,
        requests=len(answers),
        num_short=sum(answer.completion_tokens < output_tokens for answer in answers),
        ttft_p50_ms=percentile(ttft_ms, 0.5),
        ttft_p99_ms=percentile(ttft_ms, 0.99),
        gap_p50_ms=percentile(gaps_ms, 0.5),
        gap_p99_ms=percentile(gaps_ms, 0.99),
        decode_rate=statistics.median(rates) if rates else 0.0,
        output_rate=sum(answer.completion_tokens for answer in answers) / took_s,
        client_share=client_share,
    )


async def _streams(
    client: Client, asked: Sequence[Sequence[str]], max_tokens: int
) -> list[Answered]:
    """Every row of prompts one after the other, all rows at once."""
    answers: list[Answered] = []
    failures: list[BrokenStream] = []

    async def stream(prompts: Sequence[str]) -> None:
        try:
            answers.extend([await client.ask(one, max_tokens) for one in prompts])
        except BrokenStream as exc:
            failures.append(exc)
            tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        for prompts in asked:
            tasks.start_soon(stream, prompts)
    if failures:
        raise failures[0]
    return answers
