"""Whose grammar is checked next: tenants in turn, none of them in all lanes at once. Pure.

A grammar may take seconds to be found bad, and anybody may send as many as they like. They wait for
each other, and nobody else for them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque

from infire.request import Grammar, Sequence


class GrammarQueue:
    def __init__(self, lanes: int) -> None:
        """`lanes`: checks at a time; one of them is always left to other tenants, if it is not
        the only one."""
        self._most = max(1, lanes - 1)
        self._waiting: OrderedDict[bytes, deque[Sequence]] = OrderedDict()  # whose turn it is first
        self._taken: Counter[bytes] = Counter()
        self._checked: set[Grammar] = set()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, sequence: Sequence) -> None:
        self._waiting.setdefault(sequence.cache_salt, deque()).append(sequence)

    def drop(self, request_id: str) -> None:
        """Forget one that waits; ids of no such are ignored."""
        for tenant, waiting in self._waiting.items():
            for sequence in waiting:
                if sequence.request_id == request_id:
                    waiting.remove(sequence)
                    if not waiting:
                        del self._waiting[tenant]
                    return

    def take(self) -> Sequence | None:
        """The next that may be checked now; `done` is to be told of it. None: there is none."""
        for tenant, waiting in self._waiting.items():
            if self._taken[tenant] >= self._most:
                continue
            for at, sequence in enumerate(waiting):
                assert sequence.grammar is not None
                if sequence.grammar in self._checked:  # the answer will be theirs, too
                    continue
                del waiting[at]
                self._took(tenant, sequence.grammar)
                return sequence
        return None

    def done(self, sequence: Sequence) -> None:
        assert sequence.grammar is not None
        self._checked.discard(sequence.grammar)
        self._taken[sequence.cache_salt] -= 1
        if not self._taken[sequence.cache_salt]:
            del self._taken[sequence.cache_salt]

    def _took(self, tenant: bytes, grammar: Grammar) -> None:
        self._taken[tenant] += 1
        self._checked.add(grammar)
        self._waiting.move_to_end(tenant)
        if not self._waiting[tenant]:
            del self._waiting[tenant]
