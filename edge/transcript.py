"""One answer, from token ids to pieces: text, stop strings, log probabilities, usage. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from edge.ask import Ask, End, Piece, Text, TokenLogprob, Usage
from edge.stops import StopText
from edge.texts import Loaded
from routing import wire


class Transcript:
    def __init__(self, model: Loaded, ask: Ask, num_prompt: int) -> None:
        self.ended = False  # nothing more is wanted of the region
        self._model = model
        self._stream = model.text.stream()
        self._stops = StopText(ask.stops) if ask.stops else None
        self._num_prompt = num_prompt
        self._num_output = 0
        self._cached_tokens = 0

    def text_of(self, tokens: wire.Tokens) -> str | None:
        """The text that these tokens add, if that is all they can add; else None: `read` them."""
        if self._stops is not None or tokens.logprobs:
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
                    if self._stops and (held := self._stops.finish()):
                        pieces.append(Text(text=held))
                    pieces.append(self._end(reason, usage))
            if self.ended:
                break
        return pieces

    def _say(self, tokens: wire.Tokens) -> list[Piece]:
        ids = tokens.ids
        if self._stops is None:
            shown = self._stream.push(ids)
        else:
            shown, ids = self._until_stop(self._stops, ids)
        self._num_output += len(ids)
        logprobs = self._logprobs(tokens.logprobs[: len(ids)]) if tokens.logprobs else ()
        pieces: list[Piece] = [Text(text=shown, logprobs=logprobs)] if shown or logprobs else []
        if self._stops and self._stops.hit:
            used = wire.Usage(
                prompt_tokens=self._num_prompt,
                completion_tokens=self._num_output,
                cached_tokens=self._cached_tokens,
            )
            pieces.append(self._end("stop", used, self._stops.hit))
        return pieces

    def _until_stop(self, stops: StopText, ids: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """What may be shown, and the ids it took: up to the one that completes a stop string."""
        shown = ""
        for count, token_id in enumerate(ids, start=1):
            shown += stops.push(self._stream.push((token_id,)))
            if stops.hit:
                return shown, ids[:count]
        return shown, ids

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

    def _end(self, reason: wire.Reason, used: wire.Usage, stop: str | None = None) -> End:
        self.ended = True
        usage = Usage(
            prompt_tokens=used.prompt_tokens,
            completion_tokens=used.completion_tokens,
            cached_tokens=used.cached_tokens,
        )
        return End(reason=reason, usage=usage, stop=stop)
