"""What models of each family say when they call tools: recorded answers, and what is in them.

`WEATHER` and `NOW` are the tools; each answer is (what is said, the pieces of it), put together.
"""

from __future__ import annotations

from edge.ask import Said, Text, Tool, ToolArguments, ToolEnd, ToolStart
from edge.tool_families import call_id
from tests.fakes.tool_templates import _wide as wide

WEATHER = Tool(
    name="get_weather",
    description="The weather of a city",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
)
NOW = Tool(name="now", parameters={"type": "object", "properties": {}})
REQUEST = "r1"


def called(*calls: tuple[str, str]) -> list[Said]:
    """Whole calls, by name and arguments."""
    return [piece for index, (name, text) in enumerate(calls) for piece in _one(index, name, text)]


def _one(index: int, name: str, text: str) -> list[Said]:
    start = ToolStart(index=index, id=call_id(REQUEST, index), name=name)
    return [start, ToolArguments(index=index, text=text), ToolEnd(index=index)]


PARIS = '{"city": "Paris", "days": 3}'
BOTH = called(("get_weather", PARIS), ("now", "{}"))
# One, and two, of each family.
CALLS: dict[str, tuple[str, str]] = {
    "hermes": (
        '<tool_call>\n{"name": "get_weather", "arguments": %s}\n</tool_call>',
        '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    ),
    "llama3": (
        '{"name": "get_weather", "parameters": %s}',
        '; {"name": "now", "parameters": {}}',
    ),
    "qwen3_coder": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        "\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    ),
    "glm": (
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
        "\n<tool_call>now\n</tool_call>",
    ),
    "deepseek_v3": (
        wide("<|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>")
        + "get_weather\n```json\n%s\n```"
        + wide("<|tool_call_end|>"),
        wide("\n<|tool_call_begin|>function<|tool_sep|>now\n```json\n{}\n```<|tool_call_end|>")
        + wide("<|tool_calls_end|>"),
    ),
    "deepseek_v31": (
        wide("<|tool_calls_begin|><|tool_call_begin|>")
        + "get_weather"
        + wide("<|tool_sep|>")
        + "%s"
        + wide("<|tool_call_end|>"),
        wide("<|tool_call_begin|>now<|tool_sep|>{}<|tool_call_end|><|tool_calls_end|>"),
    ),
    "kimi_k2": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        "<|tool_call_argument_begin|>%s<|tool_call_end|>",
        "<|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
    ),
    "mistral": (
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": %s}',
        ', {"name": "now", "arguments": {}}]',
    ),
    "mistral_args": ("[TOOL_CALLS]get_weather[ARGS]%s", "[TOOL_CALLS]now[ARGS]{}"),
}


def said(family: str) -> str:
    """Two calls as this family writes them."""
    first, second = CALLS[family]
    return first.replace("%s", PARIS) + second


def spoken(text: str) -> list[Said]:
    return [Text(text=text)] if text else []
