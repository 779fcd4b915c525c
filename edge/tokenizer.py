"""Where text ends and ids begin, and back again, for one model. Knows no network and no region."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from anyio import CapacityLimiter, to_thread
from tokenizers import Tokenizer

from edge.ask import Ask
from edge.reader import Reader
from edge.special import SpecialTokens
from edge.speech import NUM_TAIL, Speech
from edge.spelling import Spelling, TextStream, vocabulary
from edge.template import ChatTemplate, utc_now
from edge.tool_families import HIDDEN
from edge.tool_prompt import as_openai
from routing.errors import Code, Failure
from routing.wire import Grammar, TextAssets

_INLINE_CHARS = 2000  # about 2 ms to encode; a longer text would hold up every other stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """How an answer is read that may be more than text: ids into text, text into pieces."""

    stream: TextStream
    reader: Reader


class ModelText:
    """How one model reads and writes text. Shared by all requests; keeps nothing of them."""

    def __init__(self, assets: TextAssets) -> None:
        spec = msgspec.json.decode(assets.tokenizer_json)
        self._special = SpecialTokens(spec)
        hidden = self._special.ids | set(assets.stop_ids)
        self._spelling = None if _only_reads(spec) else Spelling(spec, hidden=hidden)
        self._tokenizer = _tokenizer(spec, self._special)
        self._template = (
            ChatTemplate(assets.chat_template, assets.special_tokens, utc_now)
            if assets.chat_template
            else None
        )
        self.num_ids = 1 + max(vocabulary(spec).values())
        added = {one["content"]: one["id"] for one in spec["added_tokens"]}
        self._speech = (
            Speech(self._template, assets.chat_template, added, self._special.ids)
            if self._template
            else None
        )
        self._showing: dict[frozenset[int], Spelling] = {}  # by the special tokens that it shows

    def encode_prompt(self, ask: Ask) -> tuple[int, ...]:
        """What the model is to read; Failure(BAD_INPUT) when the template or the ids refuse it."""
        self._check_biases(ask)
        if ask.token_ids is not None:
            return self._checked(ask.token_ids)
        if self._is_raw(ask):
            ids = self._encode(ask.prompt or "", begin=True)
        else:
            ids = self._encode(self._rendered(ask), begin=False)
        if not ids:
            raise _bad_input("the prompt holds no tokens")
        return ids

    async def encode_prompt_async(self, ask: Ask, limiter: CapacityLimiter) -> tuple[int, ...]:
        """The same; a long text is encoded in a thread, at most as many at once as `limiter`."""
        given = (ask.prompt, ask.messages, as_openai(ask.tools.offered), ask.template_args)
        if not _is_longer(given, _INLINE_CHARS):
            return self.encode_prompt(ask)
        return await to_thread.run_sync(self.encode_prompt, ask, limiter=limiter)

    def stream(self, ask: Ask | None = None) -> TextStream:
        """A new answer's text. One that goes on with a prompt as it is begins no text."""
        goes_on = ask is not None and self._is_raw(ask)
        return TextStream(self._writing, begun=goes_on)

    def read(self, ask: Ask, ids: Sequence[int], request_id: str) -> Heard | None:
        """What reads the answer to the prompt of these ids; None: all of it is text."""
        if self._speech is None:
            return None
        reader = self._speech.reader(ask, request_id, self._tail(ids))
        if reader is None:
            return None
        return Heard(stream=TextStream(self._shown(self._speech.spelled(ask))), reader=reader)

    def grammar(self, ask: Ask, ids: Sequence[int]) -> Grammar | None:
        """What the answer to the prompt of these ids must match."""
        return ask.grammar if self._speech is None else self._speech.grammar(ask, self._tail(ids))

    def token_text(self, token_id: int) -> str:
        """One token by itself: see Spelling.text."""
        return self._writing.text(token_id)

    def encode_texts(self, texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each as a model that makes vectors reads it."""
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=True)
        return tuple(tuple(one.ids) for one in found)

    async def encode_texts_async(
        self, texts: Sequence[str], limiter: CapacityLimiter
    ) -> tuple[tuple[int, ...], ...]:
        """The same; much text is encoded in a thread, as a long prompt is."""
        if sum(map(len, texts)) <= _INLINE_CHARS:
            return self.encode_texts(texts)
        return await to_thread.run_sync(self.encode_texts, texts, limiter=limiter)

    @property
    def _writing(self) -> Spelling:
        assert self._spelling is not None, "only a model that makes text is asked for it"
        return self._spelling

    def _is_raw(self, ask: Ask) -> bool:
        """Whether its prompt is for the model as it is: no template has a say."""
        given = ask.token_ids is not None or ask.raw or self._template is None
        return given and ask.messages is None

    def _rendered(self, ask: Ask) -> str:
        """The conversation as the template puts it; a prompt alone is one message of a user."""
        if self._template is None:
            raise _bad_input("this model has no chat template: give '/prompt'")
        turns = ask.messages or ({"role": "user", "content": ask.prompt},)
        assert self._speech is not None
        prepared = self._speech.prepared(turns, ask)
        (messages, tools, args), mark = self._special.mark((*prepared, dict(ask.template_args)))
        return self._special.name(self._template.render(messages, tools, args), mark)

    def _tail(self, ids: Sequence[int]) -> str:
        return "".join(map(self.token_text, ids[-NUM_TAIL:]))

    def _shown(self, names: Mapping[int, str]) -> Spelling:
        """Special tokens among what is spelled, as `edge.reader` expects them."""
        if not names:
            return self._writing
        key = frozenset(names)
        if key not in self._showing:
            hidden = {at: HIDDEN + name for at, name in names.items()}
            self._showing[key] = self._writing.showing(hidden)
        return self._showing[key]

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


def _is_longer(value: Any, num_chars: int) -> bool:
    """Whether plain data is longer as text, about. Long data is not looked at to its end."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        num_chars -= _num_chars(value)
        if num_chars < 0:
            return True
        if isinstance(value, Mapping):
            waiting += value.keys()
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
    return False


def _num_chars(value: Any) -> int:
    """Of a text or a number; of what is around the values of anything else."""
    if isinstance(value, str | list | tuple | Mapping):
        return len(value)
    return value.bit_length() // 3 if isinstance(value, int) else 8


def load(assets: TextAssets) -> ModelText:
    """The text of a model; ValueError when its assets are of a kind that is not known here."""
    try:
        return ModelText(assets)
    except (LookupError, TypeError, AttributeError) as malformed:
        raise ValueError(
            f"the tokenizer file lacks what it should hold: {malformed!r}"
        ) from malformed


def _only_reads(spec: Mapping[str, Any]) -> bool:
    """Whether it is BERT's: such models make no text, and not all of what they read is kept."""
    return bool(spec["model"].get("type") == "WordPiece")


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
