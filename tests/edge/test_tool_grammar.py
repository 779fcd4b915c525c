"""Grammars of calls that have to be made: llguidance takes them, and what matches is a call."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

import infire.request
from edge.ask import Ask, Tool, ToolAsk
from edge.gathered import gather
from edge.reader import Reader
from edge.thinking import THINKING
from edge.tokenizer import ModelText
from edge.tool_families import BY_NAME
from edge.tool_grammar import call_grammar
from infire.grammar import BadGrammar, compiled
from infire.vocabulary import Vocabulary
from routing.wire import Grammar
from tests.fakes.saying_region import assets_with, ids_of
from tests.fakes.tool_answers import CALLS, NOW, PARIS, WEATHER, said
from tests.fakes.tool_templates import QWEN3_THINKING, SPECIAL, TEMPLATES

BOTH = ToolAsk(offered=(WEATHER, NOW), forced=("get_weather", "now"))
FAMILIES = [*CALLS, "prompted"]


@cache
def vocabulary(special: tuple[str, ...]) -> Vocabulary:
    tokenizer = LLTokenizer(assets_with("", special).tokenizer_json.decode())
    return Vocabulary(tokenizer=tokenizer, size=tokenizer.vocab_size)


def marks(family: str) -> tuple[str, ...]:
    return SPECIAL.get(family, ())


def source(family: str, tools: ToolAsk = BOTH, **about: Any) -> str:
    special = {name: 259 + at for at, name in enumerate(marks(family))}
    return call_grammar(BY_NAME[family], tools, special=special, **about)


def matcher(family: str, grammar: str) -> LLMatcher:
    """As an engine compiles it, within its limits."""
    return compiled(infire.request.Grammar("lark", grammar), vocabulary(marks(family)))


def accepts(family: str, grammar: str, text: str) -> bool:
    return matches(marks(family), grammar, text)


def matches(special: tuple[str, ...], grammar: str, text: str) -> bool:
    """Whether a whole answer does, of a model with these special tokens."""
    made = compiled(infire.request.Grammar("lark", grammar), vocabulary(special))
    ids = list(ids_of(text, special))
    return made.try_consume_tokens(ids) == len(ids) and made.is_accepting()


def answer(family: str) -> str:
    text = said("hermes" if family == "prompted" else family)
    return f"<|python_tag|>{text}" if family == "llama3" else text


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_what_the_family_says_matches(self, family: str) -> None:
        assert accepts(family, source(family), answer(family))

    def test_nothing_else_does(self, family: str) -> None:
        grammar, text = source(family), answer(family)
        for wrong in [
            "",
            "Hello",
            "Hello " + text,
            text + " Hello",
            text.replace("get_weather", "get_whether"),
            text.replace("city", "town"),
            text.replace("days", "hours"),
            text.replace(": 3}", ": three}").replace("\n3\n", "\nthree\n").replace(">3<", ">x<"),
        ]:
            assert not accepts(family, grammar, wrong), wrong

    def test_only_what_is_forced_may_be_called(self, family: str) -> None:
        tools = ToolAsk(offered=(WEATHER, NOW), forced=("now",), most=1)
        grammar, text = source(family, tools), answer(family)
        assert not accepts(family, grammar, text)
        assert not accepts(family, source(family, replace(BOTH, most=1)), text)

    def test_thoughts_may_come_first(self, family: str) -> None:
        row, text = THINKING[0], answer(family)
        grammar = source(family, thinking=row)
        assert accepts(family, grammar, text)
        assert accepts(family, grammar, f"<think>\nI <could>.\n</think>\n\n{text}")
        assert not accepts(family, grammar, f"hm</think>{text}")
        begun = source(family, thinking=row, thinks=True)
        assert accepts(family, begun, f"hm\n</think>\n\n{text}")
        assert not accepts(family, begun, text)

    def test_whatever_matches_is_read_as_calls(self, family: str) -> None:
        """Random answers that the grammar allows, a byte at a time."""
        tools = ToolAsk(offered=(_SMALL, NOW), forced=("f", "now"))
        grammar, hidden = source(family, tools), marks(family)
        for seed in range(15):
            ids = _random_answer(matcher(family, grammar), random.Random(seed))
            told = "".join(chr(at) if at < 256 else hidden[at - 259] for at in ids)
            reader = Reader(request_id="r", tools=tools, family=BY_NAME[family])
            made = gather([*reader.push(told), *reader.finish()])
            assert made.calls, told
            assert made.text == "", told
            for call in made.calls:
                arguments = json.loads(call.arguments)
                if call.name == "now":
                    assert arguments == {}
                else:
                    assert arguments["s"] in ("a", "b"), told
                    assert isinstance(arguments.get("flag", True), bool), told


_SMALL = Tool(
    name="f",
    parameters={
        "type": "object",
        "properties": {"s": {"type": "string", "enum": ["a", "b"]}, "flag": {"type": "boolean"}},
        "required": ["s"],
        "additionalProperties": False,
    },
)


def _random_answer(made: LLMatcher, rng: random.Random) -> list[int]:
    """Allowed ids, one at a time, until it may end."""
    ids: list[int] = []
    while not (made.is_accepting() and (made.is_stopped() or rng.random() < 0.7)):
        mask = made.compute_logit_bias()
        allowed = [at for at, bias in enumerate(mask) if bias and at not in (256, 257, 258)]
        assert allowed, ids
        ids.append(rng.choice(allowed))
        assert made.consume_token(ids[-1])
        assert len(ids) < 3000
    return ids


def test_glm_may_write_all_in_one_line() -> None:
    assert accepts("glm", source("glm"), answer("glm").replace("\n", ""))


class TestSchemas:
    def call(self, arguments: str) -> str:
        return f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'

    def accepts(self, schema: dict[str, Any], arguments: str, *, strict: bool = False) -> bool:
        tool = Tool(name="f", parameters={"type": "object"} | schema, strict=strict)
        tools = ToolAsk(offered=(tool,), forced=("f",), most=1)
        return accepts("hermes", source("hermes", tools), self.call(arguments))

    def test_arguments_match_the_schema(self) -> None:
        schema = WEATHER.parameters
        assert self.accepts(schema, PARIS)
        assert self.accepts(schema, '{"city": "Paris"}')
        assert not self.accepts(schema, '{"days": 3}')
        assert not self.accepts(schema, '{"city": 3}')
        assert not self.accepts(schema, '{ "city": "Paris"}')

    def test_only_what_the_schema_names_unless_it_speaks_of_more(self) -> None:
        schema = {"properties": {"a": {"type": "integer"}}}
        assert not self.accepts(schema, '{"a": 1, "b": 2}')
        assert self.accepts(schema | {"additionalProperties": True}, '{"a": 1, "b": 2}')
        assert not self.accepts({}, '{"b": 2}')

    def test_references_are_followed(self) -> None:
        schema = {
            "properties": {"x": {"$ref": "#/$defs/n"}},
            "required": ["x"],
            "$defs": {"n": {"type": "integer"}},
        }
        assert self.accepts(schema, '{"x": 1}')
        assert not self.accepts(schema, '{"x": "1"}')

    def test_what_cannot_be_checked_is_let_pass_unless_it_is_strict(self) -> None:
        schema = {"properties": {"x": {"type": "string", "contentEncoding": "base64"}}}
        unknown = schema | {"unevaluatedProperties": False}
        assert self.accepts(unknown, '{"x": "1"}')
        tool = Tool(name="f", parameters={"type": "object"} | unknown, strict=True)
        tools = ToolAsk(offered=(tool,), forced=("f",))
        with pytest.raises(BadGrammar, match="unevaluatedProperties"):
            matcher("hermes", source("hermes", tools))


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_model_asks_for_its_familys_grammar(family: str) -> None:
    text = ModelText(assets_with(TEMPLATES[family], marks(family)))
    ask = Ask(model="m", prompt="p", tools=BOTH)
    assert text.grammar(ask, text.encode_prompt(ask)) == Grammar("lark", source(family))


def test_a_grammar_goes_on_where_the_prompt_ends() -> None:
    text = ModelText(assets_with(QWEN3_THINKING))
    ask = Ask(model="m", prompt="p", tools=BOTH)
    grammar = text.grammar(ask, text.encode_prompt(ask))
    assert grammar is not None
    assert accepts("hermes", grammar.source, f"hm</think>\n\n{said('hermes')}")
    assert not accepts("hermes", grammar.source, said("hermes"))


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_json_comes_behind_thoughts_that_the_prompt_has_begun(kind: Any) -> None:
    text = ModelText(assets_with(QWEN3_THINKING))
    schema = '{"type":"object","properties":{"x":{"type":"integer"}},"required":["x"]}'
    ask = Ask(model="m", prompt="p", grammar=Grammar(kind, schema if "_s" in kind else ""))
    ids = text.encode_prompt(ask)
    grammar = text.grammar(ask, ids)
    assert grammar is not None
    assert matches((), grammar.source, 'I {could}.</think>\n\n{"x": 1}')
    assert not matches((), grammar.source, '{"x": 1}')
    assert not matches((), grammar.source, "hm</think>\n\nOne.")
    heard = text.read(ask, ids, "r")
    assert heard is not None
    made = gather([*heard.reader.push('hm</think>\n\n{"x": 1}'), *heard.reader.finish()])
    assert (made.reasoning, made.text) == ("hm", '{"x": 1}')
    as_it_is = replace(ask, raw=True)  # no template has begun anything
    assert text.grammar(as_it_is, ids) == ask.grammar


def test_what_else_has_to_match_is_no_thought() -> None:
    """The grammar is the client's, from the first token on: there is no end of thoughts in it."""
    text = ModelText(assets_with(QWEN3_THINKING))
    for tools in (ToolAsk(), ToolAsk(offered=(NOW,))):
        ask = Ask(model="m", prompt="p", grammar=Grammar("choice", '["yes","no"]'), tools=tools)
        ids = text.encode_prompt(ask)
        assert text.grammar(ask, ids) == ask.grammar
        heard = text.read(ask, ids, "r")
        assert heard is not None
        made = gather([*heard.reader.push("yes"), *heard.reader.finish()])
        assert (made.reasoning, made.text) == ("", "yes")


def test_who_is_not_forced_gets_what_else_was_asked_for() -> None:
    text, other = ModelText(assets_with(TEMPLATES["hermes"])), Grammar("json_object", "")
    free = ToolAsk(offered=(NOW,))
    assert text.grammar(Ask(model="m", prompt="p", tools=free), (1,)) is None
    assert text.grammar(Ask(model="m", prompt="p", grammar=other), (1,)) == other


@pytest.mark.parametrize("family", FAMILIES)
class TestFree:
    """Nothing has to be called; what is called has to fit."""

    free = ToolAsk(offered=(WEATHER, NOW))

    def test_text_and_calls_in_any_order(self, family: str) -> None:
        grammar, calls = source(family, self.free), answer(family)
        for text in ["", "Hello", "a < b [1] {2}", calls, f"Well. {calls} So.", f"{calls}a{calls}"]:
            assert accepts(family, grammar, text), text

    def test_a_call_that_has_begun_must_fit(self, family: str) -> None:
        grammar, calls = source(family, self.free), answer(family)
        assert not accepts(family, grammar, "Well. " + calls.replace("get_weather", "whether"))
        assert not accepts(family, grammar, "Well. " + calls.replace("city", "town"))

    def test_thoughts_are_free(self, family: str) -> None:
        grammar = source(family, self.free, thinking=THINKING[0])
        assert accepts(family, grammar, f"<think>\nhm\n</think>\n\nWell. {answer(family)}")

    def test_calls_or_json(self, family: str) -> None:
        schema = '{"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}'
        grammar, calls = source(family, self.free, instead=schema), answer(family)
        assert accepts(family, grammar, '{"x": 1}')
        assert accepts(family, grammar, calls)
        for wrong in ["Hello", '{"x": "1"}', '{"x": 1}' + calls, f"Well. {calls}"]:
            assert not accepts(family, grammar, wrong)


def test_only_strict_tools_are_held_to_their_schema_where_calls_are_free() -> None:
    text = ModelText(assets_with(TEMPLATES["hermes"]))

    def grammar(*tools: Tool, asked: Grammar | None = None) -> Grammar | None:
        offered = ToolAsk(offered=tools)
        return text.grammar(Ask(model="m", prompt="p", tools=offered, grammar=asked), (1,))

    strict = replace(WEATHER, strict=True)
    assert grammar(WEATHER, NOW) is None
    held = grammar(strict, NOW)
    assert held is not None
    assert accepts("hermes", held.source, f"Well. {said('hermes')}")
    with_json = grammar(WEATHER, asked=Grammar("json_object", ""))
    assert with_json is not None
    assert accepts("hermes", with_json.source, "{}")
    assert not accepts("hermes", with_json.source, "Well.")
    regex = Grammar("regex", "[a-z]+")
    assert grammar(strict, asked=regex) == regex  # calls would not match it
