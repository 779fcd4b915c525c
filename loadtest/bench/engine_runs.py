"""Runs of an engine process: what is asked of it, and how long it took. Knows no model, no table.

Prompts are random ids, decoding is greedy and has no stop ids, so every run has its length.
"""

from __future__ import annotations

import os
import random
import statistics
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter

from msgspec import Struct

from infire import request
from infire.notes import Broken, FromEngine, Hello, Refused, Results, Submit
from loadtest.bench.memory import tree, watch_memory
from origin_gpu.engine_process import EngineSocket, engine_process

FIRST_ID = 1000  # below it many tokenizers keep tokens of their own use
START_TOKENS = 16  # of the first prompt of a new engine
FILLING = 8  # requests that fill the KV together
FILLING_OUTPUT = 96  # tokens of each: more steps than all their prompts take
WARM_UP_TOKENS = 8  # of output


class Failed(Exception):
    """The engine refused a request, or broke. Says what it said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    command: tuple[str, ...]  # starts the engine, but for `--fd`
    batches: tuple[int, ...] = (1, 4, 8, 16, 32)
    prefill_tokens: tuple[int, ...] = (512, 2048)
    prompt_tokens: int = 128  # before decoding
    output_tokens: int = 128
    repeats: int = 3
    kv_tokens: int = 16384


class Decode(Struct, frozen=True, kw_only=True):
    batch: int
    rate: float  # tokens/s of all, while all of them decode; median


class PromptRun(Struct, frozen=True, kw_only=True):
    num_tokens: int
    rate: float  # tokens / time to the first output; median


class EngineFigures(Struct, frozen=True, kw_only=True):
    start_s: float  # from starting the process to its first token; median
    peak_bytes: int  # PSS of the process, from its start to full KV
    decodes: tuple[Decode, ...]
    prefills: tuple[PromptRun, ...]
    device: str
    dtype: str
    threads: int


@dataclass(frozen=True, slots=True)
class Trace:
    """When the ids of one run came. Times are seconds of one clock."""

    sent: float
    bursts: list[tuple[float, str, int]] = field(default_factory=list)  # time, request, ids
    ended: dict[str, float] = field(default_factory=dict)

    @property
    def first(self) -> float:
        return self.bursts[0][0]

    def steady_rate(self) -> float:
        """Ids a second between the last request's first id and the first request's end."""
        firsts: dict[str, float] = {}
        for at, request_id, _ in self.bursts:
            firsts.setdefault(request_id, at)
        begin, end = max(firsts.values()), min(self.ended.values())
        num_ids = sum(ids for at, _, ids in self.bursts if begin < at <= end)
        if not num_ids:
            raise Failed("no two sequences decoded at once: ask for longer outputs")
        return num_ids / (end - begin)


class Bench:
    """One engine process that has said hello, and the requests it is given."""

    def __init__(self, engine: EngineSocket, hello: Hello) -> None:
        self.hello = hello
        self._engine = engine
        self._numbers = count()
        self._random = random.Random(0)

    async def run(self, num_requests: int, num_prompt: int, num_output: int) -> Trace:
        """Requests that are handed in together, to the end of the last."""
        asked = [self._request(num_prompt, num_output) for _ in range(num_requests)]
        trace = Trace(perf_counter())
        await self._engine.send([Submit(one) for one in asked])
        while len(trace.ended) < num_requests:
            for frame in await self._engine.receive():
                _take(trace, frame, perf_counter())
        return trace

    def _request(self, num_prompt: int, num_output: int) -> request.Sequence:
        draw = self._random.randrange
        return request.Sequence(
            request_id=str(next(self._numbers)),
            model=self.hello.model,
            token_ids=[draw(FIRST_ID, self.hello.vocab_size) for _ in range(num_prompt)],
            num_prompt=num_prompt,
            sampling=request.SamplingParams(max_tokens=num_output, seed=0, temperature=0.0),
        )


async def measure_engine(plan: EnginePlan) -> EngineFigures:
    """Every figure of the plan. EngineLost or Failed when the engine does not do its part."""
    starts = [await _start_s(plan) for _ in range(plan.repeats)]
    peak_bytes = await _peak_bytes(plan)
    async with engine_process(plan.command) as engine:
        bench = Bench(engine, await _hello(engine))
        await _warm_up(bench, plan)
        decodes = [await _decode(bench, plan, batch) for batch in plan.batches]
        prefills = [await _prefill(bench, plan, tokens) for tokens in plan.prefill_tokens]
    return EngineFigures(
        start_s=statistics.median(starts),
        peak_bytes=peak_bytes,
        decodes=tuple(decodes),
        prefills=tuple(prefills),
        device=bench.hello.device,
        dtype=bench.hello.dtype,
        threads=bench.hello.threads,
    )


async def _start_s(plan: EnginePlan) -> float:
    began = perf_counter()
    async with engine_process(plan.command) as engine:
        trace = await Bench(engine, await _hello(engine)).run(1, START_TOKENS, 1)
        return trace.first - began


async def _peak_bytes(plan: EnginePlan) -> int:
    """Of an engine of its own, from its start until every token of its KV is in use."""
    before = set(tree(os.getpid()))
    async with engine_process(plan.command) as engine:
        [pid] = set(tree(os.getpid())) - before
        with watch_memory(pid) as peak:
            bench = Bench(engine, await _hello(engine))
            each = min(plan.kv_tokens // FILLING, bench.hello.max_sequence_tokens)
            await bench.run(plan.kv_tokens // each, each - FILLING_OUTPUT, FILLING_OUTPUT)
        return peak.pss_bytes


async def _warm_up(bench: Bench, plan: EnginePlan) -> None:
    for batch in plan.batches:
        await bench.run(batch, plan.prompt_tokens, WARM_UP_TOKENS)
    for num_tokens in plan.prefill_tokens:
        await bench.run(1, num_tokens, 1)


async def _decode(bench: Bench, plan: EnginePlan, batch: int) -> Decode:
    traces = [
        await bench.run(batch, plan.prompt_tokens, plan.output_tokens) for _ in range(plan.repeats)
    ]
    return Decode(batch=batch, rate=statistics.median(trace.steady_rate() for trace in traces))


async def _prefill(bench: Bench, plan: EnginePlan, num_tokens: int) -> PromptRun:
    traces = [await bench.run(1, num_tokens, 1) for _ in range(plan.repeats)]
    rate = statistics.median(num_tokens / (trace.first - trace.sent) for trace in traces)
    return PromptRun(num_tokens=num_tokens, rate=rate)


async def _hello(engine: EngineSocket) -> Hello:
    """The engine's first frame; Failed when it tells that there will be none."""
    while True:
        for frame in await engine.receive():
            if isinstance(frame, Hello):
                return frame
            _take(Trace(0.0), frame, 0.0)


def _take(trace: Trace, frame: FromEngine, now: float) -> None:
    """Write down what a frame brings. Failed when it tells of a failure."""
    match frame:
        case Broken(detail):
            raise Failed(detail)
        case Results(steps=steps, answers=answers):
            for answer in answers:
                if isinstance(answer, Refused):
                    raise Failed(f"{answer.code}: {answer.detail}")
            for step in steps:
                trace.bursts.append((now, step.request_id, len(step.ids)))
                if step.finish is not None:
                    trace.ended[step.request_id] = now
