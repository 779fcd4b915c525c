"""Follow JSON as it comes, character by character: where it ends, and where it breaks.

Pure; knows no schema. Strict (RFC 8259) but for one thing that models do: a line break or a tab in
a string is written as its escape.
"""

from __future__ import annotations

import re
from typing import Literal

_SPACE = " \t\n\r"
_ESCAPES = frozenset('"\\/bfnrtu')
_HEX = frozenset("0123456789abcdefABCDEF")
_WORD = frozenset("+-.0123456789abcdefghijklmnopqrstuvwxyzEINaNft")
_SCALAR = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null", re.ASCII)
_MOST_WORD = 400  # characters of a number: none that means something is longer
_CONTROL = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}

State = Literal["value", "string", "escape", "hex", "word", "key", "colon", "after", "first"]


class JsonScan:
    """One JSON value. `done` behind it; `broken` where nothing that comes could make it one.

    A number or a name at the top is done when something else follows.
    """

    __slots__ = ("_hex", "_key", "_past", "_stack", "_state", "_word", "broken", "done")

    def __init__(self) -> None:
        self.done = False
        self.broken = False
        self._stack: list[str] = []  # open brackets
        self._state: State = "value"
        self._key = False  # the string is a member's name
        self._hex = 0  # digits of \\u that are still to come
        self._word = ""
        self._past = False  # done one character ago

    def push(self, text: str, at: int) -> tuple[str, int]:
        """What is read of `text` from `at` on, as it is to be passed on, and where that ends."""
        begin, made = at, []
        while at < len(text) and not self.done:
            character = text[at]
            if self._state == "string" and character < " ":
                made.append(text[begin:at] + _CONTROL.get(character, f"\\u{ord(character):04x}"))
                begin = at + 1
            elif not self._take(character):
                self.broken = True
                break
            at += not self._past
        return "".join(made) + text[begin:at], at

    def _take(self, character: str) -> bool:
        """Whether it may follow."""
        match self._state:
            case "string":
                return self._in_string(character)
            case "escape":
                self._state, self._hex = ("hex", 4) if character == "u" else ("string", 0)
                return character in _ESCAPES
            case "hex":
                self._hex -= 1
                self._state = "hex" if self._hex else "string"
                return character in _HEX
            case "word" if character in _WORD and len(self._word) < _MOST_WORD:
                self._word += character
                return True
            case "word":
                if not _SCALAR.fullmatch(self._word):
                    return False
                self._end_value()
                self._past = self.done
                return self._past or self._take(character)
        return character in _SPACE or self._between(character)

    def _in_string(self, character: str) -> bool:
        if character == "\\":
            self._state = "escape"
        elif character == '"' and self._key:
            self._state, self._key = "colon", False
        elif character == '"':
            self._end_value()
        return True

    def _between(self, character: str) -> bool:
        """Outside of strings and words, past space."""
        closing = character in "}]"
        if self._state in {"after", "first"} and closing:
            return self._close(character)
        if self._state == "after":
            return self._next_member(character)
        if self._state == "colon":
            self._state = "value"
            return character == ":"
        if self._state == "key" or (self._state == "first" and self._stack[-1] == "{"):
            self._state, self._key = "string", True
            return character == '"'
        return self._begin_value(character)

    def _begin_value(self, character: str) -> bool:
        if character in "{[":
            self._stack.append(character)
            self._state = "first"
        elif character == '"':
            self._state = "string"
        else:
            self._state, self._word = "word", character
            return character in _WORD
        return True

    def _next_member(self, character: str) -> bool:
        self._state = "key" if self._stack[-1] == "{" else "value"
        return character == ","

    def _close(self, character: str) -> bool:
        if self._stack.pop() + character not in {"{}", "[]"}:
            return False
        self._end_value()
        return True

    def _end_value(self) -> None:
        self._state = "after"
        self.done = not self._stack
