"""The usage of every request that was let in: one row a request id, however the request ended.

The rows are written behind the requests, by a thread. A process that is killed loses those of the
requests it was answering, and of the few that ended in its last milliseconds: `fleet reconcile`
makes them of the fronts' journals.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edge.auth import Tenant
from edge.metrics import Record
from routing.rows import RowWriter
from routing.usage import LEDGER, LedgerRow, tenant_of


class Ledger:
    """`clock` gives Unix seconds. Made by `open_ledger`."""

    def __init__(self, writer: RowWriter[LedgerRow], clock: Callable[[], float]) -> None:
        self._writer = writer
        self._clock = clock
        self.close = writer.close

    @property
    def num_pending(self) -> int:
        return self._writer.num_pending

    @property
    def num_lost(self) -> int:
        return self._writer.num_lost

    def note(self, record: Record, now: float) -> None:
        """A request has ended, at `now` on the monotonic clock. Waits for nothing.

        Only one that was let in has a row: its key and body were good, and a region was looked for.
        """
        if record.tenant is not None and record.tries.answers:
            row = row_of(record, record.tenant, ended=self._clock(), took_s=now - record.started)
            self._writer.put(row)


def open_ledger(path: Path, clock: Callable[[], float]) -> Ledger:
    """The ledger in this file, made if need be. OSError, sqlite3.Error or ValueError if it cannot
    be used."""
    return Ledger(RowWriter(path, LEDGER), clock)


def row_of(record: Record, tenant: Tenant, *, ended: float, took_s: float) -> LedgerRow:
    tries = record.tries
    told = record.num_output
    return LedgerRow(
        request_id=record.request_id,
        account=tenant.account,
        key_id=tenant.key_id,
        tenant=tenant_of(tenant.salt),
        model=record.served_model or "",
        regions=",".join(tries.regions),
        prompt_tokens=record.num_prompt,
        completion_tokens=completion_tokens(record),
        cached_tokens=tries.cached_tokens,
        outcome=record.outcome,
        whole=tries.heard_the_end and told in {None, tries.num_output},
        started=ended - took_s,
        ended=ended,
    )


def completion_tokens(record: Record) -> int:
    """As the client was told; else as many as came for it."""
    return record.tries.num_output if record.num_output is None else record.num_output
