"""What a model says, as it comes: thoughts, text, and calls of tools in its family's own form.

Pure; knows no tokens and no API. What is no call comes out as text, word for word: a mark that
nothing follows, a tool that was not offered, JSON that is not a call's. What looks like a call is
held back only until its name is known and its arguments begin; from there on it is one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import msgspec

from edge.ask import Reasoning, Said, Text, Tool, ToolArguments, ToolAsk, ToolEnd, ToolStart
from edge.cursor import Cursor, Marks, Reading
from edge.json_scan import JsonScan
from edge.thinking import Thinking
from edge.tool_families import HIDDEN, Family, call_id, name_of, spelled
from edge.tool_tagged import literal, quoted, read_as

MOST_HEAD = 200  # characters of a name and what is around it
SPACE = " \t\r\n"
_MOST_SPACE = 1000  # characters that are held back; a model that says more says nothing else
_ARGUMENTS = ("arguments", "parameters")


class Reader:
    """One answer. `push` its text in any pieces, then `finish`."""

    def __init__(
        self,
        *,
        request_id: str,
        tools: ToolAsk,
        family: Family | None = None,
        thinking: Thinking | None = None,
        thinks: bool = False,
        hidden: Collection[str] = (),
    ) -> None:
        """`family`: None, and nothing is a call. `thinks`: the prompt has begun its thoughts.

        `hidden`: the special tokens that come spelled out, with HIDDEN in front; they are no text.
        """
        self.num_calls = 0
        self.thinking = thinks  # thoughts have begun, and not ended
        self.full = False  # has as many calls as it may have: what comes is not wanted
        self._request_id = request_id
        self._tools = tools
        self._hidden = hidden
        self._strays = [HIDDEN + name for name in hidden]
        self._row = family.map(self._spell) if family else None
        self._thinking = thinking.map(self._spell) if thinking else None
        self._thinks = thinks
        self._cursor = Cursor()
        self._said: list[Said] = []
        self._blank = True  # nothing but space since the beginning, or since a call
        self._space = ""  # that is not told until something follows
        self._run = self._answer()
        next(self._run, None)

    @property
    def can_think(self) -> bool:
        """Whether the model has a way to tell its thoughts from its answer."""
        return self._thinking is not None

    def push(self, text: str) -> list[Said]:
        """What this adds to the answer."""
        self._cursor.text += text
        next(self._run, None)
        said, self._said = self._said, []
        return said

    def finish(self) -> list[Said]:
        """What was held back: nothing more comes."""
        self._cursor.final = True
        said = self.push("")
        if self._space and self._blank and not self.num_calls and not self._thinks:
            said.append(Text(text=self._space))
        return said

    def _spell(self, mark: str) -> str:
        return spelled(mark, self._hidden)

    # What is told

    def _tell(self, text: str) -> None:
        if self._blank:
            text = self._space + text
            held = len(text) <= _MOST_SPACE and not text.strip(SPACE)
            self._space = text if held else ""
            self._blank = bool(self._space) or not text
            text = "" if self._blank else text
        self._add(Text, text)

    def _think(self, thought: str) -> None:
        """Space around thoughts is not theirs."""
        thought = self._space + thought
        if self._blank:
            thought = thought.lstrip(SPACE)
        told = thought.rstrip(SPACE) if len(self._space) <= _MOST_SPACE else thought
        self._space = thought[len(told) :]
        self._blank = self._blank and not told
        self._add(Reasoning, told)

    def _argue(self, text: str) -> None:
        if text:
            self._said.append(ToolArguments(index=self.num_calls - 1, text=text))

    def _add(self, kind: type[Text] | type[Reasoning], text: str) -> None:
        if text:
            self._said.append(kind(text=text))

    def _start(self, tool: Tool) -> None:
        index = self.num_calls
        self.num_calls += 1
        start = ToolStart(index=index, id=call_id(self._request_id, index), name=tool.name)
        self._said.append(start)
        self._space, self._blank = "", True
        self._cursor.drop()

    def _end(self) -> None:
        self._said.append(ToolEnd(index=self.num_calls - 1))

    # What is read

    def _answer(self) -> Reading[None]:
        yield from self._thoughts()
        if self._row is not None and self._row.bare and (yield from self._cursor.lead("{")):
            yield from self._attempt("{", self._row, self._bare)
        while not self.full:
            marks = Marks([self._row.first if self._row else "", *self._strays])
            mark = yield from self._cursor.say(marks, self._tell)
            if mark is None:
                return
            self._cursor.at += len(mark)
            if self._row is not None and mark == self._row.first:
                yield from self._attempt(mark, self._row, self._opened)

    def _thoughts(self) -> Reading[None]:
        row, cursor = self._thinking, self._cursor
        if row is None or not (self._thinks or (yield from cursor.lead(row.open))):
            self._thinks = False
            return
        self._thinks = self.thinking = True
        marks = Marks([row.close, *self._strays])
        while (mark := (yield from cursor.say(marks, self._think))) is not None:
            cursor.at += len(mark)
            if mark == row.close:
                self.thinking = False
                yield from self._pass_space()
                self._space, self._blank, self._thinks = "", True, False
                return
        cursor.drop()

    def _pass_space(self) -> Reading[None]:
        cursor = self._cursor
        while not cursor.text[cursor.at :].strip(SPACE):
            cursor.at = len(cursor.text)
            if not (yield from cursor.more()):
                return
        cursor.at = len(cursor.text) - len(cursor.text[cursor.at :].lstrip(SPACE))

    def _attempt(
        self, mark: str, row: Family, read: Callable[[Family], Reading[bool]]
    ) -> Reading[None]:
        """Calls from here on, where `mark` was passed; else it is text, if it is any."""
        self._cursor.at -= len(mark)
        begin = self._cursor.text[: self._cursor.at]
        self._cursor.drop()
        if (yield from read(row)):
            yield from self._further(row)
            return
        self._cursor.at = len(mark)
        self._tell(begin if mark in self._strays else begin + mark)

    def _bare(self, row: Family) -> Reading[bool]:
        return self._call(row)

    def _opened(self, row: Family) -> Reading[bool]:
        if not (yield from self._cursor.sequence(row.begin, row.open)):
            return False
        return (yield from self._call(row))

    def _further(self, row: Family) -> Reading[None]:
        """More calls right behind one."""
        cursor = self._cursor
        while not self.full:
            cursor.drop()
            mark = yield from cursor.lead(row.next, row.end)
            if mark is None or mark == row.end:
                return
            if not (yield from self._call(row)):
                cursor.at = 0
                return

    def _call(self, row: Family) -> Reading[bool]:
        """One call, from behind what opens it; False, and nothing told, if it is none."""
        match row.form:
            case "object":
                told = yield from self._object(row)
            case "headed" | "channels":
                told = yield from self._headed(row)
            case "tagged":
                told = yield from self._tagged(row)
        if told:
            self.full = self._tools.most is not None and self.num_calls >= self._tools.most
        return told

    def _headed(self, row: Family) -> Reading[bool]:
        tool = yield from self._head(row)
        if tool is None or not (yield from self._cursor.lead("{")):
            return False
        self._cursor.at -= 1
        self._start(tool)
        yield from self._arguments(row)
        yield from self._close(row)
        return True

    def _head(self, row: Family) -> Reading[Tool | None]:
        if not (yield from self._cursor.sequence(row.head)):
            return None
        yield from self._pass_space()
        if row.neck.strip():
            head = yield from self._cursor.until(row.neck, MOST_HEAD)
        else:  # which some of the family leave out
            ends = Marks([row.neck, row.key, row.close])
            head = yield from self._cursor.before(ends, MOST_HEAD)
        return None if head is None else self._tools.find(name_of(row, head))

    def _object(self, row: Family) -> Reading[bool]:
        """{"name": ..., "arguments": {...}}, the members in any order, others among them."""
        cursor, tool, arguments = self._cursor, None, None
        sep = "," if (yield from cursor.lead("{")) else None
        while sep == ",":
            key = yield from self._key()
            if key in _ARGUMENTS and tool is not None and (yield from cursor.lead("{")):
                cursor.at -= 1
                self._start(tool)
                if (yield from self._arguments(row)):
                    yield from self._rest()
                yield from self._close(row)
                return True
            value = None if key is None else (yield from cursor.value())
            if value is None:
                return False
            if key == "name" and (tool := self._named(value)) is None:
                return False
            arguments = value if key in _ARGUMENTS else arguments
            sep = yield from cursor.lead(",", "}")
        whole = _object_in(arguments)
        if sep is None or tool is None or whole is None:
            return False
        self._start(tool)
        self._argue(whole)
        self._end()
        yield from self._close(row)
        return True

    def _key(self) -> Reading[str | None]:
        """A member's name, and the colon behind it."""
        if not (yield from self._cursor.lead('"')):
            return None
        self._cursor.at -= 1
        key = yield from self._cursor.value()
        if key is None or not (yield from self._cursor.lead(":")):
            return None
        return str(_decoded(key))

    def _named(self, value: str) -> Tool | None:
        name = _decoded(value)
        return self._tools.find(name) if isinstance(name, str) else None

    def _rest(self) -> Reading[None]:
        """The members behind the arguments, and the end of the object."""
        while (yield from self._cursor.lead(",", "}")) == ",":
            if (yield from self._key()) is None or (yield from self._cursor.value()) is None:
                return

    def _arguments(self, row: Family) -> Reading[bool]:
        """JSON, told as it comes; whether it was whole. What breaks it is told, too."""
        cursor, scan, more = self._cursor, JsonScan(), True
        while more and not (scan.done or scan.broken):
            text, cursor.at = scan.push(cursor.text, cursor.at)
            self._argue(text)
            cursor.drop()
            more = scan.done or scan.broken or (yield from cursor.more())
        if scan.done:
            self._end()
        if scan.broken:
            yield from self._remains(row)
        return scan.done

    def _remains(self, row: Family) -> Reading[None]:
        """Of arguments that are no JSON: up to where they should end."""
        cursor = self._cursor
        ends = [row.tail, row.close, row.end, *([] if row.close else [row.open])]
        marks = Marks([*ends, *self._strays])
        while (mark := (yield from cursor.say(marks, self._argue))) is not None:
            if mark in ends:
                return
            cursor.at += len(mark)

    def _tagged(self, row: Family) -> Reading[bool]:
        tool = yield from self._head(row)
        if tool is None:
            return False
        self._start(tool)
        cursor, made = self._cursor, "{"
        mark = yield from cursor.lead(row.key, row.tail or row.close)
        while mark == row.key:
            key = yield from cursor.until(row.key_end, MOST_HEAD)
            if key is None or not (yield from cursor.sequence(row.value)):
                return True
            self._argue(f'{made}"{quoted(key.strip())}": ')
            if not (yield from self._parameter(row, read_as(tool.parameters, key.strip()))):
                return True
            made = ", "
            mark = yield from cursor.lead(row.key, row.tail or row.close)
        if mark is not None:
            self._argue("{}" if made == "{" else "}")
            self._end()
            yield from cursor.sequence(row.tail and row.close)
        return True

    def _parameter(self, row: Family, kinds: frozenset[str]) -> Reading[bool]:
        """A parameter's text as a value of JSON; whether its end was there."""
        held: list[str] = []
        if kinds != {"string"}:
            mark = yield from self._tag_text(row, held.append)
            self._argue(literal("".join(held), kinds))
            return mark
        self._argue('"')
        mark = yield from self._tag_text(row, lambda text: self._argue(quoted(text)))
        self._argue('"' if mark else "")
        return mark

    def _tag_text(self, row: Family, tell: Callable[[str], None]) -> Reading[bool]:
        """The text up to `value_end`, line breaks around it left out where it has its own lines."""
        cursor, ends = self._cursor, [row.value_end]
        if not row.value:
            ends.append("\n" + row.value_end)
            while cursor.at == len(cursor.text) and (yield from cursor.more()):
                pass
            cursor.at += cursor.text.startswith("\n", cursor.at)
        marks = Marks([*ends, *self._strays])
        while (mark := (yield from cursor.say(marks, tell))) is not None:
            cursor.at += len(mark)
            if mark in ends:
                return True
        return False

    def _close(self, row: Family) -> Reading[None]:
        yield from self._cursor.lead(row.tail.strip(SPACE))
        yield from self._cursor.lead(row.close)


def _object_in(arguments: str | None) -> str | None:
    """The JSON of an object: as it is, or out of a string of JSON; {} where there is none."""
    value = {} if arguments is None else _decoded(arguments)
    if isinstance(value, str):
        arguments, value = value, _decoded(value)
    return (arguments or "{}") if isinstance(value, dict) else None


def _decoded(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return None
