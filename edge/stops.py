"""Cut text at a stop string, holding back what might still become one. Pure; knows no tokens."""

from __future__ import annotations

from collections import deque


class StopText:
    """Text passes through until a stop string is complete; what comes after it never shows.

    The stop that is complete first counts, the longest of those complete at the same character;
    so what shows does not depend on how the text was split into pushes. One look a character,
    whatever the stops (Aho and Corasick, 1975).
    """

    __slots__ = ("_depths", "_ends", "_falls", "_firsts", "_held", "_moves", "_state", "hit")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.hit = ""  # the stop string that is complete
        self._held = ""  # pushed and not shown: the start of a stop, as far as one can tell
        self._state = 0
        self._moves: list[dict[str, int]] = [{}]  # state -> character -> state
        self._depths = [0]  # state -> characters matched so far
        self._falls = [0]  # state -> the next shorter end of its text that begins a stop
        self._ends = [0]  # state -> length of the longest stop that is complete there, or 0
        for stop in stops:
            self._add(stop)
        self._link()
        self._firsts = frozenset(self._moves[0])

    def push(self, text: str) -> str:
        """What is now safe to show. Nothing is, once `hit`."""
        if self.hit:
            return ""
        if not self._state and self._firsts.isdisjoint(text):
            return text  # nothing held, nothing begins
        held = self._held + text
        for at, character in enumerate(text, start=len(self._held) + 1):
            state = self._state = self._next(self._state, character)
            if length := self._ends[state]:
                self.hit = held[at - length : at]
                self._held = ""
                return held[: at - length]
        shown = len(held) - self._depths[self._state]
        self._held = held[shown:]
        return held[:shown]

    def finish(self) -> str:
        """What was held back, when the text ended without a stop. More would be another text."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _next(self, state: int, character: str) -> int:
        while state and character not in self._moves[state]:
            state = self._falls[state]
        return self._moves[state].get(character, 0)

    def _add(self, stop: str) -> None:
        state = 0
        for depth, character in enumerate(stop, start=1):
            if character not in self._moves[state]:
                self._moves[state][character] = len(self._moves)
                self._moves.append({})
                self._depths.append(depth)
                self._falls.append(0)
                self._ends.append(0)
            state = self._moves[state][character]
        self._ends[state] = len(stop)

    def _link(self) -> None:
        """Shorter states first, for the links of longer ones are found by following theirs."""
        waiting = deque(self._moves[0].values())
        while waiting:
            state = waiting.popleft()
            self._ends[state] = self._ends[state] or self._ends[self._falls[state]]
            for character, child in self._moves[state].items():
                self._falls[child] = self._next(self._falls[state], character)
                waiting.append(child)
