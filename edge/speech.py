"""How one model thinks aloud and calls tools: what it is shown, how its answers are read. Pure.

Chosen by its chat template and its special tokens. Shared by all requests; keeps nothing of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from edge.ask import Ask, Message
from edge.channels import ChannelReader
from edge.reader import Reader
from edge.template import ChatTemplate
from edge.thinking import Thinking, thinking_of
from edge.tool_families import Family, channels_of, hidden_markers
from edge.tool_grammar import call_grammar, thought_grammar
from edge.tool_prompt import Habits, habits_of, prepared
from routing.wire import Grammar

NUM_TAIL = 16  # ids of a prompt's end among which a mark may be, and space behind it


class Speech:
    def __init__(
        self, template: ChatTemplate, source: str, added: Mapping[str, int], special: frozenset[int]
    ) -> None:
        """`source`: of the template. `added`: the tokenizer's added tokens by name."""
        self._template = template
        self._source = source
        self._special = {name: at for name, at in added.items() if at in special}
        self._thinking = thinking_of(source, added)
        self._channels = channels_of(source)

    @cached_property
    def habits(self) -> Habits:
        """Found out by some milliseconds of trying, so not before somebody has tools."""
        return habits_of(self._template, self._source)

    def prepared(self, messages: Sequence[Message], ask: Ask) -> tuple[list[Message], Any]:
        """Messages and tools as the template is to be given them."""
        if self._channels is not None:
            messages = [_with_thoughts(turn) for turn in messages]
        known = any(turn.get("tool_calls") or turn["role"] == "tool" for turn in messages)
        if not known and not ask.tools.offered:
            return list(messages), None
        return prepared(self.habits, messages, ask.tools.offered)

    def reader(self, ask: Ask, request_id: str, tail: str) -> Reader | None:
        """What reads the answer to a prompt that ends with `tail`; None: all of it is text."""
        if _is_raw(ask):
            return None
        family = self._family(ask)
        if family is None and self._thinking is None:
            return None
        kind = ChannelReader if family is not None and family.form == "channels" else Reader
        return kind(
            request_id=request_id,
            tools=ask.tools,
            family=family,
            thinking=self._thinking,
            thinks=self._thinks(tail) and not _says_all(ask),
            hidden=self._hidden(family),
        )

    def spelled(self, ask: Ask) -> dict[int, str]:
        """Special tokens that whoever reads the answer has to see."""
        return {self._special[name]: name for name in self._hidden(self._family(ask))}

    def grammar(self, ask: Ask, tail: str) -> Grammar | None:
        """What an answer must match: of calls, where they must be made or must match a schema; else
        what the client says, of JSON behind the thoughts that the prompt has begun."""
        tools, instead = ask.tools, _schema(ask.grammar)
        if _says_all(ask):
            return ask.grammar
        if not tools.offered:
            if instead is None or self._thinking is None or not self._thinks(tail):
                return ask.grammar
            return Grammar("lark", thought_grammar(instead, self._thinking, self._special))
        strict = any(tool.strict for tool in tools.offered) and not self.habits.family.bare
        if not (tools.forced or instead is not None or strict):
            return None
        source = call_grammar(
            self.habits.family,
            tools,
            special=self._special,
            thinking=self._thinking,
            thinks=self._thinks(tail),
            instead=instead,
        )
        return Grammar("lark", source)

    def _family(self, ask: Ask) -> Family | None:
        return self.habits.family if ask.tools.offered else self._channels

    def _thinks(self, tail: str) -> bool:
        return self._thinking is not None and tail.rstrip().endswith(self._thinking.open)

    def _hidden(self, family: Family | None) -> frozenset[str]:
        thinking: Thinking | None = self._thinking
        texts = [*(family.texts if family else ())]
        texts += [thinking.open, thinking.close] if thinking else []
        return hidden_markers(texts, self._special)


def _with_thoughts(turn: Message) -> Message:
    """As gpt-oss' template names them: those ahead of a call, where there is no text."""
    if not turn.get("tool_calls") or turn["content"] or "reasoning_content" not in turn:
        return turn
    return turn | {"thinking": turn["reasoning_content"]}


def _says_all(ask: Ask) -> bool:
    """Whether all that is said has to match what the client wrote: there are no thoughts then."""
    if ask.grammar is None or ask.tools.forced:
        return False
    return _is_raw(ask) or _schema(ask.grammar) is None


def _is_raw(ask: Ask) -> bool:
    return ask.raw or ask.token_ids is not None


def _schema(asked: Grammar | None) -> str | None:
    """The schema of an answer that has to be JSON."""
    if asked is None or asked.kind not in {"json_object", "json_schema"}:
        return None
    return asked.source or '{"type": "object"}'
