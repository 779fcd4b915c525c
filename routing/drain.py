"""A process that was told to stop: what it still does, and when it may go.

    SERVING --told--> DRAINING --nothing is left--------------> gone
                         |------grace is over, or told again--> cut --> gone

It takes no new work from the moment it is told, and what it has goes to its end. What is left when
it is cut is ended with a word to whoever waits for it. Knows no signal, no clock and no socket: see
`serving`. What counts as work says the app.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import anyio

from routing.errors import Code, Failure

GRACE_S = 30.0
# Also with nothing to do: what is on its way here is refused by name, and does not find nobody.
LINGER_S = 0.2
RETRY_AFTER_S = 1.0


class Drain:
    """Asked by an app whether it takes work, and by its server whether it is done."""

    def __init__(self, grace_s: float = GRACE_S) -> None:
        self.grace_s = grace_s
        self.begun = False
        self.was_cut = False
        self.num_left: Callable[[], int] = lambda: 0  # set by the app: requests it still has
        self.listeners: set[Callable[[], None]] = set()  # called once, when it begins
        self._began = 0.0
        self._scopes: set[anyio.CancelScope] = set()

    def begin(self, now: float) -> None:
        """Told to stop, at `now` on the caller's clock."""
        self.begun, self._began = True, now
        for tell in list(self.listeners):
            tell()

    def is_over(self, now: float, *, unsent: bool) -> bool:
        """Whether to wait no longer. `unsent`: some of what was said is not on its way yet."""
        since = now - self._began
        return since >= self.grace_s or (since >= LINGER_S and not unsent and not self.num_left())

    def cut(self) -> None:
        """End every block of `until_cut`."""
        self.was_cut = True
        for scope in self._scopes:
            scope.cancel()

    @contextmanager
    def until_cut(self) -> Iterator[None]:
        """A block that ends with Failure(DRAINING) when what is left is cut."""
        with anyio.CancelScope() as scope:
            self._scopes.add(scope)
            if self.was_cut:
                scope.cancel()
            try:
                yield
            finally:
                self._scopes.discard(scope)
        if scope.cancelled_caught:
            raise self.refusal()

    def check(self) -> None:
        """Failure(DRAINING) unless new work is taken."""
        if self.begun:
            raise self.refusal()

    def refusal(self) -> Failure:
        detail = "the process that was asked is being stopped, please try again"
        return Failure(Code.DRAINING, detail, retry_after_s=RETRY_AFTER_S)
