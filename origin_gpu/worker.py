"""What every role of a worker shares: whether a request can be run, running it, and saying how
this worker is. The roles are `prefill` and `decode`; `worker_app` puts them behind a door.

Imports no torch: computing is the engine's process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from time import monotonic

import anyio
import msgspec

from infire.request import Grammar, SamplingParams, Sequence, Step
from origin_gpu.accept import check_fits, check_texts
from origin_gpu.engine_link import RETRY_AFTER_S, EngineLink
from origin_gpu.handover import Peer
from origin_gpu.kv_files import KVFiles
from origin_gpu.kv_transfer import KVDoor
from origin_gpu.settings import WorkerSettings
from origin_gpu.worker_metrics import WorkerMetrics
from routing import wire
from routing.drain import Drain
from routing.errors import Code, Failure
from routing.logs import log
from routing.region import ModelReport, ProcessReport

logger = logging.getLogger(__name__)


class Answered:
    """One request being answered: what its log line and the metrics will say."""

    def __init__(self) -> None:
        self.began = monotonic()
        self.outcome: str = Code.INTERNAL
        self.output_tokens = 0
        self.first_s: float | None = None  # from its arrival to the first token made here
        self.kv_bytes = 0  # collected for it
        self.kv_way = ""  # that they went
        self.kv_s: float | None = None  # how long that took

    @property
    def total_s(self) -> float:
        return monotonic() - self.began

    def heard(self, step: Step) -> None:
        if self.first_s is None:
            self.first_s = self.total_s
        self.output_tokens += len(step.ids)


class Worker:
    """One engine, its model, the requests it has, and the KV it offers."""

    def __init__(
        self,
        settings: WorkerSettings,
        url: str,
        assets: wire.TextAssets,
        door: KVDoor,
        kv_files: KVFiles,
        metrics: WorkerMetrics,
    ) -> None:
        self.settings = settings
        self.url = url
        self.door = door
        self.kv_files = kv_files
        self.assets = assets
        self.assets_digest = assets.digest
        self.engine = EngineLink(
            engine_command(settings), tokenizer_digest=assets.digest, stuck_s=settings.stuck_s
        )
        self.peers: Mapping[str, Peer] = {}  # the region's workers by name, as the front says
        self.in_flight = 0
        self.tokens_to_encode = 0  # of texts that are to become vectors
        self.metrics = metrics
        self.drain = Drain(settings.grace_s)

    @property
    def num_waiting(self) -> int:
        """Requests that the engine cannot compute yet.

        Its gauge lags by a step, in which many may come: what is more than it ever runs waits too.
        Texts to make vectors of count as the steps they take: one request may have a hundred.
        """
        unfinished = self.in_flight - self.door.num_held
        return max(
            self.engine.gauges.waiting,
            unfinished - self.settings.max_running,
            self.tokens_to_encode // self.settings.max_step_tokens,
        )

    @property
    def known_url(self) -> str:
        """Where this worker is, as its peers know it: bound to all addresses, it cannot know."""
        me = self.peers.get(self.settings.name)
        return me.url if me else self.url

    @asynccontextmanager
    async def answering(self, role: str, request: wire.Request) -> AsyncGenerator[Answered, None]:
        """The door of every request: checked, within its time, counted, one log line."""
        answered = Answered()
        try:
            if role != "decode":  # whose first half is done, here in the region
                self.drain.check()
            self._check(request)
            if role != "decode" and request.never_waits:
                self._check_idle()
            with self._counted(request), anyio.fail_after(request.budget_s):
                yield answered
        except TimeoutError:
            answered.outcome = Code.TIMEOUT
            detail = (
                f"{answered.output_tokens} tokens after {request.budget_s:g} s, "
                "when the time was up"
            )
            raise Failure(Code.TIMEOUT, detail) from None
        except Failure as failure:
            answered.outcome = failure.code
            raise
        except anyio.get_cancelled_exc_class():
            answered.outcome = Code.ABORTED
            raise
        finally:
            self._record(role, request, answered)

    @contextmanager
    def _counted(self, request: wire.Request) -> Generator[None, None, None]:
        to_encode = request.num_prompt if isinstance(request, wire.Embed) else 0
        self.in_flight += 1
        self.tokens_to_encode += to_encode
        try:
            yield
        finally:
            self.in_flight -= 1
            self.tokens_to_encode -= to_encode

    def sequence(self, request: wire.Generate) -> Sequence:
        """`request` for this engine, with `max_tokens` cut to what fits."""
        room = self.engine.must_be_up().max_sequence_tokens - len(request.token_ids)
        sampling = msgspec.structs.replace(
            request.sampling, max_tokens=min(request.sampling.max_tokens, room)
        )
        return to_sequence(msgspec.structs.replace(request, sampling=sampling))

    def report(self) -> ProcessReport:
        gauges, hello = self.engine.gauges, self.engine.hello
        models = (
            (
                ModelReport(
                    model=self.settings.model,
                    model_digest=hello.model_digest,
                    tokenizer_digest=self.assets_digest,
                    context_window=hello.context_window,
                    max_sequence_tokens=hello.max_sequence_tokens,
                    task=hello.task,
                ),
            )
            if hello
            else ()
        )
        return ProcessReport(
            name=self.settings.name,
            region=self.settings.region,
            role=self.settings.role,
            pid=os.getpid(),
            url=self.url,
            epoch=self.engine.epoch,
            ready=self.engine.fresh and not self.drain.begun,
            in_flight=self.in_flight,
            waiting=self.num_waiting,
            held=gauges.held,
            free_blocks=gauges.free_blocks,
            total_blocks=gauges.total_blocks,
            prompt_tokens_computed=gauges.prompt_tokens_computed,
            max_waiting=self.settings.max_waiting,
            max_running=self.settings.max_running,
            models=models,
            loading=() if hello or self.drain.begun else (self.settings.model,),
        )

    def _check(self, request: wire.Request) -> None:
        """Raise Failure for a request that this worker cannot, or will not now, run."""
        hello = self.engine.must_be_up()
        if request.model != self.settings.model:
            raise Failure(
                Code.UNAVAILABLE, f"{request.model} is not served here, {self.settings.model} is"
            )
        if request.tokenizer_digest != self.assets_digest:
            theirs, ours = request.tokenizer_digest[:12], self.assets_digest[:12]
            raise Failure(Code.STALE_TOKENIZER, f"ids of tokenizer {theirs}, here it is {ours}")
        if isinstance(request, wire.Embed):
            check_texts(request, hello)
        else:
            check_fits(request, hello)
        if self.num_waiting >= self.settings.max_waiting:
            raise Failure(
                Code.NO_CAPACITY,
                f"{self.num_waiting} requests wait already, {self.settings.max_waiting} may",
                retry_after_s=RETRY_AFTER_S,
            )

    def _check_idle(self) -> None:
        """Raise Failure unless a request that comes now can begin at once."""
        running = self.in_flight - self.door.num_held
        if self.engine.gauges.waiting or running >= self.settings.max_running:
            detail = f"{running} requests run already, {self.settings.max_running} may"
            raise Failure(Code.NO_CAPACITY, detail, retry_after_s=RETRY_AFTER_S)

    def _record(self, role: str, request: wire.Request, answered: Answered) -> None:
        total_s = answered.total_s
        self.metrics.ended(role, answered.outcome, total_s, answered.output_tokens)
        if answered.kv_s is not None:
            self.metrics.collected(answered.kv_way, answered.kv_bytes, answered.kv_s)
        log(
            logger,
            "request",
            request_id=request.request_id,
            role=role,
            prompt_tokens=request.num_prompt,
            output_tokens=answered.output_tokens,
            first_ms=_milliseconds(answered.first_s),
            kv_bytes=answered.kv_bytes,
            kv_way=answered.kv_way,
            kv_ms=_milliseconds(answered.kv_s),
            total_ms=_milliseconds(total_s),
            outcome=answered.outcome,
        )


def to_sequence(message: wire.Generate) -> Sequence:
    """The one conversion of what an edge asks into what an engine runs."""
    grammar = message.grammar
    return Sequence(
        request_id=message.request_id,
        model=message.model,
        token_ids=[*message.token_ids, *message.generated_ids],
        num_prompt=len(message.token_ids),
        sampling=SamplingParams(**msgspec.structs.asdict(message.sampling)),
        cache_salt=message.tenant_salt,
        grammar=Grammar(grammar.kind, grammar.source) if grammar else None,
        adapter=message.adapter,
        priority=message.priority,
    )


def to_tokens(step: Step) -> wire.Tokens:
    return wire.Tokens(
        step.ids, tuple(wire.Logprob(it.token_id, it.logprob, it.top) for it in step.logprobs)
    )


def to_usage(message: wire.Generate, num_output: int, cached_tokens: int = 0) -> wire.Usage:
    """What a request used, ids that came with a resume included."""
    return wire.Usage(
        prompt_tokens=len(message.token_ids),
        completion_tokens=num_output,
        cached_tokens=cached_tokens,
    )


def engine_command(settings: WorkerSettings) -> list[str]:
    """What starts the engine, but for its socket."""
    flags = {
        "--model": settings.model,
        "--model-dir": settings.model_dir,
        "--device": settings.device,
        "--dtype": settings.dtype,
        "--kv-tokens": settings.kv_tokens,
        "--block-tokens": settings.block_tokens,
        "--max-step-tokens": settings.max_step_tokens,
        "--max-running": settings.max_running,
        "--threads": settings.threads,
    }
    words = [*settings.engine_command, *(str(it) for pair in flags.items() for it in pair)]
    if not settings.prefix_cache:
        words.append("--no-prefix-cache")
    if settings.host_cache_bytes:
        words += ["--host-cache-bytes", str(settings.host_cache_bytes)]
    if settings.disk_cache_dir is not None:
        words += ["--disk-cache-dir", str(settings.disk_cache_dir)]
        words += ["--disk-cache-bytes", str(settings.disk_cache_bytes)]
    return words


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 1)
