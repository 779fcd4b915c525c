"""One answer, from token ids to pieces: text, stop strings, log probabilities, usage. Pure.

Stop strings act on the text of an answer, neither on thoughts nor on calls. Log probabilities are
of every token that the model said: those of thoughts and calls go beside empty text.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge.ask import Ask, End, Piece, Said, Text, TokenLogprob, Usage
from edge.gathered import joined
from edge.stops import StopText
from edge.texts import Loaded
from edge.tokenizer import Heard
from routing import wire


class Transcript:
    def __init__(
        self, model: Loaded, ask: Ask, num_prompt: int, heard: Heard | None = None
    ) -> None:
        """`heard`: None where all that is said is text."""
        self.ended = False  # nothing more is wanted of the region
        self._model = model
        self._stream = heard.stream if heard else model.text.stream(ask)
        self._reader = heard.reader if heard else None
        self._most_calls = ask.tools.most
        self._stops = StopText(ask.stops) if ask.stops else None
        self._num_prompt = num_prompt
        self._num_output = 0
        self._num_thought = 0
        self._cached_tokens = 0

    def text_of(self, tokens: wire.Tokens) -> str | None:
        """The text that these tokens add, if that is all they can add; else None: `read` them."""
        if self._stops is not None or self._reader is not None or tokens.logprobs:
            return None
        self._num_output += len(tokens.ids)
        return self._stream.push(tokens.ids)

    def read(self, burst: Sequence[wire.Event]) -> list[Piece]:
        """What these events add to the answer. A stop string ends it, whatever follows."""
        pieces: list[Piece] = []
        for event in burst:
            match event:
                case wire.Tokens():
                    pieces += self._say(event)
                case wire.Started(cached_tokens):
                    self._cached_tokens = cached_tokens
                case wire.Finish(reason, usage):
                    pieces += self._rest()
                    pieces.append(self._end(reason, usage))
            if self.ended:
                break
        return pieces

    def _say(self, tokens: wire.Tokens) -> list[Piece]:
        said, ids = self._read(tokens.ids)
        self._num_output += len(ids)
        pieces: list[Piece] = [*said]
        if tokens.logprobs and (logprobs := self._logprobs(tokens.logprobs[: len(ids)])):
            match said:
                case [Text(text=text), *others]:
                    pieces = [Text(text=text, logprobs=logprobs), *others]
                case _:
                    pieces = [Text(text="", logprobs=logprobs), *said]
        if self._over:
            used = wire.Usage(
                prompt_tokens=self._num_prompt,
                completion_tokens=self._num_output,
                cached_tokens=self._cached_tokens,
            )
            pieces.append(self._end("stop", used))
        return pieces

    def _read(self, ids: tuple[int, ...]) -> tuple[list[Said], tuple[int, ...]]:
        """What is said, and by which ids: up to the one that completes a stop string, or a call
        where no other is wanted."""
        can_think = self._reader is not None and self._reader.can_think
        if self._stops is None and self._most_calls is None and not can_think:
            return self._parsed(self._stream.push(ids)), ids
        said: list[Said] = []
        for count, token_id in enumerate(ids, start=1):
            thought = self._thinking
            said += self._until_stop(self._parsed(self._stream.push((token_id,))))
            self._num_thought += thought or self._thinking
            if self._over:
                return joined(said), ids[:count]
        return joined(said), ids

    @property
    def _thinking(self) -> bool:
        return self._reader is not None and self._reader.thinking

    def _parsed(self, text: str) -> list[Said]:
        if self._reader is not None:
            return joined(self._reader.push(text))
        return [Text(text=text)] if text else []

    def _until_stop(self, said: list[Said]) -> list[Said]:
        """What may be shown of it. What is no text parts the texts before and after it."""
        if (stops := self._stops) is None:
            return said
        shown: list[Said] = []
        for one in said:
            text = stops.push(one.text) if isinstance(one, Text) else stops.finish()
            if text:
                shown.append(Text(text=text))
            if stops.hit:
                break
            if not isinstance(one, Text):
                shown.append(one)
        return shown

    def _rest(self) -> list[Said]:
        """What was held back, where the model says no more."""
        said = self._until_stop(self._reader.finish()) if self._reader else []
        held = self._stops.finish() if self._stops else ""
        return [*said, Text(text=held)] if held else said

    @property
    def _over(self) -> bool:
        """Whether no more is wanted, though there may be."""
        if self._stops is not None and self._stops.hit:
            return True
        return self._reader is not None and self._reader.full

    def _logprobs(self, logprobs: tuple[wire.Logprob, ...]) -> tuple[TokenLogprob, ...]:
        """With token texts for ids. The id that ends an answer is no part of its text."""
        spelled = self._model.text.token_text
        return tuple(
            TokenLogprob(
                text=spelled(entry.token_id),
                logprob=entry.logprob,
                top=tuple((spelled(token_id), logprob) for token_id, logprob in entry.top),
            )
            for entry in logprobs
            if entry.token_id not in self._model.stop_ids
        )

    def _end(self, reason: wire.Reason, used: wire.Usage) -> End:
        self.ended = True
        if self._over:
            reason = "stop"  # at the very end of the tokens, too
        called = self._reader is not None and self._reader.num_calls > 0
        usage = Usage(
            prompt_tokens=used.prompt_tokens,
            completion_tokens=used.completion_tokens,
            cached_tokens=used.cached_tokens,
            reasoning_tokens=self._num_thought,
        )
        if called and reason == "stop":
            return End(reason="tool_calls", usage=usage)
        stop = self._stops.hit if self._stops else ""
        return End(reason=reason, usage=usage, stop=stop or None)
