"""The walk of texts that are to become vectors: ids, region, vectors. As `complete` for text.

Knows neither HTTP nor how either API spells things.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from anyio import CapacityLimiter

from edge import upstream
from edge.checks import BadField
from edge.complete import ENCODING_THREADS, Caller, Tries
from edge.embeddings import EmbedAsk
from edge.texts import TextStore
from edge.tokenizer import ModelText
from edge.watch import Watch
from routing import wire
from routing.choose import Choice, Wanted, context_window, rank, refusal
from routing.errors import Code, Failure


class EmbedWalk:
    def __init__(self, watch: Watch, texts: TextStore, *, budget_s: float) -> None:
        self._watch = watch
        self._texts = texts
        self._budget_s = budget_s
        self._encoders = CapacityLimiter(ENCODING_THREADS)

    async def embed(self, ask: EmbedAsk, caller: Caller, tries: Tries) -> tuple[wire.Embedded, str]:
        """The vectors of `ask`, and the region that made them. Raises Failure.

        A region that has another tokenizer than it last said gets ids made anew, once.
        """
        try:
            return await self._once(ask, caller, tries)
        except Failure as failure:
            if failure.code is not Code.STALE_TOKENIZER:
                raise
        await self._watch.refresh()
        return await self._once(ask, caller, tries)

    async def _once(self, ask: EmbedAsk, caller: Caller, tries: Tries) -> tuple[wire.Embedded, str]:
        request, wanted = await self._prepare(ask, caller)
        tries.num_prompt = request.num_prompt

        def choose() -> list[Choice]:
            return rank(self._watch.known(), wanted, self._watch.now())

        max_tries = len(self._watch.known()) + 1
        async with upstream.generate(self._watch, choose, request, max_tries=max_tries) as answer:
            tries.answers.append(answer)
            async for burst in answer:
                for event in burst:
                    if isinstance(event, wire.Embedded):
                        return event, answer.region or ""
        raise Failure(Code.INTERNAL, "a region answered texts with something else than vectors")

    async def _prepare(self, ask: EmbedAsk, caller: Caller) -> tuple[wire.Embed, Wanted]:
        regions, now = self._watch.known(), self._watch.now()
        wanted = Wanted(model=ask.model, place=caller.place)
        best = next(iter(rank(regions, wanted, now)), None)
        window = context_window(regions, ask.model)
        if best is None or window is None:
            raise refusal(regions, ask.model, now)
        digest = best.model.tokenizer_digest
        text = (await self._texts.get(digest)).text
        texts = await self._ids(ask, text)
        _check_lengths(ask, texts, window)
        longest = max(map(len, texts))
        request = wire.Embed(
            request_id=caller.request_id,
            tenant_salt=caller.tenant.salt,
            model=ask.model,
            tokenizer_digest=digest,
            texts=texts,
            pooling=ask.pooling,
            priority=caller.priority,
            reject_if_busy=ask.reject_if_busy,
            budget_s=self._budget_s,
        )
        return request, replace(wanted, num_tokens=longest, tokenizer_digest=digest)

    async def _ids(self, ask: EmbedAsk, text: ModelText) -> tuple[tuple[int, ...], ...]:
        if not ask.token_ids:
            return await text.encode_texts_async(ask.texts, self._encoders)
        largest = max(map(max, ask.token_ids))
        if largest >= text.num_ids:
            at = f"/{ask.field}"
            raise BadField(at, f"'{at}': {largest} is no token: the model has {text.num_ids}")
        return ask.token_ids


def _check_lengths(ask: EmbedAsk, texts: Sequence[Sequence[int]], window: int) -> None:
    """Nothing is cut off in silence: a text that is too long is refused, and named."""
    for n, ids in enumerate(texts):
        if len(ids) > window:
            at = ask.pointer(n)
            says = f"'{at}': {len(ids)} tokens exceed the {window} that a text may have"
            raise BadField(at, says)
