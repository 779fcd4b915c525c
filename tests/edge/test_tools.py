"""What clients send of tools, in every spelling there is; what is refused, and by which name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edge import completions, openai, workers_ai
from edge.ask import Ask, Tool, ToolAsk
from tests.edge.bodies import HELLO, refused

F: dict[str, Any] = {"name": "f", "description": "d", "parameters": {"type": "object"}}
G = {"type": "function", "function": {"name": "g"}}
EMPTY = {"type": "object", "properties": {}}


def native(body: bytes) -> Ask:
    return workers_ai.parse(body, "m")


def openais(body: bytes) -> Ask:
    return openai.parse(json.dumps({"model": "m", **json.loads(body)}).encode())


@pytest.fixture(params=[native, openais], ids=["native", "openai"])
def parse(request: pytest.FixtureRequest) -> Any:
    return request.param


def asked(parse: Any, **fields: Any) -> ToolAsk:
    made: Ask = parse(json.dumps(HELLO | fields).encode())
    return made.tools


def test_both_shapes_of_a_tool_are_known(parse: Any) -> None:
    f = Tool(name="f", description="d", parameters={"type": "object"})
    both = [F, {"type": "function", "function": F | {"name": "f2"}}]
    assert asked(parse, tools=both).offered == (f, Tool(**{**_fields(f), "name": "f2"}))


def _fields(tool: Tool) -> dict[str, Any]:
    return {name: getattr(tool, name) for name in tool.__slots__}


def test_what_is_left_out_or_null_is_nothing(parse: Any) -> None:
    tool = {"type": None, "name": "f", "description": None, "parameters": None, "strict": None}
    assert asked(parse, tools=[tool]).offered == (Tool(name="f", parameters=EMPTY),)
    assert asked(parse, tools=[{"name": "f", "parameters": {}}]).offered[0].parameters == {
        "type": "object"
    }
    assert asked(parse, tools=[G | {"strict": True}]).offered[0].strict
    assert asked(parse, tools=None, tool_choice=None, parallel_tool_calls=None) == ToolAsk()


@pytest.mark.parametrize(
    ("choice", "forced"),
    [
        (None, ()),
        ("auto", ()),
        ({"type": "auto"}, ()),
        ("required", ("f", "g")),
        ("any", ("f", "g")),
        ({"type": "required"}, ("f", "g")),
        ({"type": "any"}, ("f", "g")),
        ("g", ("g",)),
        ({"type": "function", "function": {"name": "g"}}, ("g",)),
        ({"type": "function", "name": "g"}, ("g",)),
        ({"function": {"name": "g"}}, ("g",)),
        ({"type": "tool", "name": "g"}, ("g",)),
        ({"type": "allowed_tools", "mode": "required", "tools": [G]}, ("g",)),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [G]}}, ("g",)),
    ],
)
def test_what_has_to_be_called(parse: Any, choice: Any, forced: tuple[str, ...]) -> None:
    made = asked(parse, tools=[F, G], tool_choice=choice)
    assert made.forced == forced
    assert [tool.name for tool in made.offered] == ["f", "g"]
    assert made.most == (1 if forced == ("g",) else None)


@pytest.mark.parametrize("choice", ["none", {"type": "none"}])
def test_what_may_not_be_called_is_not_offered(parse: Any, choice: Any) -> None:
    assert asked(parse, tools=[F], tool_choice=choice) == ToolAsk()
    assert asked(parse, tools=[], tool_choice=choice) == ToolAsk()


def test_some_may_be_allowed(parse: Any) -> None:
    made = asked(parse, tools=[F, G], tool_choice={"type": "allowed_tools", "tools": [G]})
    assert [tool.name for tool in made.offered] == ["g"]
    assert made.forced == ()


def test_one_call_at_a_time(parse: Any) -> None:
    assert asked(parse, tools=[F], parallel_tool_calls=False).most == 1
    assert asked(parse, tools=[F], parallel_tool_calls=True).most is None
    assert asked(parse, tools=[F, G], tool_choice="required", parallel_tool_calls=False).most == 1


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"tools": "f"}, "/tools"),
        ({"tools": ["f"]}, "/tools/0"),
        ({"tools": [{}]}, "/tools/0/name"),
        ({"tools": [{"type": "web_search"}]}, "/tools/0/type"),
        ({"tools": [{"type": "function", "function": {}}]}, "/tools/0/function/name"),
        ({"tools": [{"name": "with space"}]}, "/tools/0/name"),
        ({"tools": [{"name": "x" * 129}]}, "/tools/0/name"),
        ({"tools": [{"name": "f\n"}]}, "/tools/0/name"),
        ({"tools": [{"name": 7}]}, "/tools/0/name"),
        ({"tools": [{"name": "f", "description": 7}]}, "/tools/0/description"),
        ({"tools": [{"name": "f", "parameters": "x"}]}, "/tools/0/parameters"),
        ({"tools": [{"name": "f", "parameters": {"type": "string"}}]}, "/tools/0/parameters/type"),
        ({"tools": [{"name": "f", "strict": "yes"}]}, "/tools/0/strict"),
        ({"tools": [F, F]}, "/tools/1"),
        ({"tools": [{"name": f"f{at}"} for at in range(129)]}, "/tools"),
        ({"tools": [F], "tool_choice": "g"}, "/tool_choice"),
        ({"tools": [F], "tool_choice": 7}, "/tool_choice"),
        ({"tools": [F], "tool_choice": True}, "/tool_choice"),
        ({"tools": [F], "tool_choice": {}}, "/tool_choice/name"),
        ({"tools": [F], "tool_choice": {"type": "web"}}, "/tool_choice/type"),
        ({"tools": [F], "tool_choice": {"type": "function", "name": "g"}}, "/tool_choice/name"),
        ({"tools": [F], "tool_choice": {"function": {}}}, "/tool_choice/function/name"),
        ({"tools": [F], "tool_choice": {"type": "allowed_tools"}}, "/tool_choice/tools"),
        (
            {"tools": [F], "tool_choice": {"type": "allowed_tools", "mode": "x", "tools": [F]}},
            "/tool_choice/mode",
        ),
        ({"tool_choice": "required"}, "/tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "/tool_choice"),
        ({"tools": [F], "parallel_tool_calls": "no"}, "/parallel_tool_calls"),
        ({"functions": [{"name": "f", "code": ""}]}, "/functions"),
        ({"chat_template_kwargs": []}, "/chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": []}}, "/chat_template_kwargs/a"),
        ({"chat_template_kwargs": {"a": {}}}, "/chat_template_kwargs/a"),
        ({"chat_template_kwargs": {"messages": 1}}, "/chat_template_kwargs/messages"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "/chat_template_kwargs/bos_token"),
        ({"chat_template_kwargs": {"_x": 1}}, "/chat_template_kwargs/_x"),
        ({"chat_template_kwargs": {"a": "x" * 1001}}, "/chat_template_kwargs/a"),
        ({"chat_template_kwargs": {f"a{at}": 1 for at in range(33)}}, "/chat_template_kwargs"),
        ({"reasoning_effort": "some"}, "/reasoning_effort"),
        ({"reasoning_effort": 7}, "/reasoning_effort"),
    ],
)
def test_a_refusal_names_the_field(parse: Any, fields: dict[str, Any], pointer: str) -> None:
    assert refused(parse, HELLO | fields).pointer == pointer


def test_a_schema_that_is_nested_too_deeply_is_refused(parse: Any) -> None:
    def nested(levels: int) -> dict[str, Any]:
        schema: dict[str, Any] = {}
        for _ in range(levels - 1):
            schema = {"properties": schema}
        return {"name": "f", "parameters": schema}

    assert asked(parse, tools=[nested(100)]).offered
    assert refused(parse, HELLO | {"tools": [nested(101)]}).pointer == "/tools/0/parameters"


def test_128_tools_are_taken(parse: Any) -> None:
    names = [f"f.{at}-x_" for at in range(128)]
    assert [tool.name for tool in asked(parse, tools=[{"name": n} for n in names]).offered] == names


def test_where_a_prompt_goes_as_it_is_there_are_no_tools() -> None:
    body = {"prompt": "p", "raw": True, "tools": [F]}
    assert refused(native, body).pointer == "/tools"
    assert not native(json.dumps(body | {"tool_choice": "none"}).encode()).tools.offered
    body = {"model": "m", "prompt": "p", "tools": [F]}
    assert refused(completions.parse, body).pointer == "/tools"
    assert native(json.dumps({"prompt": "p", "tools": [F]}).encode()).tools.offered


def test_arguments_of_the_template(parse: Any) -> None:
    def args(**fields: Any) -> dict[str, Any]:
        made: Ask = parse(json.dumps(HELLO | fields).encode())
        return dict(made.template_args)

    assert args(reasoning_effort=None, chat_template_kwargs=None) == {}
    assert args(chat_template_kwargs={"enable_thinking": False, "x": "y", "n": None, "f": 0.5}) == {
        "enable_thinking": False,
        "x": "y",
        "n": None,
        "f": 0.5,
    }
    assert args(reasoning_effort="low") == {"reasoning_effort": "low"}
    off = {"reasoning_effort": "none", "enable_thinking": False, "thinking": False}
    assert args(reasoning_effort="none") == off
    assert args(reasoning_effort="none", chat_template_kwargs={"thinking": True}) == off | {
        "thinking": True
    }


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_what_was_thought_before_reaches_the_template(parse: Any, name: str) -> None:
    turn = {"role": "assistant", "content": "x", name: "hm"}
    made: Ask = parse(
        json.dumps({"messages": [turn, {"role": "user", name: "y", "content": "z"}]}).encode()
    )
    assert made.messages is not None
    assert made.messages[0] == {"role": "assistant", "content": "x", "reasoning_content": "hm"}
    assert made.messages[1] == {"role": "user", "content": "z"}
