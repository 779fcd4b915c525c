"""Whether a region is worth calling: a circuit breaker. Events and the time in, state out.

A dead region costs each request that tries it a failed call, so after a few failures in a row
nobody tries; after a cool-down one request may, as a probe, and its luck decides. Knows no region
and makes no call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class State(StrEnum):
    CLOSED = "closed"  # calls go through
    OPEN = "open"  # none do, until the cool-down ends
    HALF_OPEN = "half_open"  # one may, as a probe


@dataclass(frozen=True, slots=True, kw_only=True)
class Breaker:
    """What is known of one region's luck. Every event returns the next value."""

    max_failures: int = 3  # in a row, before it opens
    cool_down_s: float = 1.0  # of the first opening; doubles with each failed probe
    max_cool_down_s: float = 30.0

    failures: int = 0  # in a row
    openings: int = 0  # since the last success
    open_until: float | None = None  # on the caller's clock; None: closed
    probing: bool = False  # a probe is out

    def state(self, now: float) -> State:
        if self.open_until is None:
            return State.CLOSED
        return State.OPEN if now < self.open_until else State.HALF_OPEN

    def admits(self, now: float) -> bool:
        """Whether a call may be made now."""
        state = self.state(now)
        return state is State.CLOSED or (state is State.HALF_OPEN and not self.probing)

    def wait_s(self, now: float) -> float:
        """Seconds until the next call may be made; 0 when one may now."""
        return max(0.0, (self.open_until or now) - now)

    def called(self, now: float) -> Breaker:
        """A call that `admits` let through begins."""
        return replace(self, probing=True) if self.state(now) is State.HALF_OPEN else self

    def succeeded(self) -> Breaker:
        return replace(self, failures=0, openings=0, open_until=None, probing=False)

    def failed(self, now: float) -> Breaker:
        failures = self.failures + 1
        state = self.state(now)
        # A call from before it opened that fails late says nothing new.
        if state is State.OPEN or (state is State.CLOSED and failures < self.max_failures):
            return replace(self, failures=failures)
        cool_down_s = min(self.max_cool_down_s, self.cool_down_s * 2.0 ** min(self.openings, 30))
        return replace(
            self,
            failures=failures,
            openings=self.openings + 1,
            open_until=now + cool_down_s,
            probing=False,
        )

    def abandoned(self) -> Breaker:
        """A call ended before it showed anything, as when the client left: another may probe."""
        return replace(self, probing=False)
