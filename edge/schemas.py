"""What a model takes and gives, as JSON Schema: `GET /ai/models/schema`, and the OpenAPI document.

Ranges are those that `edge.options` checks, so that what is published is what is enforced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge.formats import MOST_CHARS, MOST_CHOICES
from edge.options import ANTHROPIC, MAX_BIASES, MAX_STOP_CHARS, MAX_STOPS, NATIVE, OPENAI, Range
from edge.thinking import EFFORTS, MOST_ARGS
from edge.tools import MOST_TOOLS, NAME

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
ORDER: Schema = {"enum": ["asc", "desc"]}


def nullable(schema: Schema) -> Schema:
    """Clients send null for what they leave out."""
    return {"anyOf": [schema, {"type": "null"}]}


def _obj(properties: Mapping[str, Schema], *required: str) -> Schema:
    optional = {
        name: schema if name in required else nullable(schema)
        for name, schema in properties.items()
    }
    shape: Schema = {"type": "object", "properties": optional}
    return shape | ({"required": list(required)} if required else {})


def _list(items: Schema, **bounds: int) -> Schema:
    return {"type": "array", "items": items} | bounds


def _ranges(ranges: Mapping[str, Range]) -> dict[str, Schema]:
    return {
        name: {
            "type": allowed.kind,
            "minimum": int(allowed.low) if allowed.kind == "integer" else allowed.low,
            "maximum": int(allowed.high) if allowed.kind == "integer" else allowed.high,
        }
        for name, allowed in ranges.items()
    }


_STOP = TEXT | {"minLength": 1, "maxLength": MAX_STOP_CHARS}
_FUNCTION = _obj(
    {
        "name": TEXT | {"pattern": f"^{NAME}$"},
        "description": TEXT,
        "parameters": {"type": "object"},
        "strict": FLAG,
    },
    "name",
)
TOOL = {
    "anyOf": [
        _FUNCTION,
        _obj({"type": {"const": "function"}, "function": _FUNCTION}, "type", "function"),
    ]
}
TOOL_CHOICE = {
    "anyOf": [{"enum": ["auto", "none", "required"]}, {"type": "object", "required": ["type"]}]
}
RESPONSE_FORMAT = _obj(
    {
        "type": {"enum": ["text", "json_object", "json_schema"]},
        "json_schema": {
            "type": "object",
            "description": "A JSON schema, or OpenAI's {name, schema, strict} around one.",
        },
    },
    "type",
)
_PART = _obj({"type": {"const": "text"}, "text": TEXT}, "type", "text")
_CONTENT = {"anyOf": [TEXT, _list(_PART)]}
_CALL = _obj({"name": TEXT, "arguments": {"anyOf": [{"type": "object"}, TEXT]}}, "name")
_TOOL_CALL = {"anyOf": [_CALL, _obj({"id": TEXT, "type": TEXT, "function": _CALL}, "function")]}
_SAYS: Mapping[str, Schema] = {
    "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
    "content": _CONTENT,
    "name": TEXT,
    "tool_call_id": TEXT,
}
MESSAGE = {
    "anyOf": [
        _obj(_SAYS, "role", "content"),
        _obj({**_SAYS, "tool_calls": _list(_TOOL_CALL, minItems=1)}, "role", "tool_calls"),
    ]
}
MESSAGES = _list(MESSAGE, minItems=1)
_CONTENT_PARTS = {"anyOf": [TEXT, _list(_obj({"type": TEXT, "text": TEXT}, "type"))]}

_OPTIONS = _obj({"rejectIfBusy": FLAG})
_SOURCE = TEXT | {"maxLength": MOST_CHARS}
# What rides along with a prompt on every route.
_COMMON: Mapping[str, Schema] = {
    "stream": FLAG | {"description": "Answer with server-sent events as the text is made."},
    "max_completion_tokens": _ranges(NATIVE)["max_tokens"],
    "stop": {"anyOf": [_STOP, _list(_STOP, maxItems=MAX_STOPS)]},
    "logit_bias": {
        "type": "object",
        "maxProperties": MAX_BIASES,
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
    "response_format": RESPONSE_FORMAT,
    # After vLLM's; one of these and of `response_format`.
    "guided_json": {"anyOf": [{"type": "object"}, _SOURCE]},
    "guided_regex": _SOURCE,
    "guided_choice": _list(TEXT | {"minLength": 1}, maxItems=MOST_CHOICES),
    "guided_grammar": _SOURCE,
    "speculative": FLAG,
    "ignore_eos": FLAG,
    "options": _OPTIONS,
}
_CHAT: Mapping[str, Schema] = {
    "tools": _list(TOOL, maxItems=MOST_TOOLS),
    "tool_choice": TOOL_CHOICE,
    "parallel_tool_calls": FLAG,
    "reasoning_effort": {"enum": [*EFFORTS]},
    "chat_template_kwargs": {
        "type": "object",
        "maxProperties": MOST_ARGS,
        "additionalProperties": nullable({"type": ["string", "number", "boolean"]}),
        "description": "Arguments of the model's chat template: enable_thinking, ...",
    },
}

USAGE = _obj(
    {
        "prompt_tokens": {"type": "integer"},
        "completion_tokens": {"type": "integer"},
        "total_tokens": {"type": "integer"},
        "prompt_tokens_details": _obj({"cached_tokens": {"type": "integer"}}),
        "completion_tokens_details": _obj({"reasoning_tokens": {"type": "integer"}}),
    },
    "prompt_tokens",
    "total_tokens",
)

_PROMPT = _obj(
    {"prompt": TEXT | {"minLength": 1}, "raw": FLAG, **_ranges(NATIVE), **_COMMON}, "prompt"
)
_TURNS = _obj({"messages": MESSAGES, **_ranges(NATIVE), **_COMMON, **_CHAT}, "messages")
GENERATION_INPUT: Schema = {
    "oneOf": [_PROMPT | {"title": "Prompt"}, _TURNS | {"title": "Messages"}]
}
GENERATION_OUTPUT: Schema = {
    "oneOf": [
        _obj(
            {
                "response": {"anyOf": [TEXT, {"type": "object"}]},
                "reasoning_content": TEXT,
                "usage": USAGE,
                "tool_calls": _list(_obj({"name": TEXT, "arguments": {"type": "object"}}, "name")),
            },
            "response",
            "usage",
        ),
        TEXT | {"contentMediaType": "text/event-stream"},
    ]
}
FALLBACKS = _list(TEXT | {"minLength": 1, "maxLength": 128}, maxItems=7)
CHAT_INPUT: Schema = _obj(
    {
        "model": TEXT,
        "models": FALLBACKS,
        "messages": MESSAGES,
        **_ranges(OPENAI),
        **_COMMON,
        **_CHAT,
        "n": {"type": "integer", "minimum": 1, "maximum": 128},
        "logprobs": FLAG,
        "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
        "stream_options": _obj({"include_usage": FLAG}),
    },
    "model",
    "messages",
)
_IDS = _list({"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, minItems=1)
_WORDS = TEXT | {"minLength": 1}
COMPLETION_INPUT: Schema = _obj(
    {
        "model": TEXT,
        "models": FALLBACKS,
        "prompt": {"anyOf": [_WORDS, _list(_WORDS, minItems=1), _IDS, _list(_IDS, minItems=1)]},
        **_ranges(OPENAI),
        **_COMMON,
        "n": {"type": "integer", "minimum": 1, "maximum": 128},
        "best_of": {"type": "integer", "minimum": 1, "maximum": 128},
        "logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
        "echo": FLAG,
        "stream_options": _obj({"include_usage": FLAG}),
    },
    "model",
    "prompt",
)
_ITEM = {
    "anyOf": [
        _obj({"role": TEXT, "content": _CONTENT_PARTS}, "role", "content"),
        _obj(
            {"type": {"const": "function_call"}, "call_id": TEXT, "name": TEXT, "arguments": TEXT},
            "type",
            "call_id",
            "name",
            "arguments",
        ),
        _obj(
            {"type": {"const": "function_call_output"}, "call_id": TEXT, "output": _CONTENT_PARTS},
            "type",
            "call_id",
            "output",
        ),
        _obj({"type": {"const": "reasoning"}}, "type"),
        _obj({"type": {"const": "item_reference"}, "id": TEXT}, "id"),
    ]
}
METADATA: Schema = {
    "type": "object",
    "maxProperties": 16,
    "propertyNames": {"maxLength": 64},
    "additionalProperties": TEXT | {"maxLength": 512},
}
RESPONSES_INPUT: Schema = _obj(
    {
        "model": TEXT,
        "input": {"anyOf": [TEXT, _list(_ITEM)]},
        "instructions": TEXT,
        "previous_response_id": TEXT,
        "store": FLAG,
        "stream": FLAG,
        "max_output_tokens": _ranges(OPENAI)["max_tokens"],
        "temperature": _ranges(OPENAI)["temperature"],
        "top_p": _ranges(OPENAI)["top_p"],
        "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
        "include": _list(TEXT),
        "tools": _list(_obj({"type": {"const": "function"}, "name": TEXT}, "type", "name")),
        "tool_choice": TOOL_CHOICE,
        "parallel_tool_calls": FLAG,
        "text": _obj(
            {"format": _obj({"type": {"enum": ["text", "json_object", "json_schema"]}}, "type")}
        ),
        "reasoning": _obj({"effort": TEXT, "summary": TEXT}),
        "metadata": METADATA,
        "truncation": {"enum": ["auto", "disabled"]},
        "user": TEXT,
        "models": FALLBACKS,
        "options": _OPTIONS,
    },
    "model",
    "input",
)
_BLOCKS = {"anyOf": [TEXT, _list({"type": "object", "required": ["type"]}, minItems=1)]}
_TURN = _obj(
    {"role": {"enum": ["user", "assistant", "system"]}, "content": _BLOCKS}, "role", "content"
)
_COUNTED: Mapping[str, Schema] = {
    "model": TEXT,
    "messages": _list(_TURN, minItems=1),
    "system": {"anyOf": [TEXT, _list(_PART, minItems=1)]},
    "tools": _list(
        _obj(
            {"name": TEXT, "description": TEXT, "input_schema": {"type": "object"}},
            "name",
            "input_schema",
        )
    ),
    "tool_choice": _obj(
        {
            "type": {"enum": ["auto", "any", "tool", "none"]},
            "name": TEXT,
            "disable_parallel_tool_use": FLAG,
        },
        "type",
    ),
}
COUNT_INPUT: Schema = _obj(_COUNTED, "model", "messages")
MESSAGES_INPUT: Schema = _obj(
    {
        **_COUNTED,
        **_ranges(ANTHROPIC),
        "stream": FLAG,
        "stop_sequences": _list(_STOP, maxItems=MAX_STOPS),
        "thinking": _obj({"type": TEXT}, "type"),
        "output_config": _obj(
            {
                "effort": {"enum": [*EFFORTS]},
                "format": _obj(
                    {"type": {"const": "json_schema"}, "schema": {"type": "object"}},
                    "type",
                    "schema",
                ),
            }
        ),
        "metadata": {"type": "object"},
        "models": FALLBACKS,
        "options": _OPTIONS,
    },
    "model",
    "max_tokens",
    "messages",
)
_TEXTS = {"anyOf": [_WORDS, _list(_WORDS, minItems=1, maxItems=100)]}
_POOLING = {"enum": ["mean", "cls"]}
_EMBED = _obj({"text": _TEXTS, "pooling": _POOLING, "options": _OPTIONS}, "text")
_CONTEXT = _obj({"text": TEXT | {"minLength": 1}}, "text")
_RERANK = _obj(
    {
        "query": TEXT | {"minLength": 1},
        "contexts": _list(_CONTEXT, minItems=1, maxItems=99),
        "top_k": {"type": "integer", "minimum": 1},
        "pooling": _POOLING,
        "options": _OPTIONS,
    },
    "query",
    "contexts",
)
EMBEDDINGS_INPUT: Schema = _obj(
    {
        "model": TEXT,
        "models": FALLBACKS,
        "input": {
            "anyOf": [
                _WORDS,
                _list(_WORDS, minItems=1, maxItems=2048),
                _IDS,
                _list(_IDS, minItems=1, maxItems=2048),
            ]
        },
        "encoding_format": {"enum": ["float", "base64"]},
        "dimensions": {"type": "integer", "minimum": 1},
        "pooling": _POOLING,
        "options": _OPTIONS,
        "user": TEXT,
    },
    "model",
    "input",
)
_NUMBERS = _list({"type": "number"})
_SCORE = _obj({"id": {"type": "integer"}, "score": {"type": "number"}}, "id", "score")
EMBEDDING_INPUT: Schema = {"oneOf": [_EMBED, _RERANK]}
EMBEDDING_OUTPUT: Schema = {
    "oneOf": [
        _obj(
            {
                "shape": _list({"type": "integer"}),
                "data": _list(_NUMBERS),
                "pooling": _POOLING,
            },
            "shape",
            "data",
        ),
        _obj({"response": _list(_SCORE)}, "response"),
    ]
}

_BY_TASK: Mapping[str, tuple[Schema, Schema]] = {
    "text-generation": (GENERATION_INPUT, GENERATION_OUTPUT),
    "text-embeddings": (EMBEDDING_INPUT, EMBEDDING_OUTPUT),
}


def schemas(task: str) -> dict[str, Schema]:
    taken, given = _BY_TASK[task]
    return {"input": taken, "output": given}
