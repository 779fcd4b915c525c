"""The walk of one request through an edge, in order, and nothing else.

An `Ask` goes in: ids, region, `Generate`, events, and pieces of the answer come out. Knows neither
HTTP nor how either API spells things.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Self

import anyio
from anyio import CapacityLimiter

from edge import upstream
from edge.ask import Ask, Piece, SamplingAsk, Text
from edge.auth import Tenant
from edge.checks import BadField
from edge.texts import Loaded, TextStore
from edge.transcript import Transcript
from edge.watch import Watch
from routing import wire
from routing.affinity import prefix_key, session_key
from routing.choose import Choice, Wanted, context_window, is_loading, rank, refusal, task
from routing.errors import Code, Failure
from routing.region import Place, Task

ENCODING_THREADS = 2  # for long prompts
MOST_WAITING = 1000  # requests for models that are being loaded; others are told to come back
LOOK_S = 0.1  # between looks whether one is there
TEMPERATURE = 0.6  # Workers AI's documented default, where the model's makers advise nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks and from where, past authentication."""

    request_id: str
    tenant: Tenant
    place: Place | None = None
    session: str | None = None  # its x-session-affinity
    priority: int = 0  # below 0: for capacity that nobody else wants


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request in token ids, and what decides where it may go."""

    model: Loaded
    request: wire.Generate
    wanted: Wanted


class Completion:
    """Bursts of pieces, `End` last. Raises Failure when no region goes on.

    Once `tell_at_once` was called, text is told where it arrives as long as that takes no waiting,
    and is then in no burst.
    """

    def __init__(
        self, answer: upstream.Answer, transcript: Transcript, first: list[wire.Event]
    ) -> None:
        self._answer = answer
        self._transcript = transcript
        self._first: list[wire.Event] | None = first  # read already
        self._tell: Callable[[str], bool] | None = None
        self._untold: list[Piece] = []  # that `_tell` did not take

    @property
    def region(self) -> str:
        """The region that speaks."""
        return self._answer.region or ""

    def __aiter__(self) -> Self:
        return self

    def tell_at_once(self, tell: Callable[[str], bool]) -> None:
        """Give text to `tell` as it comes, which must not wait and says whether it took it."""
        self._tell = tell
        self._answer.at_once = self._hear

    async def __anext__(self) -> list[Piece]:
        while not self._transcript.ended:
            if self._first is None:
                burst = await anext(self._answer)
            else:
                burst, self._first = self._first, None
            pieces, self._untold = self._untold, []
            if not self._transcript.ended:  # by what is untold
                pieces += self._transcript.read(burst)
            if pieces:
                return pieces
        raise StopAsyncIteration

    def _hear(self, tokens: wire.Tokens) -> None:
        """Tell the text of these at once, or have the reader of bursts woken to do it."""
        assert self._tell is not None
        text = self._transcript.text_of(tokens)
        if text is None:
            self._untold += self._transcript.read((tokens,))
        elif text and not self._tell(text):
            self._untold.append(Text(text=text))
        if self._untold:
            self._answer.wake()


@dataclass(slots=True)
class Tries:
    """What a walk leaves behind for log and metrics, however it ends."""

    num_prompt: int = 0
    answers: list[upstream.Answer] = field(default_factory=list)  # two when ids had to be remade

    @property
    def choices(self) -> list[Choice]:
        return [choice for answer in self.answers for choice in answer.tries]

    @property
    def failures(self) -> list[Failure]:
        return [failure for answer in self.answers for failure in answer.failures]

    @property
    def region(self) -> str | None:
        return self.answers[-1].region if self.answers else None

    @property
    def num_output(self) -> int:
        """Tokens that regions made, also those past a stop string."""
        return sum(len(answer.generated_ids) for answer in self.answers)

    @property
    def regions(self) -> list[str]:
        """All that spoke, in order."""
        return [region for answer in self.answers for region in answer.regions]

    @property
    def cached_tokens(self) -> int:
        return self.answers[-1].cached_tokens if self.answers else 0

    @property
    def heard_the_end(self) -> bool:
        """Whether the answer came to its own end: of the model, or of max_tokens."""
        return bool(self.answers) and self.answers[-1].ended


class Walk:
    def __init__(
        self,
        watch: Watch,
        texts: TextStore,
        *,
        budget_s: float,
        max_output_tokens: int,
        cold_s: float,
    ) -> None:
        self._watch = watch
        self._texts = texts
        self._budget_s = budget_s
        self._max_output_tokens = max_output_tokens
        self._encoders = CapacityLimiter(ENCODING_THREADS)
        self._cold_s = cold_s
        self._num_waiting = 0

    async def wait_settled(self) -> None:
        """Until regions are known, or have had the time to be: moments, after the edge's start."""
        await self._watch.wait_settled()

    async def wait_served(self, model: str) -> None:
        """Failure unless some region serves `model`: said before its input is looked at.

        While a region is loading it, the request waits a while; so do others, up to a number.
        """
        regions = self._watch.known()
        if context_window(regions, model) is not None:
            return
        if is_loading(regions, model) and self._num_waiting < MOST_WAITING:
            self._num_waiting += 1
            try:
                with anyio.move_on_after(self._cold_s):
                    while is_loading(self._watch.known(), model):  # noqa: ASYNC110  as reports come
                        await anyio.sleep(LOOK_S)
            finally:
                self._num_waiting -= 1
        regions = self._watch.known()
        if context_window(regions, model) is None:
            raise refusal(regions, model, self._watch.now())

    def check_task(self, model: str, wanted: Task) -> None:
        """Failure(BAD_INPUT) for a model that is for something else."""
        known = task(self._watch.known(), model)
        if known not in {None, wanted}:
            raise BadField("/model", f"'/model': {model} is for {known}, and not for {wanted}")

    @asynccontextmanager
    async def complete(
        self, ask: Ask, caller: Caller, tries: Tries
    ) -> AsyncGenerator[Completion, None]:
        """The answer to `ask`, from its first event on. Leaving the block hangs up.

        A region that has another tokenizer than it last said gets ids made anew, once.
        """
        completion = None
        num_before = len(tries.answers)
        while completion is None:
            prepared = await self._prepare(ask, caller)
            tries.num_prompt = len(prepared.request.token_ids)
            async with self._generate(prepared) as answer:
                tries.answers.append(answer)
                try:
                    first = await anext(answer)
                except Failure as failure:
                    if failure.code is not Code.STALE_TOKENIZER or (
                        len(tries.answers) > num_before + 1
                    ):
                        raise _named(failure, ask) from None
                else:
                    request = prepared.request
                    heard = prepared.model.text.read(ask, request.token_ids, request.request_id)
                    transcript = Transcript(prepared.model, ask, tries.num_prompt, heard)
                    completion = Completion(answer, transcript, first)
                    yield completion
            if completion is None:
                await self._watch.refresh()

    async def count(self, ask: Ask) -> int:
        """How many tokens its prompt has."""
        return len((await self._encode(ask, Wanted(model=ask.model)))[2])

    async def _encode(self, ask: Ask, wanted: Wanted) -> tuple[str, Loaded, tuple[int, ...]]:
        """Text becomes ids, with the tokenizer of the region that would be asked first; its digest
        goes ahead."""
        regions = self._watch.known()
        best = next(iter(rank(regions, wanted, self._watch.now())), None)
        if best is None:
            raise refusal(regions, ask.model, self._watch.now())
        digest = best.model.tokenizer_digest
        model = await self._texts.get(digest)
        return digest, model, await model.text.encode_prompt_async(ask, self._encoders)

    async def _prepare(self, ask: Ask, caller: Caller) -> Prepared:
        regions = self._watch.known()
        wanted = Wanted(model=ask.model, place=caller.place)
        window = context_window(regions, ask.model)
        if window is None:
            raise refusal(regions, ask.model, self._watch.now())
        digest, model, ids = await self._encode(ask, wanted)
        sampling = sampling_of(
            ask.sampling,
            model.defaults,
            stop_ids=model.stop_ids,
            max_tokens=_room(ask, len(ids), window, self._max_output_tokens),
        )
        account = caller.tenant.account
        affinity = (
            session_key(account, caller.session) if caller.session else prefix_key(account, ids)
        )
        return Prepared(
            model=model,
            request=wire.Generate(
                request_id=caller.request_id,
                tenant_salt=caller.tenant.salt,
                model=ask.model,
                tokenizer_digest=digest,
                token_ids=ids,
                sampling=sampling,
                grammar=model.text.grammar(ask, ids),
                affinity=affinity or b"",
                priority=caller.priority,
                reject_if_busy=ask.reject_if_busy,
                budget_s=self._budget_s,
            ),
            wanted=replace(
                wanted,
                num_tokens=len(ids) + sampling.max_tokens,
                tokenizer_digest=digest,
                affinity=affinity,
            ),
        )

    def _generate(self, prepared: Prepared) -> AbstractAsyncContextManager[upstream.Answer]:
        def choose() -> list[Choice]:
            return rank(self._watch.known(), prepared.wanted, self._watch.now())

        max_tries = len(self._watch.known()) + 1
        return upstream.generate(self._watch, choose, prepared.request, max_tries=max_tries)


_GRAMMAR = "AiError: Bad input: Error: '/grammar'"  # as engines call it


def _named(failure: Failure, ask: Ask) -> Failure:
    """Engines know no field of a client's, nor that a grammar was made here of tools."""
    if failure.code is not Code.BAD_INPUT or not failure.detail.startswith(_GRAMMAR):
        return failure
    at = "/tools" if ask.tools.forced or not ask.grammar_at else ask.grammar_at
    return BadField(at, f"'{at}'{failure.detail.removeprefix(_GRAMMAR)}")


def _room(ask: Ask, num_prompt: int, window: int, default: int) -> int:
    """How many tokens the answer may have: what was asked for, as far as the context goes."""
    if num_prompt >= window:
        says = f"prompt of {num_prompt} tokens exceeds the context window of {window} tokens"
        if num_prompt == window:
            says = f"prompt of {num_prompt} tokens fills the context window of {window} tokens"
        raise Failure(Code.BAD_INPUT, f"AiError: Bad input: Error: {says}")
    asked = default if ask.sampling.max_tokens is None else ask.sampling.max_tokens
    return min(asked, window - num_prompt)


def sampling_of(
    ask: SamplingAsk, defaults: Mapping[str, float], *, stop_ids: tuple[int, ...], max_tokens: int
) -> wire.Sampling:
    """What the client said, else what the model's makers advise, else what changes nothing.

    Nothing but the temperature, that is: 1 makes small models ramble.
    """

    def said(name: str, neutral: float) -> float:
        value = getattr(ask, name)
        return float(defaults.get(name, neutral) if value is None else value)

    return wire.Sampling(
        max_tokens=max_tokens,
        # Engines take 63 bits; OpenAI's API allows negative seeds.
        seed=(secrets.randbits(63) if ask.seed is None else ask.seed) % 2**63,
        temperature=said("temperature", TEMPERATURE),
        top_p=min(1.0, said("top_p", 1.0)),  # natively up to 2 is allowed, and means all
        top_k=int(said("top_k", 0)),
        min_p=said("min_p", 0.0),
        repetition_penalty=said("repetition_penalty", 1.0),
        frequency_penalty=said("frequency_penalty", 0.0),
        presence_penalty=said("presence_penalty", 0.0),
        logit_bias=ask.logit_bias,
        logprobs=ask.logprobs,
        stop_ids=() if ask.ignore_eos else stop_ids,
        speculate=ask.speculate,
    )
