"""Chat templates: a conversation becomes the one text that a model was trained to read.

Templates come with models, so they run in jinja2's sandbox on plain data only, with the filters and
functions that `transformers` gives them. Knows no tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from edge.ask import Message, Scalar
from routing.errors import Code, Failure

_NONE: Mapping[str, Scalar] = {}
# What an expression of a template may raise on messages that its author did not think of.
_UNFORESEEN = (
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)


class ChatTemplate:
    """A template, compiled once. `special_tokens` are the names it may use: bos_token, ..."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], clock: Callable[[], datetime]
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {
            "raise_exception": _reject,
            "strftime_now": lambda form: clock().strftime(form),
            "namespace": _Namespace,
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),  # the type itself leads out
        }
        try:
            self._template = environment.from_string(source)
        except TemplateError as broken:
            raise ValueError(f"the chat template does not compile: {broken}") from broken
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        args: Mapping[str, Scalar] = _NONE,
    ) -> str:
        """The conversation up to where the model speaks; Failure(BAD_INPUT) when it is refused.

        `tools` are as OpenAI's API has them. `args` are whatever this template takes besides.
        """
        given = {
            "messages": list(messages),
            "tools": tools,
            "documents": None,
            "add_generation_prompt": True,
        }
        try:
            return self._template.render({**args, **given, **self._special_tokens})
        except _Rejected as rejected:
            raise _bad_input(str(rejected)) from None
        except (TemplateError, *_UNFORESEEN) as failed:
            says = f"the model's chat template does not take these messages: {failed}"
            raise _bad_input(says) from failed


def utc_now() -> datetime:
    """The day that templates print is the same on every edge: prompts that differ share no KV."""
    return datetime.now(UTC)


class _Rejected(TemplateError):
    """The template itself refused the messages."""


class _Generation(Extension):
    """`{% generation %}` marks the model's turns for training; here its body is just text."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """jinja2's namespace, without names that reach into Python."""

    def __init__(*args: Any, **attributes: Any) -> None:  # `self` may be an attribute's name
        for name in dict(*args[1:], **attributes):
            _public(name)
        Namespace.__init__(*args, **attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(_public(name), value)


def _public(name: str) -> str:
    if name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")
    return name


def _reject(message: str) -> NoReturn:
    raise _Rejected(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002  templates may pass these by position
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """As transformers has it: jinja2's own escapes HTML, which is not what models were shown."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _bad_input(says: str) -> Failure:
    return Failure(Code.BAD_INPUT, f"AiError: Bad input: Error: {says}")
