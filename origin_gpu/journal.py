"""What a front keeps of requests that ended there: against it, edges' ledgers can be checked.

A journal is bounded, by age and by rows; what goes beyond is dropped, the oldest first.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

from origin_gpu.embed_passage import EmbedPassage
from origin_gpu.passage import Passage
from origin_gpu.settings import FrontSettings
from routing.rows import RowWriter
from routing.usage import JOURNAL, JournalRow, tenant_of

DAY_S = 86_400
TEND_S = 600.0  # between looks at what has become too old, or too much


class Journal:
    """`clock` gives Unix seconds. Made by `open_journal`."""

    def __init__(
        self, writer: RowWriter[JournalRow], settings: FrontSettings, clock: Callable[[], float]
    ) -> None:
        self._writer = writer
        self._settings = settings
        self._clock = clock
        self.close = writer.close

    def note(self, passage: Passage | EmbedPassage, outcome: str) -> None:
        """A request has ended here. Waits for nothing."""
        request, ended = passage.request, self._clock()
        made = passage if isinstance(passage, Passage) else None  # tokens
        row = JournalRow(
            request_id=request.request_id,
            region=self._settings.region,
            front=self._settings.name,
            tenant=tenant_of(request.tenant_salt),
            model=request.model,
            prompt_tokens=request.num_prompt,
            first_token=len(made.request.generated_ids) if made else 0,
            new_tokens=made.num_new if made else 0,
            cached_tokens=made.cached_tokens if made else 0,
            outcome=outcome,
            started=ended - passage.elapsed_s,
            ended=ended,
        )
        self._writer.put(row)


def open_journal(path: Path, settings: FrontSettings, clock: Callable[[], float]) -> Journal:
    """The journal in this file, made if need be. OSError, sqlite3.Error or ValueError if it cannot
    be used."""

    def tend(connection: sqlite3.Connection) -> None:
        before = clock() - settings.journal_days * DAY_S
        prune(connection, before=before, most=settings.journal_rows)

    return Journal(RowWriter(path, JOURNAL, tend=tend, tend_s=TEND_S), settings, clock)


def prune(connection: sqlite3.Connection, *, before: float, most: int) -> int:
    """Drop rows that ended earlier, and all but the last `most`; how many those were.

    The last of all is kept: from its number one sees that there were others.
    """
    last = connection.execute("SELECT max(rowid) FROM journal").fetchone()[0] or 0
    dropped = connection.execute(
        "DELETE FROM journal WHERE (ended < ? AND rowid < ?) OR rowid <= ?",
        (before, last, last - most),
    )
    return dropped.rowcount
