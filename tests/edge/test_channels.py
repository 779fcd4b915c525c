"""Answers in channels: thoughts, text and calls of gpt-oss, cut anywhere."""

from __future__ import annotations

import random

from edge.ask import Ask, Message, Reasoning, Said, Text, ToolArguments, ToolAsk, ToolStart
from edge.channels import ChannelReader
from edge.gathered import gather, joined
from edge.thinking import thinking_of
from edge.tokenizer import ModelText
from edge.tool_families import BY_NAME, HIDDEN, family_of, spelled
from tests.edge.test_reader import cut
from tests.edge.test_tool_grammar import matches
from tests.fakes.saying_region import assets_with, ids_of
from tests.fakes.tool_answers import NOW, PARIS, REQUEST, WEATHER, called
from tests.fakes.tool_templates import HARMONY, HARMONY_SPECIAL

TOOLS = ToolAsk(offered=(WEATHER, NOW))
THOUGHT = "<|channel|>analysis<|message|>hm, Paris<|end|><|start|>assistant"
CALL = f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{PARIS}<|call|>"
FINAL = "<|channel|>final<|message|>It is 9 < 10.<|return|>"


def read(*parts: str, tools: ToolAsk = TOOLS, hidden: tuple[str, ...] = ()) -> list[Said]:
    row = BY_NAME["harmony"]
    reader = ChannelReader(request_id=REQUEST, tools=tools, family=row, hidden=hidden)
    pieces = [piece for part in parts for piece in reader.push(part)]
    return joined([*pieces, *reader.finish()])


def whole(text: str, tools: ToolAsk = TOOLS) -> list[Said]:
    """However it is cut, and whether its marks are special tokens or not."""
    made = read(text, tools=tools)
    rng = random.Random(text)
    for hidden in ((), HARMONY_SPECIAL):
        told = spelled(text, hidden)
        assert read(*told, tools=tools, hidden=hidden) == made
        for at in range(len(told)):
            assert read(told[:at], told[at:], tools=tools, hidden=hidden) == made
        for _ in range(30):
            assert read(*cut(told, rng), tools=tools, hidden=hidden) == made
    return made


def test_thoughts_then_text() -> None:
    assert whole(THOUGHT + FINAL) == [Reasoning(text="hm, Paris"), Text(text="It is 9 < 10.")]


def test_space_around_thoughts_is_nobodys() -> None:
    twice = THOUGHT.replace("hm, Paris", "hm,\n") + THOUGHT.replace("hm, Paris", "\nParis\n")
    assert whole(twice + FINAL) == [Reasoning(text="hm,Paris"), Text(text="It is 9 < 10.")]


def test_thoughts_then_a_call() -> None:
    assert whole(THOUGHT + CALL) == [
        Reasoning(text="hm, Paris"),
        *called(("get_weather", PARIS)),
    ]


def test_text_ahead_of_a_call() -> None:
    told = "<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant"
    assert whole(told + CALL) == [Text(text="Let me see."), *called(("get_weather", PARIS))]


def test_the_function_may_be_named_ahead_of_the_channel() -> None:
    call = f" to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>{PARIS}"
    assert whole(call) == called(("get_weather", PARIS))


def test_a_call_that_ends_at_once_has_no_arguments() -> None:
    call = "<|channel|>commentary to=functions.now<|message|><|call|>"
    assert whole(THOUGHT + call) == [Reasoning(text="hm, Paris"), *called((NOW.name, "{}"))]


def test_a_tool_that_was_not_offered_is_text() -> None:
    call = CALL.replace("get_weather", "browse")
    assert whole(call) == [Text(text=PARIS)]
    assert whole(CALL, ToolAsk()) == [Text(text=PARIS)]


def test_what_is_cut_off_keeps_what_there_is() -> None:
    start, arguments = whole(CALL[:-12])
    assert isinstance(start, ToolStart)
    assert arguments == ToolArguments(index=0, text=CALL[:-12].partition("<|message|>")[2])
    assert read("<|channel|>anal") == []
    assert whole("<|channel|>analysis<|message|>hm") == [Reasoning(text="hm")]


def test_text_in_no_channel_is_text() -> None:
    assert whole("Hello") == [Text(text="Hello")]


def test_a_model_of_the_family_is_read_so_with_tools_or_without() -> None:
    assert family_of(HARMONY, takes_tools=True) is BY_NAME["harmony"]
    text = ModelText(assets_with(HARMONY, HARMONY_SPECIAL))
    for tools in (TOOLS, ToolAsk()):
        ask = Ask(model="m", prompt="p", tools=tools)
        heard = text.read(ask, text.encode_prompt(ask), REQUEST)
        assert heard is not None
        said = heard.stream.push(ids_of(THOUGHT + FINAL, HARMONY_SPECIAL))
        made = gather([*heard.reader.push(said), *heard.reader.finish()])
        assert (made.reasoning, made.text) == ("hm, Paris", "It is 9 < 10.")
        assert HIDDEN not in made.text


def test_earlier_thoughts_reach_the_template_where_it_can_have_them() -> None:
    function = {"name": "now", "arguments": {}}
    turn: Message = {"role": "assistant", "content": "", "reasoning_content": "hm"}
    turn["tool_calls"] = [{"id": "c", "type": "function", "function": function}]
    text = ModelText(assets_with(HARMONY, HARMONY_SPECIAL))

    def shown(turn: Message) -> str:
        ids = text.encode_prompt(Ask(model="m", messages=(turn,), tools=TOOLS))
        return "".join(map(text.token_text, ids))

    assert "<|channel|>analysis<|message|>hm<|end|>" in shown(turn)
    assert "analysis" not in shown(turn | {"content": "Well."})


def test_what_has_to_be_called_is_a_grammar() -> None:
    text = ModelText(assets_with(HARMONY, HARMONY_SPECIAL))
    forced = ToolAsk(offered=(WEATHER, NOW), forced=("get_weather",))
    ask = Ask(model="m", prompt="p", tools=forced)
    grammar = text.grammar(ask, text.encode_prompt(ask))
    assert grammar is not None
    call = CALL.removesuffix("<|call|>")  # which ends the text
    assert matches(HARMONY_SPECIAL, grammar.source, call)
    assert matches(HARMONY_SPECIAL, grammar.source, THOUGHT + call)
    for wrong in [FINAL, THOUGHT, call.replace("get_weather", "now"), call + call, "Hello"]:
        assert not matches(HARMONY_SPECIAL, grammar.source, wrong)


def test_thoughts_are_known_by_their_channel() -> None:
    row = thinking_of(HARMONY, ())
    assert row is not None
    assert row.close == "<|end|><|start|>assistant"
