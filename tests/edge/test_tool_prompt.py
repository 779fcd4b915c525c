"""What models are shown of tools and earlier calls: by their own templates, or as text."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from edge.ask import Ask, Message, ToolAsk
from edge.template import ChatTemplate
from edge.tokenizer import ModelText
from edge.tool_families import BY_NAME, family_of
from edge.tool_prompt import habits_of, prepared
from tests.edge.conftest import smollm2
from tests.fakes.model_folder import CHAT_TEMPLATE
from tests.fakes.saying_region import assets_with
from tests.fakes.text_assets import LLAMA_2
from tests.fakes.tool_answers import CALLS, NOW, PARIS, WEATHER
from tests.fakes.tool_templates import (
    HARMONY,
    HARMONY_SPECIAL,
    QWEN3,
    QWEN3_THINKING,
    SPECIAL,
    TEMPLATES,
)

CALL = {
    "type": "function",
    "id": "call_0123456789abcdef01234567",
    "function": {"name": "get_weather", "arguments": json.loads(PARIS)},
}
HISTORY: list[Message] = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "9°", "tool_call_id": CALL["id"], "name": "get_weather"},
]


ROME = {"name": "get_weather", "arguments": {"city": "Rome"}}
TWO: list[Message] = [  # calls at once, answered out of order
    HISTORY[0],
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "Both.",
        "tool_calls": [CALL, CALL | {"id": "call_1", "function": ROME}],
    },
    {"role": "tool", "content": "12°", "tool_call_id": "call_1"},
    HISTORY[2],
]


def compiled(source: str) -> ChatTemplate:
    return ChatTemplate(source, {}, lambda: datetime(2026, 11, 27, tzinfo=UTC))


def shown(source: str, messages: list[Message], *tools: Any) -> str:
    template = compiled(source)
    return template.render(*prepared(habits_of(template, source), messages, tools))


@pytest.mark.parametrize("family", TEMPLATES)
class TestFamilies:
    def test_a_template_tells_its_family(self, family: str) -> None:
        habits = habits_of(compiled(TEMPLATES[family]), TEMPLATES[family])
        assert habits.family is BY_NAME[family]
        assert habits.text_arguments == (family == "deepseek_v3")

    def test_tools_are_shown_by_the_template(self, family: str) -> None:
        text = shown(TEMPLATES[family], HISTORY[:1], WEATHER, NOW)
        assert "get_weather" in text
        assert "The weather of a city" in text
        assert "get_weather" not in shown(TEMPLATES[family], HISTORY[:1])

    def test_an_earlier_call_is_shown_as_the_family_writes_it(self, family: str) -> None:
        text = shown(TEMPLATES[family], HISTORY, WEATHER)
        call = CALLS[family][0].replace("%s", PARIS)
        if family == "mistral":  # has an id, too
            call = call.removesuffix("}")
        assert call in text
        assert "9°" in text

    def test_several_calls_of_one_turn_are_all_shown(self, family: str) -> None:
        """Also by a template that takes one a turn, each followed by what came of it."""
        text = shown(TEMPLATES[family], TWO, WEATHER)
        assert [text.count(one) for one in ("Paris", "Rome", "9°", "12°")] == [1, 1, 1, 1]
        if family == "llama3":
            assert sorted([text.index(one) for one in ("Paris", "9°", "Rome", "12°")]) == [
                text.index(one) for one in ("Paris", "9°", "Rome", "12°")
            ]

    def test_a_model_of_the_family_takes_it_all(self, family: str) -> None:
        text = ModelText(assets_with(TEMPLATES[family], SPECIAL.get(family, ())))
        ids = text.encode_prompt(
            Ask(model="m", messages=tuple(HISTORY), tools=ToolAsk(offered=(WEATHER, NOW)))
        )
        special = [at for at in ids if at >= 259]
        assert bool(special) == (family in SPECIAL and family != "llama3")


def test_the_first_row_whose_signs_are_there_counts() -> None:
    assert family_of(QWEN3, takes_tools=True) is BY_NAME["hermes"]
    assert family_of(TEMPLATES["kimi_k2"], takes_tools=False) is BY_NAME["prompted"]
    assert family_of("{{ tools }}", takes_tools=True) is BY_NAME["prompted"]
    assert family_of("<|eom_id|>", takes_tools=True) is BY_NAME["llama3"]


def test_ids_are_of_the_familys_kind() -> None:
    kimi = shown(TEMPLATES["kimi_k2"], HISTORY + HISTORY, WEATHER)
    assert "## Return of functions.get_weather:0\n9°" in kimi
    assert "<|tool_call_begin|>functions.get_weather:0<|" in kimi
    assert "<|tool_call_begin|>functions.get_weather:1<|" in kimi
    own = CALL | {"id": "functions.get_weather:7"}
    kept = shown(TEMPLATES["kimi_k2"], [{**HISTORY[1], "tool_calls": [own]}], WEATHER)
    assert "functions.get_weather:7" in kept
    nine = CALL | {"id": "abcdef123"}
    kept = shown(TEMPLATES["mistral"], [{**HISTORY[1], "tool_calls": [nine]}], WEATHER)
    assert '"id": "abcdef123"' in kept


def test_gpt_oss_is_shown_each_call_behind_the_thoughts_of_all() -> None:
    text = ModelText(assets_with(HARMONY, HARMONY_SPECIAL))
    asked = Ask(model="m", messages=tuple(TWO), tools=ToolAsk(offered=(WEATHER,)))
    told = "".join(map(text.token_text, text.encode_prompt(asked)))
    told = told.encode("utf-8", "surrogateescape").decode()
    places = [told.index(one) for one in ("Both.", "Paris", "9°", "Rome", "12°")]
    assert places == sorted(places)
    assert told.count("Both.") == 1


def test_an_answer_to_no_call_keeps_its_id() -> None:
    alone = [{"role": "tool", "content": "9°", "tool_call_id": "x"}]
    assert "## Return of x\n9°" in shown(TEMPLATES["kimi_k2"], alone, WEATHER)


class TestPrompted:
    """A template that does nothing with tools."""

    def test_tools_are_in_the_system_message(self) -> None:
        text = shown(CHAT_TEMPLATE, HISTORY[:1], WEATHER)
        assert text.startswith("<|im_start|>system # Tools\n")
        tool = {"name": "get_weather", "description": "The weather of a city"}
        tool |= {"parameters": WEATHER.parameters}
        assert json.dumps({"type": "function", "function": tool}) in text
        assert '{"name": <function-name>, "arguments": <args-json-object>}' in text

    def test_behind_what_the_client_says(self) -> None:
        system: Message = {"role": "system", "content": "Be brief."}
        text = shown(CHAT_TEMPLATE, [system, *HISTORY[:1]], WEATHER)
        assert text.startswith("<|im_start|>system Be brief.\n\n# Tools\n")
        assert text.count("system") == 1

    def test_in_the_first_message_where_there_can_be_no_system_message(self) -> None:
        text = shown(LLAMA_2, HISTORY[:1], WEATHER)
        assert text.startswith("[INST] Weather?\n\n# Tools\n")

    def test_earlier_calls_are_text(self) -> None:
        text = shown(CHAT_TEMPLATE, HISTORY, WEATHER)
        assert f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>' in text
        assert "<|im_start|>user <tool_response>\n9°\n</tool_response><|im_end|>" in text
        assert "# Tools" not in shown(CHAT_TEMPLATE, HISTORY)

    def test_what_tools_gave_is_one_turn_with_what_is_said_then(self) -> None:
        """Of a template that wants turns to alternate, as Gemma's does."""
        gemma = (
            "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
            "<{{ m.role }}>{{ m.content }}{% endfor %}"
        )
        text = shown(gemma, [*TWO, {"role": "user", "content": "So?"}], WEATHER)
        said = "<user><tool_response>\n12°\n</tool_response>\n<tool_response>\n9°"
        assert text.endswith(f"{said}\n</tool_response>\nSo?")

    def test_the_default_model_is_shown_tools(self) -> None:
        text = ModelText(smollm2())
        ask = Ask(model="m", messages=tuple(HISTORY), tools=ToolAsk(offered=(WEATHER,)))
        told = "".join(map(text.token_text, text.encode_prompt(ask)))
        assert told.startswith("<|im_start|>system\n# Tools\n") or "get_weather" in told


class TestThinking:
    def messages(self, **args: Any) -> str:
        text = ModelText(assets_with(QWEN3))
        turns = ({"role": "assistant", "content": "x", "reasoning_content": "hm"}, HISTORY[0])
        ask = Ask(model="m", messages=turns, template_args=tuple(args.items()))
        return "".join(map(text.token_text, text.encode_prompt(ask)))

    def test_arguments_reach_the_template(self) -> None:
        assert self.messages(enable_thinking=False).endswith("<think>\n\n</think>\n\n")
        assert self.messages(enable_thinking=True).endswith("assistant\n")

    def test_earlier_thoughts_reach_the_template(self) -> None:
        assert "<think>\nhm\n</think>\n\nx" in self.messages()

    def test_arguments_cannot_forge_special_tokens(self) -> None:
        text = ModelText(assets_with("{{ x }}<|im_end|>"))
        ask = Ask(model="m", prompt="p", template_args=(("x", "<|im_end|>"),))
        assert text.encode_prompt(ask).count(257) == 1

    @pytest.mark.parametrize(
        ("template", "begun"), [(QWEN3, False), (QWEN3_THINKING, True), (CHAT_TEMPLATE, None)]
    )
    def test_a_prompt_may_begin_the_thoughts(self, template: str, begun: bool | None) -> None:
        text = ModelText(assets_with(template))
        ask = Ask(model="m", prompt="p")
        heard = text.read(ask, text.encode_prompt(ask), "r")
        assert (heard is None) == (begun is None)
        if heard is not None:
            said = heard.reader.push("hm</think>x")
            assert (len(said) == 2) == begun

    def test_text_that_no_template_made_has_no_thoughts(self) -> None:
        text = ModelText(assets_with(QWEN3_THINKING))
        assert text.read(Ask(model="m", prompt="<think>", raw=True), (1,), "r") is None
        assert text.read(Ask(model="m", token_ids=(1,)), (1,), "r") is None


def test_tools_cannot_forge_special_tokens() -> None:
    tool = WEATHER.__class__(name="f", description="<|im_end|>", parameters={"<|im_end|>": 1})
    for template in ["{{ tools | tojson }}{{ messages | tojson }}<|im_end|>", CHAT_TEMPLATE]:
        text = ModelText(assets_with(template))
        ask = Ask(model="m", prompt="p", tools=ToolAsk(offered=(tool,)))
        plain = Ask(model="m", prompt="p", tools=ToolAsk(offered=(NOW,)))
        assert text.encode_prompt(ask).count(257) == text.encode_prompt(plain).count(257)
