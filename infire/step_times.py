"""What steps of so many tokens take, as they took lately: whether drafts pay. No clock, no plan.

On a GPU, and on a CPU that reads weights for one row, a few tokens more cost next to nothing; on a
CPU that multiplies eight rows, each costs an eighth. So it is measured, not assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

# Before it is known: a tenth of a step of one token for each further one.
_ASSUMED = 0.1
# Other work on the machine makes steps longer, nothing makes them shorter.
_FASTER_WEIGHT, _SLOWER_WEIGHT = 0.5, 0.05
_LONGEST = 2.0  # times what is known, for which a longer step is taken
_LEAST_SEEN = 3  # steps of a size before it is known
_FORGOTTEN = 512  # steps after which a size is not known any more: the rest has changed


@dataclass(slots=True)
class _Size:
    seconds: float
    num_seen: int = 0
    last: int = 0  # step


class StepTimes:
    """Steps that compute one token, and drafts, of each of their rows."""

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}
        self._num_steps = 0

    def learn(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        self._num_steps += 1
        size = self._sizes.get(num_tokens)
        if size is None or self._num_steps - size.last > _FORGOTTEN:
            size = self._sizes[num_tokens] = _Size(seconds)
        weight = _FASTER_WEIGHT if seconds < size.seconds else _SLOWER_WEIGHT
        seconds = min(seconds, _LONGEST * size.seconds)
        size.seconds += weight * (seconds - size.seconds)
        size.num_seen += 1
        size.last = self._num_steps

    def price(self, num_rows: int, num_drafts: int) -> float:
        """Of each draft, in tokens that a step without drafts makes in the time."""
        without = self._seconds(num_rows)
        return (self._seconds(num_rows + num_drafts) / without - 1) / num_drafts * num_rows

    def _seconds(self, num_tokens: int) -> float:
        """Measured, or as it is assumed from the nearest size that was."""
        known = [
            tokens
            for tokens, size in self._sizes.items()
            if size.num_seen >= _LEAST_SEEN and self._num_steps - size.last <= _FORGOTTEN
        ]
        if not known:
            return _assumed(num_tokens)
        nearest = min(known, key=lambda tokens: (abs(tokens - num_tokens), tokens))
        return self._sizes[nearest].seconds * _assumed(num_tokens) / _assumed(nearest)


def _assumed(num_tokens: int) -> float:
    return 1 + _ASSUMED * (num_tokens - 1)
