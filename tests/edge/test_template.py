from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import pytest

from edge.ask import Message
from edge.template import ChatTemplate
from routing.errors import Code, Failure

HELLO: list[Message] = [{"role": "user", "content": "Hello"}]


def render(source: str, messages: list[Message] = HELLO, **special: str) -> str:
    template = ChatTemplate(source, special, lambda: datetime(2026, 11, 23, tzinfo=UTC))
    return template.render(messages)


def refusal(source: str, messages: list[Message] = HELLO) -> str:
    with pytest.raises(Failure) as caught:
        render(source, messages)
    assert caught.value.code is Code.BAD_INPUT
    return caught.value.detail


def test_it_knows_the_messages_the_special_tokens_and_whose_turn_it_is() -> None:
    source = (
        "{{ bos_token }}{% for message in messages %}\n"
        "  {% if message.role == 'user' %}\n"
        "U:{{ message['content'] }}\n"
        "  {% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    assert render(source, bos_token="<s>") == "<s>U:Hello\nA:"


def test_tools_and_documents_are_none() -> None:
    source = "{{ 'none' if tools is none and not documents else 'some' }}"
    assert render(source) == "none"


def test_loops_may_break() -> None:
    assert render(
        "{% for n in range(9) %}{% if n > 2 %}{% break %}{% endif %}{{ n }}{% endfor %}"
    ) == ("012")


def test_json_is_as_models_saw_it() -> None:
    source = "{{ messages[0] | tojson }} {{ {'a': [1]} | tojson(indent=2) }}"
    said: list[Message] = [{"role": "user", "content": "<é & 'x'>"}]
    assert render(source, said) == (
        '{"role": "user", "content": "<é & \'x\'>"} {\n  "a": [\n    1\n  ]\n}'
    )


def test_the_date_is_the_clocks() -> None:
    assert render("{{ strftime_now('%d %b %Y') }}") == "23 Nov 2026"


def test_text_marked_for_training_is_text() -> None:
    assert render("{% generation %}yes{{ 1 }}{% endgeneration %}!") == "yes1!"


def test_a_namespace_carries_over_loops() -> None:
    source = "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = 7 %}{% endfor %}"
    assert render(source + "{{ ns.n }}{{ namespace(self=1).self }}{{ dict(a=2).a }}") == "712"


def test_a_template_that_refuses_is_heard() -> None:
    source = "{{ raise_exception('Conversation roles must alternate') }}"
    assert refusal(source) == "AiError: Bad input: Error: Conversation roles must alternate"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[7].content.missing }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[0].content | int(1) / 0 }}",
        "{% for n in range(10000000) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ nothing() }}",
    ],
)
def test_a_template_that_fails_on_the_messages_is_their_failure(source: str) -> None:
    assert "chat template does not take these messages" in refusal(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['__builtins__'] }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.__mro__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ self.__init__.__globals__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ (messages | map(attribute='__class__') | list)[0].mro() }}",
    ],
)
def test_a_hostile_template_reaches_no_python(source: str) -> None:
    """What leads out of the sandbox is undefined: it prints as nothing, and its use is refused."""
    with suppress(Failure):
        assert render(source) == ""


def test_a_template_cannot_change_what_was_said() -> None:
    said: list[Message] = [{"role": "user", "content": "Hello"}]
    refusal("{{ messages.clear() }}", said)
    assert said == HELLO


@pytest.mark.parametrize("source", ["{% if %}", "{{ unclosed", "{% include 'x' %}{% endfor %}"])
def test_a_template_that_does_not_compile_is_said_at_once(source: str) -> None:
    with pytest.raises(ValueError, match="does not compile"):
        render(source)


def test_one_template_renders_any_number_of_times() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {}, lambda: datetime.now(UTC))
    said: list[Any] = [[{"role": "user", "content": str(n)}] for n in range(3)]
    assert [template.render(messages) for messages in said] == ["0", "1", "2"]
