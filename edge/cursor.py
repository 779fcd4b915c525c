"""A text that is still coming, read as if it were whole: who wants more waits for it.

Readers are generators over one `Cursor`: they yield where more text is needed, so what they make
of a text does not depend on how it was cut. Pure; knows no form of anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Generator
from typing import TypeVar

from edge.json_scan import JsonScan

_T = TypeVar("_T")
Reading = Generator[None, None, _T]  # yields to have more text; returns what it found
_SPACE = " \t\r\n"


class Cursor:
    """`text[at:]` is not read yet. `final`: no more will come."""

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.final = False

    def drop(self) -> None:
        """Forget what was read: nobody goes back to it."""
        self.text = self.text[self.at :]
        self.at = 0

    def more(self) -> Reading[bool]:
        """Wait for more text; whether it makes sense to look again."""
        if self.final:
            return False
        yield
        return True

    def lead(self, *options: str) -> Reading[str | None]:
        """Pass space and the first of `options` that follows it; None, and nothing passed, if none.

        No option begins with space, and none begins another. Empty ones are left out.
        """
        while True:
            rest = self.text[self.at :].lstrip(_SPACE)
            for option in filter(None, options):
                if rest.startswith(option):
                    self.at = len(self.text) - len(rest) + len(option)
                    return option
            if not any(option.startswith(rest) for option in filter(None, options)):
                return None
            if not (yield from self.more()):
                return None

    def sequence(self, *marks: str) -> Reading[bool]:
        """Pass all of them in order, space between; empty ones are left out."""
        for mark in filter(None, marks):
            if (yield from self.lead(mark)) is None:
                return False
        return True

    def until(self, mark: str, most: int) -> Reading[str | None]:
        """Pass up to the end of `mark`; what was before it. None where that is over `most` long."""
        while True:
            found = self.text.find(mark, self.at)
            if 0 <= found <= self.at + most:
                before = self.text[self.at : found]
                self.at = found + len(mark)
                return before
            if found >= 0 or len(self.text) - self.at > most + len(mark):
                return None
            if not (yield from self.more()):
                return None

    def before(self, marks: Marks, most: int) -> Reading[str | None]:
        """Pass what comes before the first of `marks`; None where that is over `most` long."""
        while True:
            found = marks.search(self.text, self.at)
            length = (found.start() if found else len(self.text)) - self.at
            if found and length <= most:
                begin, self.at = self.at, found.start()
                return self.text[begin : self.at]
            if found or length > most + marks.longest:
                return None
            if not (yield from self.more()):
                return None

    def value(self) -> Reading[str | None]:
        """Pass one value of JSON; None where there is none, or it breaks."""
        scan, made, at = JsonScan(), "", self.at
        while True:
            text, at = scan.push(self.text, at)
            made += text
            if scan.done:
                self.at = at
                return made.strip(_SPACE)
            if scan.broken or not (yield from self.more()):
                return None

    def say(self, marks: Marks, tell: Callable[[str], None]) -> Reading[str | None]:
        """Tell what comes before the first of `marks`, which is not passed; None: to the end.

        No more is held back than might be the beginning of a mark.
        """
        while True:
            self.drop()
            if found := marks.search(self.text):
                tell(self.text[: found.start()])
                self.at = found.start()
                self.drop()
                return found[0]
            held = 0 if self.final else marks.held(self.text)
            self.at = len(self.text) - held
            tell(self.text[: self.at])
            if not (yield from self.more()):
                return None


class Marks:
    """Several texts to be found in another."""

    def __init__(self, marks: Collection[str]) -> None:
        self._marks = tuple(sorted({*marks} - {""}, key=len, reverse=True))
        self._firsts = frozenset(mark[0] for mark in self._marks)
        self.longest = max(map(len, self._marks), default=1)
        pattern = "|".join(map(re.escape, self._marks)) or "(?!)"
        self.search = re.compile(pattern).search

    def held(self, text: str) -> int:
        """How many characters at the end of a text may be the beginning of a mark."""
        tail = text[1 - self.longest :] if self.longest > 1 else ""
        if self._firsts.isdisjoint(tail):
            return 0
        for at in range(len(tail)):
            if any(mark.startswith(tail[at:]) for mark in self._marks):
                return len(tail) - at
        return 0
