"""Which texts an encoder computes next. Pure: ids of requests, lengths of texts, no tensors.

In order of arrival: what does not fit begins the next batch, so that a long text is never passed
over for good.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass


@dataclass(slots=True)
class _Waiting:
    lengths: tuple[int, ...]  # tokens of its texts
    next: int = 0  # the first that is in no batch yet


class EmbedQueue:
    """Texts that wait, by request."""

    def __init__(self) -> None:
        self._waiting: dict[str, _Waiting] = {}  # in order of arrival
        self.num_tokens = 0  # that wait

    @property
    def num_requests(self) -> int:
        """That have texts which wait."""
        return len(self._waiting)

    def add(self, request_id: str, lengths: Seq[int]) -> None:
        """`lengths`: tokens of its texts; at least one text, of at least one token each."""
        assert request_id not in self._waiting
        assert lengths
        assert min(lengths) > 0
        self._waiting[request_id] = _Waiting(tuple(lengths))
        self.num_tokens += sum(lengths)

    def drop(self, request_id: str) -> None:
        """Forget what waits of it; ids that are not known are ignored."""
        if it := self._waiting.pop(request_id, None):
            self.num_tokens -= sum(it.lengths[it.next :])

    def take(self, max_tokens: int) -> list[tuple[str, int]]:
        """The next batch: request and number of each text, at most so many tokens in all.

        A text that is longer by itself is a batch by itself. Empty where nothing waits.
        """
        batch: list[tuple[str, int]] = []
        room = max_tokens
        for request_id, it in list(self._waiting.items()):
            while it.next < len(it.lengths):
                length = it.lengths[it.next]
                if batch and length > room:
                    return batch
                batch.append((request_id, it.next))
                room -= length
                self.num_tokens -= length
                it.next += 1
            del self._waiting[request_id]
        return batch
