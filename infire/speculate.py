"""Guess what a sequence says next from what it has said before. Knows no model and no step.

Prompt lookup: where the last ids of a sequence have occurred earlier in it, what followed there is
proposed as its continuation (LLMA, https://arxiv.org/abs/2304.04487). A proposal that is wrong
changes no answer and costs compute only, so each sequence proposes as much as has paid lately.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq
from math import ceil

# Match lengths. A pair of ids recurs by chance; four in a row are a quotation.
_SHORTEST, _LONGEST = 2, 4
_MOST_PER_MATCHED = 2  # ids proposed for each matched id past the first: 2, 4 or 6
# Earlier places compared, latest first: bounds a look-up in a text that repeats one pair.
_MOST_PLACES = 8

# Of the ids proposed lately, the share that was right, as a moving average over about 5 proposals.
# It begins where a first proposal is half as long as it may be.
_FIRST_SHARE = 0.5
_NEWEST_WEIGHT = 0.2
# Below it a sequence proposes nothing, however little a draft costs (which is for
# `infire.step_times` to know): looking for one costs, too.
_LEAST_SHARE = 0.2
# Then nothing is proposed for so many ids, twice as many after each vain probe. A probe is a
# proposal or two of 1 or 2 ids: at the worst 1 % of the work, for a text that turns repetitive.
_FIRST_PAUSE, _LONGEST_PAUSE = 32, 512
_PROBE_SHARE = 0.22


class PairIndex:
    """Where in a growing text each pair of neighbouring ids has occurred. O(1) an id."""

    def __init__(self) -> None:
        self._latest: dict[int, int] = {}  # pair: the position that followed it last
        # By position: where the same pair as before it occurred earlier, the position after that;
        # 0: nowhere.
        self._earlier = array("i", (0, 0))

    def extend(self, token_ids: Seq[int]) -> None:
        """Take in the pairs that are followed by an id and not known yet; ids only ever grow."""
        latest, earlier = self._latest, self._earlier
        for position in range(len(earlier), len(token_ids)):
            pair = token_ids[position - 2] << 32 | token_ids[position - 1]
            earlier.append(latest.get(pair, 0))
            latest[pair] = position

    def longest_match(self, token_ids: Seq[int]) -> tuple[int, int]:
        """Where the end of `token_ids` has occurred before: the position after it, and its length.

        Of matches equally long, up to `_LONGEST`, the latest. (0, 0) when there is none.
        """
        end = len(token_ids)
        if end < _SHORTEST:
            return 0, 0
        best, best_length = 0, 0
        place = self._latest.get(token_ids[-2] << 32 | token_ids[-1], 0)
        for _ in range(_MOST_PLACES):
            if not place or best_length == _LONGEST:
                break
            length = _SHORTEST
            while (
                length < min(place, _LONGEST)
                and token_ids[place - 1 - length] == token_ids[end - 1 - length]
            ):
                length += 1
            if length > best_length:
                best, best_length = place, length
            place = self._earlier[place]
        return best, best_length


class Drafter:
    """Proposes continuations of one sequence: as long as they have turned out right lately."""

    def __init__(self, max_ids: int) -> None:
        self._max_ids = max_ids
        self._index = PairIndex()
        self._share = _FIRST_SHARE
        self._pause = _FIRST_PAUSE
        self._resume_at = 0  # length of the sequence from which on it proposes again

    @property
    def share(self) -> float:
        """Of the ids proposed lately, how many were right."""
        return self._share

    def propose(self, token_ids: Seq[int], most: int) -> tuple[int, ...]:
        """Up to `most` ids that may follow `token_ids`, which begins as at the last call."""
        if len(token_ids) < self._resume_at:
            return ()
        self._index.extend(token_ids)
        place, matched = self._index.longest_match(token_ids)
        count = min(
            most,
            ceil(self._max_ids * self._share),
            (matched - 1) * _MOST_PER_MATCHED,
        )
        return _continuation(token_ids, place, count) if place else ()

    def learn(self, num_ids: int, num_proposed: int, num_accepted: int) -> None:
        """Take over how a proposal did, after which the sequence has `num_ids` ids."""
        self._share += _NEWEST_WEIGHT * (num_accepted / num_proposed - self._share)
        if self._share >= _LEAST_SHARE:
            if num_accepted:
                self._pause = _FIRST_PAUSE
            return
        self._share = _PROBE_SHARE
        self._resume_at = num_ids + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)


def _continuation(token_ids: Seq[int], place: int, count: int) -> tuple[int, ...]:
    """What followed at `place`; past the end it repeats, as a text of that period would."""
    found = tuple(token_ids[place : place + count])
    return (found * -(-count // len(found)))[:count]
