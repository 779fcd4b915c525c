"""Where Responses and Messages are read as chat completions are: tools, and the answer's format.

Both spell them otherwise; here they are put as chat completions have them, and read by the same
functions. A refusal names the field as the client has it. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge import formats, options, thinking, tools
from edge.checks import BadField, Fields
from edge.fallback import models_of


def chosen(like_chat: Fields, theirs: Mapping[str, str]) -> dict[str, Any]:
    """Members of `Ask` that say how the answer is to look.

    `theirs`: parts of pointers into `like_chat`, and what the client's body has in their place.
    """
    try:
        options.refuse_unsupported(like_chat)
        grammar, at = formats.asked(like_chat)
        return {
            "grammar": grammar,
            "grammar_at": _named(at, theirs),
            "tools": tools.tools(like_chat),
            "template_args": thinking.template_args(like_chat),
            "fallbacks": models_of(like_chat)[1:],
            "reject_if_busy": options.rejects_if_busy(like_chat),
        }
    except BadField as bad:
        raise _renamed(bad, theirs) from None


def _renamed(bad: BadField, theirs: Mapping[str, str]) -> BadField:
    bad.pointer, bad.detail = _named(bad.pointer, theirs), _named(bad.detail, theirs)
    return bad


def _named(text: str, theirs: Mapping[str, str]) -> str:
    for ours, name in theirs.items():
        text = text.replace(ours, name)
    return text
