"""Answers of gpt-oss, in its harmony format: messages, each in a channel that its head names.

Thoughts are in `analysis`, text in `final` and `commentary`, and a call is a message to a function.
https://github.com/openai/harmony. Pure; knows no tokens and no API.
"""

from __future__ import annotations

import re

from edge.ask import Tool
from edge.cursor import Marks, Reading
from edge.reader import MOST_HEAD, Reader
from edge.tool_families import Family

_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>")  # of a message


class ChannelReader(Reader):
    """As `Reader`, of a row whose form is channels."""

    @property
    def can_think(self) -> bool:
        return True

    def _answer(self) -> Reading[None]:
        """Messages one after the other: what is before MESSAGE says of which channel each is."""
        assert self._row is not None
        row, cursor, message = self._row, self._cursor, self._spell("<|message|>")
        opens = [self._spell(mark) for mark in ("<|channel|>", "<|start|>", "to=")]
        while not self.full and (mark := (yield from cursor.lead(*opens))) is not None:
            cursor.at -= len(mark)
            head = yield from cursor.until(message, MOST_HEAD)
            if head is None:
                return
            yield from self._message(row, head)
        yield from self._text()

    def _message(self, row: Family, head: str) -> Reading[None]:
        called = re.search(r"to=functions\.([\w.-]+)", head)
        tool = self._tools.find(called[1]) if called else None
        tell = self._think if "analysis" in head and not called else self._tell
        if tool is not None:
            yield from self._called(row, tool)
        marks = Marks([*map(self._spell, _ENDS), *self._strays])
        self.thinking = tell == self._think
        mark = yield from self._cursor.say(marks, tell)
        self.thinking = False
        if mark not in (self._spell("<|channel|>"), self._spell("<|start|>")):
            self._cursor.at += len(mark or "")
        if tell == self._think:
            self._space, self._blank = "", True

    def _called(self, row: Family, tool: Tool) -> Reading[None]:
        """Its arguments, or none where it ends at once: what stands there instead is text."""
        called = self._spell("<|call|>")
        begin = yield from self._cursor.lead("{", called)
        if begin is None:
            return
        self._cursor.at -= len(begin)
        self._start(tool)
        if begin == called:
            self._argue("{}")
            self._end()
        else:
            yield from self._arguments(row)
        self.full = self._tools.most is not None and self.num_calls >= self._tools.most

    def _text(self) -> Reading[None]:
        """All the rest is text."""
        marks = Marks(self._strays)
        while (mark := (yield from self._cursor.say(marks, self._tell))) is not None:
            self._cursor.at += len(mark)
