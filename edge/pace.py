"""How soon to ask again what had no room: soon at first, then later and later. Pure."""

from __future__ import annotations

FIRST_S = 0.25
LAST_S = 15.0


class Pace:
    """Of one who asks for much that nobody waits for. Times are on the caller's clock."""

    def __init__(self) -> None:
        self._pause_s = self._wait_s = 0.0
        self._until = float("-inf")

    def wait_s(self, now: float) -> float:
        """Until the next may be asked."""
        return max(0.0, self._until - now)

    @property
    def slowest(self) -> bool:
        """Whether it is asked as seldom as ever."""
        return self._wait_s >= LAST_S

    def busy(self, now: float, retry_after_s: float | None) -> None:
        """There was no room. Several who are told so at once count as one."""
        if now >= self._until:
            self._pause_s = min(LAST_S, max(2 * self._pause_s, FIRST_S))
            self._wait_s = min(LAST_S, max(self._pause_s, retry_after_s or 0.0))
            self._until = now + self._wait_s

    def fine(self) -> None:
        self._pause_s = self._wait_s = 0.0
