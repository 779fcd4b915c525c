"""A region whose model says what it is told to, whatever it is asked.

On the tokenizer of `model_folder.py`, one id a byte, with more special tokens where a family has
marks of its own: these are one id each, as real models say them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import anyio
from tokenizers import AddedToken

from routing import wire
from routing.errors import Code, Failure
from routing.link_server import Stream
from tests.fakes.counting_region import CountingRegion
from tests.fakes.model_folder import END_ID, counting_tokenizer


def assets_with(template: str, special: Sequence[str] = ()) -> wire.TextAssets:
    """The counting tokenizer with another template, and these special tokens from 259 on."""
    tokenizer = counting_tokenizer()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    return wire.TextAssets(
        tokenizer_json=tokenizer.to_str().encode(), chat_template=template, stop_ids=(END_ID,)
    )


def ids_of(text: str, special: Sequence[str] = ()) -> tuple[int, ...]:
    """As a model of these tokens would say it."""
    marks = {name: 259 + at for at, name in enumerate(special)}
    parts = re.split("(" + ("|".join(map(re.escape, marks)) or "(?!)") + ")", text)
    ids: list[int] = []
    for part in parts:
        ids += [marks[part]] if part in marks else part.encode()
    return tuple(ids)


@dataclass(eq=False)
class SayingRegion(CountingRegion):
    says: tuple[int, ...] = ()
    breaks_at: int | None = None  # after so many tokens it breaks off, the first time

    async def _count(self, stream: Stream[Any, wire.Event], request: wire.Generate) -> None:
        stream.send(wire.Started(0))
        ids, most = self.says, request.sampling.max_tokens
        at = len(request.generated_ids)
        while at < min(len(ids), most):
            if at == self.breaks_at:
                self.breaks_at = None
                raise Failure(Code.UNAVAILABLE, "broken off, as it was told to")
            upto = min(at + self.burst, len(ids), most)
            stream.send(wire.Tokens(ids[at:upto], self._logprobs_of(request, ids[at:upto])))
            at = upto
            await anyio.lowlevel.checkpoint()
        used = wire.Usage(prompt_tokens=len(request.token_ids), completion_tokens=at)
        stream.send(wire.Finish("length" if at == most < len(ids) else "stop", used))

    def _logprobs_of(self, request: wire.Generate, ids: Sequence[int]) -> tuple[wire.Logprob, ...]:
        if request.sampling.logprobs is None:
            return ()
        return tuple(wire.Logprob(one, -0.5) for one in ids)
