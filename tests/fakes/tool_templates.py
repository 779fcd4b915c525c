"""Chat templates of the families that call tools, each as short as its form allows.

The forms are those of the published templates: how tools are shown, how a call is written, how what
came of it comes back. `SPECIAL` are the tokens of each that no text can spell.
"""

from __future__ import annotations

_TURNS = (
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls %}CALL{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
)
_OBJECT = (
    '\n<tool_call>\n{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
)
_SYSTEM = (
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}\n{{ tool | tojson }}"
    "{% endfor %}\n</tools><|im_end|>\n{% endif %}"
)
_CHATML = _SYSTEM + _TURNS.replace("CALL", _OBJECT)
HERMES = _CHATML + "<|im_start|>assistant\n"
QWEN3 = (
    _SYSTEM
    + _TURNS.replace(
        "{{ m.content }}{%",
        "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
        "{{ m.content }}{%",
    ).replace("CALL", _OBJECT)
    + "<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
# The prompt begins the thoughts.
QWEN3_THINKING = HERMES + "<think>\n"
QWEN3_CODER = (
    _SYSTEM
    + _TURNS.replace(
        "CALL",
        "\n<tool_call>\n<function={{ call.function.name }}>\n"
        "{% for name, value in call.function.arguments.items() %}"
        "<parameter={{ name }}>\n{{ value if value is string else value | tojson }}\n</parameter>\n"
        "{% endfor %}</function>\n</tool_call>",
    )
    + "<|im_start|>assistant\n"
)
GLM = (
    "{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}<|observation|><tool_response>{{ m.content }}</tool_response>"
    "{% else %}<|{{ m.role }}|>\n{{ m.content }}{% for call in m.tool_calls %}"
    "\n<tool_call>{{ call.function.name }}\n"
    "{% for name, value in call.function.arguments.items() %}<arg_key>{{ name }}</arg_key>\n"
    "<arg_value>{{ value if value is string else value | tojson }}</arg_value>\n{% endfor %}"
    "</tool_call>{% endfor %}{% endif %}{% endfor %}<|assistant|>"
)
LLAMA3 = (
    "{% if tools %}<|start_header_id|>system<|end_header_id|>\n\nRespond with JSON: "
    '{"name": function, "parameters": {}}{% for tool in tools %}{{ tool | tojson(indent=4) }}'
    "{% endfor %}<|eot_id|>{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "<|start_header_id|>ipython<|end_header_id|>\n\n"
    "{{ m.content | tojson }}<|eot_id|>{% else %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{% if m.tool_calls %}"
    "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at once') }}{% endif %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ m.content }}{% endif %}<|eot_id|>{% endif %}{% endfor %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


def _wide(text: str) -> str:
    """DeepSeek's bars and spaces."""
    return text.replace("<|", "<\uff5c").replace("|>", "\uff5c>").replace("_", "\u2581")


_DEEPSEEK = (
    "{% if tools %}TOOLS{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}USER{{ m.content }}"
    "{% elif m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'tool' %}OUTPUT{{ m.content }}"
    "{% else %}ASSISTANT{{ m.content }}{% if m.tool_calls %}CALLS"
    "{% for call in m.tool_calls %}ONE{% endfor %}DONE{% endif %}{% endif %}{% endfor %}ASSISTANT"
)


def _deepseek(one: str) -> str:
    marks = {
        "USER": "<|User|>",
        "ASSISTANT": "<|Assistant|>",
        "OUTPUT": "<|tool_output_begin|>",
        "CALLS": "<|tool_calls_begin|>",
        "DONE": "<|tool_calls_end|>",
        "ONE": one,
    }
    text = _DEEPSEEK
    for name, mark in marks.items():
        text = text.replace(name, mark if name == "ONE" else _wide(mark))
    return text


# Arguments are joined to text: they have to be one.
DEEPSEEK_V3 = _deepseek(
    "{{ '" + _wide("<|tool_call_begin|>function<|tool_sep|>") + "' + call.function.name"
    " + '\n```json\n' + call.function.arguments + '\n```" + _wide("<|tool_call_end|>") + "' }}"
)
DEEPSEEK_V31 = _deepseek(
    _wide("<|tool_call_begin|>") + "{{ call.function.name }}" + _wide("<|tool_sep|>")
    + "{{ call.function.arguments | tojson }}" + _wide("<|tool_call_end|>")
)  # fmt: skip
KIMI_K2 = (
    "{% if tools %}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{% endif %}"
    "{% for m in messages %}<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>"
    "{% if m.role == 'tool' %}## Return of {{ m.tool_call_id }}\n{% endif %}{{ m.content }}"
    "{% if m.tool_calls %}<|tool_calls_section_begin|>{% for call in m.tool_calls %}"
    "<|tool_call_begin|>{{ call.id }}<|tool_call_argument_begin|>"
    "{{ call.function.arguments | tojson }}<|tool_call_end|>{% endfor %}"
    "<|tool_calls_section_end|>{% endif %}<|im_end|>{% endfor %}"
    "<|im_assistant|>assistant<|im_middle|>"
)
_NINE = "{% if ID | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}"
_MISTRAL = (
    "<s>{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'system' %}{{ raise_exception('no system message') }}"
    "{% elif m.role == 'tool' %}" + _NINE.replace("ID", "m.tool_call_id")
    + "[TOOL_RESULTS] {{ m.content }}[/TOOL_RESULTS]"
    "{% elif m.tool_calls %}CALLS</s>{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)  # fmt: skip
MISTRAL = _MISTRAL.replace(
    "CALLS",
    "[TOOL_CALLS] [{% for call in m.tool_calls %}" + _NINE.replace("ID", "call.id")
    + '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }},'
    ' "id": "{{ call.id }}"}{{ "" if loop.last else ", " }}{% endfor %}]',
)  # fmt: skip
MISTRAL_ARGS = _MISTRAL.replace(
    "CALLS",
    "{% for call in m.tool_calls %}" + _NINE.replace("ID", "call.id")
    + "[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}"
    "{% endfor %}",
)  # fmt: skip

HARMONY = (
    "<|start|>system<|message|>You are.<|end|>"
    "{% if tools %}<|start|>developer<|message|># Tools{% for tool in tools %}"
    "type {{ tool.function.name }} = (_: {{ tool.function.parameters | tojson }}) => any;"
    "{% endfor %}<|end|>{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}<|start|>functions to=assistant<|channel|>commentary<|message|>"
    "{{ m.content | tojson }}<|end|>{% elif m.tool_calls %}{% if m.thinking %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>commentary to=functions.{{ m.tool_calls[0].function.name }} "
    "<|constrain|>json<|message|>{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "<|start|>assistant"
)
HARMONY_SPECIAL = tuple(
    f"<|{name}|>" for name in ("start", "end", "message", "channel", "constrain", "return", "call")
)

TEMPLATES = {
    "hermes": HERMES,
    "qwen3_coder": QWEN3_CODER,
    "glm": GLM,
    "llama3": LLAMA3,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v31": DEEPSEEK_V31,
    "kimi_k2": KIMI_K2,
    "mistral": MISTRAL,
    "mistral_args": MISTRAL_ARGS,
}
_DEEPSEEKS = tuple(
    _wide(f"<|tool_{name}|>")
    for name in ("calls_begin", "call_begin", "call_end", "calls_end", "sep")
)
_KIMIS = (
    "calls_section_begin",
    "call_begin",
    "call_end",
    "calls_section_end",
    "call_argument_begin",
)
SPECIAL: dict[str, tuple[str, ...]] = {
    "deepseek_v3": _DEEPSEEKS,
    "deepseek_v31": _DEEPSEEKS,
    "kimi_k2": tuple(f"<|tool_{name}|>" for name in _KIMIS),
    "llama3": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]",),
    "mistral_args": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
}
