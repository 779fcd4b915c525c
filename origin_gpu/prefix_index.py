"""Which worker has how much of a prompt in its prefix cache, as far as workers have said. Pure.

A hint, never a promise: a worker may have dropped the block meanwhile, and then computes it. So a
lost word costs time and no answer; still it is noticed, by its number, and all is asked for anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from infire.prefix import Chain
from origin_gpu.handover import CacheNews

MOST_KEYS = 2_000_000  # of one worker that are remembered: about 300 MB; it may have more on disk
FORGET_AT_ONCE = 20_000  # keys: a million would take most of a second


class PrefixIndex:
    """Keys of KV blocks (see `infire.prefix`), each with the workers that have it."""

    def __init__(self) -> None:
        self._bit_of: dict[str, int] = {}  # worker: its bit in the masks
        self._free_bits: list[int] = []
        self._mask_of: dict[bytes, int] = {}  # key: the workers that have it
        self._keys_of: dict[str, set[bytes]] = {}
        self._next: dict[str, int] = {}  # worker: the number of its next news
        # Bits of those that are forgotten, and the keys whose masks still have them.
        self._going: deque[tuple[int, set[bytes]]] = deque()

    @property
    def num_keys(self) -> int:
        """Different keys that are known."""
        return len(self._mask_of)

    def num_keys_of(self, worker: str) -> int:
        return len(self._keys_of.get(worker, ()))

    def hear(self, worker: str, news: CacheNews) -> bool:
        """Take note. False when news before these were lost: nothing is known of the worker then,
        until it begins again with number 0."""
        self._tidy()
        if news.number == 0:
            self.forget(worker)
            self._begin(worker)
        expected = self._next.get(worker)
        if expected is None:  # lost already, and asked for
            return True
        if news.number < expected:  # said twice
            return True
        if news.number > expected:
            self.forget(worker)
            return False
        self._next[worker] = expected + 1
        self._remove(worker, news.removed)
        self._add(worker, news.added)
        return True

    def forget(self, worker: str) -> None:
        """It is gone, or begins anew."""
        self._next.pop(worker, None)
        if worker in self._keys_of:
            self._going.append((self._bit_of.pop(worker), self._keys_of.pop(worker)))
            self._tidy()

    def num_found(
        self, workers: Iterable[str], chain: Chain, token_ids: tuple[int, ...], most: int
    ) -> dict[str, int]:
        """How many of the first `most` blocks of the ids each worker has, one after the other.

        A prompt that nobody knows costs one hash, however long it is.
        """
        there = 0
        for worker in workers:
            there |= self._bit_of.get(worker, 0)
        lost_at: dict[int, int] = {}  # bit: at which block it was the first time not there
        for count in range(1, most + 1):
            if not there:
                break
            mask = self._mask_of.get(chain.keys(token_ids, count)[-1], 0)
            if gone := there & ~mask:
                lost_at.update((1 << n, count - 1) for n in _bits(gone))
                there &= mask
        bits = {worker: self._bit_of.get(worker, 0) for worker in workers}
        return {worker: lost_at.get(bit, most) if bit else 0 for worker, bit in bits.items()}

    def check(self) -> None:
        """Assert that masks and sets say the same."""
        masks: dict[bytes, int] = {}
        for worker, keys in self._keys_of.items():
            for key in keys:
                masks[key] = masks.get(key, 0) | self._bit_of[worker]
        for bit, keys in self._going:
            for key in keys:
                masks[key] = masks.get(key, 0) | bit
        assert masks == self._mask_of
        bits = [*self._bit_of.values(), *self._free_bits, *(bit for bit, _ in self._going)]
        assert len({*bits}) == len(bits)

    def _begin(self, worker: str) -> None:
        num_used = len(self._bit_of) + len(self._going)
        bit = self._free_bits.pop() if self._free_bits else 1 << num_used
        self._bit_of[worker] = bit
        self._keys_of[worker] = set()
        self._next[worker] = 0

    def _add(self, worker: str, keys: Iterable[bytes]) -> None:
        mine, bit = self._keys_of[worker], self._bit_of[worker]
        for key in keys:
            if len(mine) >= MOST_KEYS:
                return
            mine.add(key)
            self._mask_of[key] = self._mask_of.get(key, 0) | bit

    def _remove(self, worker: str, keys: Iterable[bytes]) -> None:
        mine, bit = self._keys_of[worker], self._bit_of[worker]
        for key in keys:
            if key in mine:
                mine.discard(key)
                self._clear(key, bit)

    def _tidy(self) -> None:
        """Take the bit of who was forgotten out of some of its masks; then another may have it."""
        if not self._going:
            return
        bit, keys = self._going[0]
        for _ in range(min(FORGET_AT_ONCE, len(keys))):
            self._clear(keys.pop(), bit)
        if not keys:
            self._going.popleft()
            self._free_bits.append(bit)

    def _clear(self, key: bytes, bit: int) -> None:
        if rest := self._mask_of[key] & ~bit:
            self._mask_of[key] = rest
        else:
            del self._mask_of[key]


def _bits(mask: int) -> Iterable[int]:
    """Indices of the bits that are set."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
