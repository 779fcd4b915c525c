"""What is done once for all that arrives together, such as sending on what a frame brought.

Knows nothing of what arrives. To wait for the loop's next turn would do as well, and cost more: at
one token a step, a good part of what a process does for it.
"""

from __future__ import annotations

import asyncio  # noqa: TID251  `call_soon`
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

Act = Callable[[], None]


class _Here(threading.local):
    acts: list[Act] | None = None  # None: nothing is being handed out


_here = _Here()


def hand_out(hear: Callable[[T], None], arrived: T) -> None:
    """Call `hear`, then what was left to `afterwards` meanwhile."""
    acts: list[Act] = []
    _here.acts = acts
    try:
        hear(arrived)
    finally:
        _here.acts = None
        for act in acts:
            act()


def afterwards(act: Act) -> None:
    """Call `act` when what has arrived is handed out; if that is not now, in the loop's next turn.

    It must not raise.
    """
    if _here.acts is None:
        asyncio.get_running_loop().call_soon(act)
    else:
        _here.acts.append(act)
