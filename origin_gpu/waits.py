"""How long a request would wait for its first token here, learned from those before it.

Counting those who wait is not enough: 200 short prompts are through in a moment, 10 long ones on a
slow worker are not. So a line is bounded by the time that it is expected to take. Pure: its clock
is passed in, and it knows no worker.
"""

from __future__ import annotations

from collections import Counter

from routing.errors import Code, Failure

MAX_WAIT_S = 10.0  # that anybody is let in for, however long answers take
# Who waits for a row is promised a part of what an answer takes, or a moment: then waiting does not
# change what asking feels like. A crowd that comes at once may wait longer than one that does not
# end: there, whoever is let in would find as many before him as are bearable.
SHARE_OF_ANSWER, LEAST_WAIT_S = 0.5, 1.0
SHARE_IN_CROWD, LEAST_IN_CROWD_S = 0.25, 0.25
CROWD_S = 2.0  # for which somebody has waited
CALM_S = 5.0  # without a refusal
KEPT = 0.9  # of what is known, at each start: about the last ten count
_LEAST_RETRY_S = 1.0


class Line:
    """The requests for one model that have no first token yet, and how fast they got theirs.

    Times are seconds of one monotonic clock. What has to be awaited is learned only while somebody
    waits: how seldom requests come says nothing of how many could.
    """

    def __init__(self, max_wait_s: float = MAX_WAIT_S) -> None:
        """`max_wait_s` of 0: nobody is refused."""
        self._max_wait_s = max_wait_s
        self._waiting: Counter[int] = Counter()  # by priority
        self._since = 0.0  # the last start, or when somebody began to wait
        self._waited_since = 0.0  # when somebody began to wait, and since then always somebody has
        self._refused_at = float("-inf")
        self._is_new = True  # nobody ever started: the first may have waited for a compiler
        self._starts = 0.0  # both fade, by KEPT
        self._busy_s = 0.0
        self._answer_s = 0.0  # from its first token to its last

    @property
    def num_waiting(self) -> int:
        return self._waiting.total()

    def enter(self, priority: int, now: float, *, idle: bool = False, begun: bool = False) -> Turn:
        """A place in the line. Failure(NO_CAPACITY) where that would be for too long.

        With `idle` rows it waits for prompts only, which are computed together. One that has
        `begun` elsewhere is let in: its client has a part of the answer already.
        """
        if not begun and (failure := self._refusal(priority, now, self.bound_s(now, idle=idle))):
            raise failure
        if not self.num_waiting:
            self._since = self._waited_since = now
        self._waiting[priority] += 1
        return Turn(self, priority)

    def expected_s(self, priority: int, now: float) -> float:
        """What one that comes now would wait; 0 as long as nothing is known."""
        ahead = sum(n for other, n in self._waiting.items() if other >= priority)
        if not ahead or not self._starts:
            return 0.0
        so_far_s = now - self._since  # the gap that is still open
        faded = (KEPT * self._busy_s + so_far_s) / (KEPT * self._starts + 1)
        return ahead * max(self._busy_s / self._starts, faded)

    def room(self, now: float, *, idle: bool = False) -> int | None:
        """How many more of priority 0 would be let in at once; None: there is no bound."""
        expected_s = self.expected_s(0, now)
        if not self._max_wait_s or not expected_s:
            return None
        ahead = sum(n for other, n in self._waiting.items() if other >= 0)
        return max(0, 1 + int(self.bound_s(now, idle=idle) * ahead / expected_s) - ahead)

    def bound_s(self, now: float, *, idle: bool = False) -> float:
        """The longest wait that anybody is let in for."""
        if idle:
            return self._max_wait_s
        share, least_s = SHARE_OF_ANSWER, LEAST_WAIT_S
        waited_s = now - self._waited_since if self.num_waiting else 0.0
        if waited_s > CROWD_S or now - self._refused_at < CALM_S:
            share, least_s = SHARE_IN_CROWD, LEAST_IN_CROWD_S
        return min(self._max_wait_s, max(least_s, share * self._answer_s))

    def answered(self, answer_s: float) -> None:
        """One came to its end, so long after its first token."""
        self._answer_s += (1 - KEPT) * (answer_s - self._answer_s)

    def left(self, priority: int) -> None:
        self._waiting[priority] -= 1
        if not self._waiting[priority]:
            del self._waiting[priority]

    def started(self, priority: int, now: float) -> None:
        self.left(priority)
        if not self._is_new:
            self._busy_s = KEPT * self._busy_s + now - self._since
            self._starts = KEPT * self._starts + 1
        self._since = now
        self._is_new = False

    def _refusal(self, priority: int, now: float, bound_s: float) -> Failure | None:
        """Who would wait too long; and work for idle times, where anybody else waits."""
        if not self._max_wait_s:
            return None
        if priority < 0 and any(other > priority for other in self._waiting):
            detail = f"requests of a priority over {priority} wait"
            return Failure(Code.NO_CAPACITY, detail, retry_after_s=_LEAST_RETRY_S)
        expected_s = self.expected_s(priority, now)
        if expected_s <= bound_s:
            return None
        self._refused_at = now
        detail = f"{expected_s:.1f} s to wait, of {bound_s:.1f} s at most"
        retry_s = max(_LEAST_RETRY_S, expected_s - bound_s)
        return Failure(Code.NO_CAPACITY, detail, retry_after_s=retry_s)


class Turn:
    """One request's place in a line, until its first token, or until it leaves."""

    def __init__(self, line: Line, priority: int) -> None:
        self._line: Line | None = line
        self._priority = priority

    def start(self, now: float) -> None:
        """Its first token is there. Doing it twice, or after leaving, is doing it once."""
        if self._line is not None:
            self._line.started(self._priority, now)
            self._line = None

    def leave(self) -> None:
        if self._line is not None:
            self._line.left(self._priority)
            self._line = None
