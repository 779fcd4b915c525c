"""Edges' ledgers against fronts' journals: what differs, and the rows that are missing. Pure.

An edge that is killed loses the rows of the requests it was answering; the fronts that were asked
have them. Both sides come in the order of request ids, so no more than one request is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import merge
from itertools import groupby
from operator import attrgetter

from msgspec import Struct

from routing.usage import JournalRow, LedgerRow

_by_id = attrgetter("request_id")
# outcomes at a front that the model or max_tokens made, and of vectors that were all made
_ENDS = ("stop", "length", "embedded")


class Missing(Struct, frozen=True, kw_only=True, tag="missing"):
    """Journals have it, no ledger has: its edge was killed, or is not at its end yet."""

    request_id: str
    row: LedgerRow  # as the journals tell it


class Short(Struct, frozen=True, kw_only=True, tag="short"):
    """Of tokens that a client was told no journal knows: a front was killed, its rows lost."""

    request_id: str
    told: int
    known: int


class Over(Struct, frozen=True, kw_only=True, tag="over"):
    """The answer came to its own end, and journals have more tokens than the ledger."""

    request_id: str
    told: int
    made: int


class Twice(Struct, frozen=True, kw_only=True, tag="twice"):
    """Several ledgers have it: added to one while its edge, which writes another, was at it."""

    request_id: str
    rows: tuple[LedgerRow, ...]


Finding = Missing | Short | Over | Twice


class Compared(Struct, kw_only=True):
    """What was looked at so far."""

    requests: int = 0  # on either side
    waiting: int = 0  # that differ, and are so new that what lacks may follow
    told: int = 0  # completion tokens of ledger rows whose journals are complete
    made: int = 0  # of the same requests, each index once
    twice: int = 0  # tokens made once more, as nobody had heard them


def compare(
    ledger: Iterable[LedgerRow],
    journals: Iterable[JournalRow],
    *,
    ended_before: float,
    known_from: float,
    account_of: Callable[[str], str],
    seen: Compared,
) -> Iterator[Finding]:
    """What differs, both sides being in the order of request ids.

    Of requests that ended later than `ended_before` something may be missing yet, on either side;
    of those from before `known_from`, journals may have dropped it. `account_of` gives a tenant's,
    or "".
    """
    for request_id, group in groupby(merge(ledger, journals, key=_by_id), key=_by_id):
        rows = list(group)
        told = [row for row in rows if isinstance(row, LedgerRow)]
        made = [row for row in rows if isinstance(row, JournalRow)]
        seen.requests += 1
        if len(told) > 1:
            yield Twice(request_id=request_id, rows=tuple(told))
        finding: Finding | None
        if told:
            own = next((row for row in told if row.source == "edge"), told[0])
            known = own.started >= known_from
            ended = own.ended
            finding = _difference(own, made, seen) if known else _excess(own, made)
        else:
            ended = max(row.ended for row in made)
            finding = Missing(request_id=request_id, row=_told_by(made, account_of))
        if finding is not None and ended < ended_before:
            yield finding
        elif finding is not None:
            seen.waiting += 1


def _difference(told: LedgerRow, made: Sequence[JournalRow], seen: Compared) -> Short | Over | None:
    count = num_made(made)
    seen.told += told.completion_tokens
    seen.made += count
    seen.twice += sum(row.new_tokens for row in made) - count
    known = num_made(made, first=told.completion_tokens)
    if known < told.completion_tokens:
        return Short(request_id=told.request_id, told=told.completion_tokens, known=known)
    return _excess(told, made)


def _excess(told: LedgerRow, made: Sequence[JournalRow]) -> Over | None:
    """Tokens of the region that ended the answer; another may have made more, which nobody heard,
    and where regions compute differently, other ones."""
    ended = [row for row in _in_order(made) if row.outcome in _ENDS]
    if told.whole and ended and _end(ended[-1]) > told.completion_tokens:
        return Over(request_id=told.request_id, told=told.completion_tokens, made=_end(ended[-1]))
    return None


def _in_order(rows: Iterable[JournalRow]) -> list[JournalRow]:
    """As they were asked. Clocks of two fronts may differ, so times come last."""

    def place(row: JournalRow) -> tuple[int, bool, int, float]:
        return row.first_token, row.outcome in _ENDS, row.new_tokens, row.started

    return sorted(rows, key=place)


def num_made(rows: Iterable[JournalRow], *, first: int | None = None) -> int:
    """How many of the (first) tokens of the output these made, each index once: what a region made
    and nobody heard is made anew by the next."""
    count, reached = 0, 0
    for row in sorted(rows, key=lambda row: row.first_token):
        end = _end(row) if first is None else min(first, _end(row))
        count += max(0, end - max(reached, row.first_token))
        reached = max(reached, end)
    return count


def _end(row: JournalRow) -> int:
    return row.first_token + row.new_tokens


def _told_by(rows: Sequence[JournalRow], account_of: Callable[[str], str]) -> LedgerRow:
    """The ledger's row, as far as journals know it.

    They count what was made, which is at most a few tokens more than the client got; and tokens
    that a front which was lost as well had made, the next one was told of.
    """
    rows = _in_order(rows)
    last = rows[-1]
    spoke = [row for row in rows if row.new_tokens]
    return LedgerRow(
        request_id=last.request_id,
        account=account_of(last.tenant),
        key_id="",
        tenant=last.tenant,
        model=last.model,
        regions=",".join(row.region for row in spoke),
        prompt_tokens=last.prompt_tokens,
        completion_tokens=_end(last),
        cached_tokens=(spoke or rows)[0].cached_tokens,
        outcome=last.outcome,
        whole=last.outcome in _ENDS,
        started=min(row.started for row in rows),
        ended=max(row.ended for row in rows),
        source="journal",
    )
