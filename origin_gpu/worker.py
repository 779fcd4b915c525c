"""What every role of a worker shares: whether a request can be run, running it, and saying how
this worker is. The roles are `prefill` and `decode`; `worker_app` puts them behind a door.

Imports no torch: computing is the engine's process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import msgspec

from infire.notes import Adopted, Hello
from infire.request import Grammar, SamplingParams, Sequence, Step
from origin_gpu.engine_link import EngineLink
from origin_gpu.models import read_assets
from origin_gpu.settings import WorkerSettings
from origin_gpu.worker_metrics import WorkerMetrics
from routing import wire
from routing.errors import Code, Failure
from routing.logs import log
from routing.region import ModelReport, ProcessReport

logger = logging.getLogger(__name__)

BUSY_RETRY_S = 1.0


class Answered:
    """One request being answered: what its log line will say."""

    def __init__(self) -> None:
        self.outcome = "cancelled"
        self.output_tokens = 0


class Worker:
    """One engine, its model, and the requests it has."""

    def __init__(
        self,
        settings: WorkerSettings,
        secret: str,
        url: str,
        kv_files: Path,
        metrics: WorkerMetrics,
    ) -> None:
        """Reads the model's text assets: FolderError when they are not what they must be."""
        self.settings = settings
        self.secret = secret
        self.url = url
        self.kv_files = kv_files
        self.assets = read_assets(settings.model_dir)
        self.assets_digest = self.assets.digest
        self.engine = EngineLink(engine_command(settings))
        self.in_flight = 0
        self._metrics = metrics

    @asynccontextmanager
    async def answering(self, role: str, request: wire.Generate) -> AsyncGenerator[Answered, None]:
        """The door of every request: checked, within its time, counted, one log line."""
        began = anyio.current_time()
        answered = Answered()
        self.in_flight += 1
        try:
            self._check(request)
            with anyio.fail_after(request.budget_s):
                yield answered
        except TimeoutError:
            answered.outcome = Code.TIMEOUT
            raise Failure(Code.TIMEOUT, f"not done within {request.budget_s:.1f} s") from None
        except Failure as failure:
            answered.outcome = failure.code
            raise
        finally:
            self.in_flight -= 1
            seconds = anyio.current_time() - began
            self._metrics.ended(role, answered.outcome, seconds, answered.output_tokens)
            log(
                logger,
                "request",
                request_id=request.request_id,
                role=role,
                prompt_tokens=len(request.token_ids),
                output_tokens=answered.output_tokens,
                total_ms=round(1000 * seconds, 1),
                outcome=answered.outcome,
            )

    async def run_sequence(
        self,
        sequence: Sequence,
        on_step: Callable[[Step], None],
        *,
        kv_path: Path | None = None,
        num_adopted: int = 0,
    ) -> Step:
        """The last step of `sequence`; `on_step` gets every one as it comes. Raises Failure.

        The file at `kv_path` is deleted as soon as it has been read. Being cancelled drops the
        sequence. One that is to be held stays so from its end until it is dropped.
        """
        ended = anyio.Event()
        end: list[Step | Failure] = []

        def hear(word: Step | Adopted | Failure) -> None:
            if isinstance(word, Adopted):
                if kv_path is not None:
                    kv_path.unlink(missing_ok=True)
                return
            if isinstance(word, Step):
                on_step(word)
                if word.finish is None:
                    return
            end.append(word)
            ended.set()

        self.engine.submit(sequence, hear, str(kv_path) if kv_path else None, num_adopted)
        try:
            await ended.wait()
        finally:
            if not end:
                self.engine.drop(sequence.request_id)
        if isinstance(end[0], Failure):
            raise end[0]
        return end[0]

    def sequence(self, request: wire.Generate, *, hold: bool = False) -> Sequence:
        """`request` for this engine, under an id of its own, with `max_tokens` cut to what fits."""
        hello = self.engine.hello
        if hello is None:
            raise _not_up()
        room = hello.max_sequence_tokens - len(request.token_ids)
        sampling = msgspec.structs.replace(
            request.sampling, max_tokens=min(request.sampling.max_tokens, room)
        )
        fitted = msgspec.structs.replace(
            request, sampling=sampling, request_id=self.engine.new_id(request.request_id)
        )
        return to_sequence(fitted, hold=hold)

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
            ready=self.engine.fresh,
            in_flight=self.in_flight,
            waiting=gauges.waiting,
            held=gauges.held,
            free_blocks=gauges.free_blocks,
            total_blocks=gauges.total_blocks,
            prompt_tokens_computed=gauges.prompt_tokens_computed,
            max_waiting=self.settings.max_waiting,
            models=models,
        )

    def _check(self, request: wire.Generate) -> None:
        """Raise Failure for a request that this worker cannot, or will not now, run."""
        hello = self.engine.hello
        if hello is None:
            raise _not_up()
        if request.model != self.settings.model:
            raise Failure(Code.UNAVAILABLE, f"{request.model} asked of {self.settings.model}")
        if request.tokenizer_digest != self.assets_digest:
            theirs, ours = request.tokenizer_digest[:12], self.assets_digest[:12]
            raise Failure(Code.STALE_TOKENIZER, f"ids of tokenizer {theirs}, here it is {ours}")
        if self.in_flight > self.settings.max_running + self.settings.max_waiting:
            raise Failure(
                Code.NO_CAPACITY,
                f"{self.settings.max_waiting} requests wait already",
                retry_after_s=BUSY_RETRY_S,
            )
        _check_fits(request, hello)


def to_sequence(message: wire.Generate, *, hold: bool = False) -> Sequence:
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
        hold=hold,
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
    return [*settings.engine_command, *(str(it) for pair in flags.items() for it in pair)]


def _not_up() -> Failure:
    return Failure(Code.UNAVAILABLE, "the engine is not up", retry_after_s=BUSY_RETRY_S)


def _check_fits(request: wire.Generate, hello: Hello) -> None:
    """Refuse what the engine would refuse, before it takes a place in its queue."""
    num_known = len(request.token_ids) + len(request.generated_ids)
    if not request.token_ids:
        raise Failure(Code.BAD_INPUT, "prompt: it has no tokens")
    if num_known >= hello.max_sequence_tokens:
        raise Failure(
            Code.BAD_INPUT,
            f"prompt of {num_known} tokens leaves no room for an answer "
            f"in the {hello.max_sequence_tokens} that one request may have",
        )
    if len(request.generated_ids) >= request.sampling.max_tokens:
        raise Failure(Code.BAD_INPUT, f"max_tokens: {request.sampling.max_tokens} are there")
    for field, ids in (
        ("prompt", (*request.token_ids, *request.generated_ids)),
        ("logit_bias", tuple(token_id for token_id, _ in request.sampling.logit_bias)),
        ("stop_ids", request.sampling.stop_ids),
    ):
        if ids and not 0 <= min(ids) <= max(ids) < hello.vocab_size:
            raise Failure(
                Code.BAD_INPUT,
                f"{field}: ids {min(ids)} to {max(ids)} in a vocabulary of {hello.vocab_size}",
            )
    if request.adapter is not None:
        raise Failure(Code.BAD_INPUT, f"lora: {request.model} has no adapters")
    if request.grammar is not None:
        raise Failure(Code.BAD_INPUT, "response_format: this deployment offers none yet")
