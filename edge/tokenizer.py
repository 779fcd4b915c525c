"""Where text ends and ids begin, and back again, for one model. Knows no network and no region."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from anyio import CapacityLimiter, to_thread
from tokenizers import Tokenizer

from edge.ask import Ask
from edge.special import SpecialTokens, strings
from edge.spelling import Spelling, TextStream, vocabulary
from edge.template import ChatTemplate, utc_now
from routing.errors import Code, Failure
from routing.wire import TextAssets

_INLINE_CHARS = 2000  # about 2 ms to encode; a longer text would hold up every other stream


class ModelText:
    """How one model reads and writes text. Shared by all requests; keeps nothing of them."""

    def __init__(self, assets: TextAssets) -> None:
        spec = msgspec.json.decode(assets.tokenizer_json)
        self._special = SpecialTokens(spec)
        self._spelling = Spelling(spec, hidden=self._special.ids | set(assets.stop_ids))
        self._tokenizer = _tokenizer(spec, self._special)
        self._template = (
            ChatTemplate(assets.chat_template, assets.special_tokens, utc_now)
            if assets.chat_template
            else None
        )
        self.num_ids = 1 + max(vocabulary(spec).values())

    def encode_prompt(self, ask: Ask) -> tuple[int, ...]:
        """What the model is to read; Failure(BAD_INPUT) when the template or the ids refuse it."""
        self._check_biases(ask)
        if ask.token_ids is not None:
            return self._checked(ask.token_ids)
        if ask.messages is None and (ask.raw or self._template is None):
            ids = self._encode(ask.prompt or "", begin=True)
        else:
            ids = self._encode(self._rendered(ask), begin=False)
        if not ids:
            raise _bad_input("the prompt holds no tokens")
        return ids

    async def encode_prompt_async(self, ask: Ask, limiter: CapacityLimiter) -> tuple[int, ...]:
        """The same; a long text is encoded in a thread, at most as many at once as `limiter`."""
        if sum(map(len, strings((ask.prompt, ask.messages)))) <= _INLINE_CHARS:
            return self.encode_prompt(ask)
        return await to_thread.run_sync(self.encode_prompt, ask, limiter=limiter)

    def stream(self) -> TextStream:
        """A new answer's text."""
        return TextStream(self._spelling)

    def token_text(self, token_id: int) -> str:
        """One token by itself: see Spelling.text."""
        return self._spelling.text(token_id)

    def _rendered(self, ask: Ask) -> str:
        """The conversation as the template puts it; a prompt alone is one message of a user."""
        if self._template is None:
            raise _bad_input("this model has no chat template: give '/prompt'")
        turns = ask.messages or ({"role": "user", "content": ask.prompt},)
        turns, mark = self._special.mark(turns)
        return self._special.name(self._template.render(turns), mark)

    def _encode(self, text: str, *, begin: bool) -> tuple[int, ...]:
        """`begin`: with what the model's makers put around any text; a template does so itself."""
        # Unlike `encode`, this lets other threads run meanwhile and makes no offsets.
        return tuple(self._tokenizer.encode_batch_fast([text], add_special_tokens=begin)[0].ids)

    def _checked(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        largest = max(ids, default=0)
        if largest >= self.num_ids:
            raise _bad_input(f"'/prompt': {largest} is no token: the model has {self.num_ids}")
        if not ids:
            raise _bad_input("the prompt holds no tokens")
        return ids

    def _check_biases(self, ask: Ask) -> None:
        for token_id, _ in ask.sampling.logit_bias:
            if token_id >= self.num_ids:
                raise _bad_input(f"'/logit_bias/{token_id}': the model has {self.num_ids} tokens")


def load(assets: TextAssets) -> ModelText:
    """The text of a model; ValueError when its assets are of a kind that is not known here."""
    try:
        return ModelText(assets)
    except (LookupError, TypeError, AttributeError) as malformed:
        raise ValueError(
            f"the tokenizer file lacks what it should hold: {malformed!r}"
        ) from malformed


def _tokenizer(spec: Mapping[str, Any], special: SpecialTokens) -> Tokenizer:
    """One that knows special tokens by their secret names only."""
    try:
        tokenizer = Tokenizer.from_str(msgspec.json.encode(special.hide(spec)).decode())
    except Exception as refused:  # the library raises nothing more exact
        raise ValueError(f"the tokenizer file cannot be read: {refused}") from refused
    if any(tokenizer.token_to_id(name) != at for name, at in special.secret_ids.items()):
        raise ValueError("the tokenizer file gives special tokens ids that cannot be kept")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _bad_input(says: str) -> Failure:
    return Failure(Code.BAD_INPUT, f"AiError: Bad input: Error: {says}")
