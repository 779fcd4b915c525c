"""What is kept of a request's usage: a row in its edge's ledger, one in the journal of each front.

An edge counts what clients are told, a front what its workers made. Knows no file and no socket.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Generic, Literal, TypeVar

import msgspec
from msgspec import Struct

Source = Literal["edge", "journal"]
_TENANT_CHARS = 16


class LedgerRow(Struct, frozen=True, kw_only=True):
    """One request that was let in, as its edge saw it end."""

    request_id: str
    account: str  # empty where only a journal knew of the request, and no other row its tenant
    key_id: str
    tenant: str  # see `tenant_of`
    model: str
    regions: str  # that spoke, in order, with commas between
    prompt_tokens: int
    completion_tokens: int  # as the client was told; else as many as came for it
    cached_tokens: int
    outcome: str
    whole: bool  # heard to the end that the model or max_tokens made, and told as it was heard
    started: float  # Unix seconds
    ended: float
    source: Source = "edge"  # journal: added by reconciliation


class JournalRow(Struct, frozen=True, kw_only=True):
    """One request that ended at a front. A request that goes on elsewhere has several."""

    request_id: str
    region: str
    front: str
    tenant: str
    model: str
    prompt_tokens: int
    first_token: int  # how many tokens of the output were made elsewhere, before
    new_tokens: int
    cached_tokens: int
    outcome: str
    started: float
    ended: float


Row = TypeVar("Row", LedgerRow, JournalRow)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table(Generic[Row]):
    """How SQLite keeps rows of one type."""

    name: str
    row: type[Row]
    keys: tuple[str, ...]  # statements that make indexes
    primary: str = ""  # a column, of which no two rows have the same
    clause: str = ""  # what a row does that is there already

    @property
    def columns(self) -> tuple[str, ...]:
        return self.row.__struct_fields__

    @property
    def schema(self) -> str:
        types = {"str": "TEXT", "Source": "TEXT", "int": "INTEGER", "bool": "INTEGER"}
        kinds = self.row.__annotations__
        columns = [f"{name} {types.get(kinds[name], 'REAL')} NOT NULL" for name in self.columns]
        if self.primary:
            columns.append(f"PRIMARY KEY ({self.primary})")
        return f"CREATE TABLE IF NOT EXISTS {self.name} ({', '.join(columns)})"

    @property
    def insert(self) -> str:
        marks = ", ".join("?" * len(self.columns))
        return f"INSERT INTO {self.name} VALUES ({marks}) {self.clause}"

    def read(self, values: tuple[object, ...]) -> Row:
        # SQLite has no booleans and gives what was written as 1.0 back as such: not strict.
        named = dict(zip(self.columns, values, strict=True))
        return msgspec.convert(named, self.row, strict=False)


# A request has one row: the first one stands. But what its own edge says goes before what
# reconciliation has made of journals, whichever came first.
LEDGER = Table(
    name="ledger",
    row=LedgerRow,
    primary="request_id",
    keys=(
        "CREATE INDEX IF NOT EXISTS ledger_account ON ledger (account, ended)",
        "CREATE INDEX IF NOT EXISTS ledger_tenant ON ledger (tenant)",
    ),
    clause=(
        "ON CONFLICT (request_id) DO UPDATE SET "
        + ", ".join(f"{name} = excluded.{name}" for name in LedgerRow.__struct_fields__)
        + " WHERE ledger.source = 'journal' AND excluded.source = 'edge'"
    ),
)
JOURNAL = Table(
    name="journal",
    row=JournalRow,
    keys=(
        "CREATE INDEX IF NOT EXISTS journal_request ON journal (request_id)",
        "CREATE INDEX IF NOT EXISTS journal_ended ON journal (ended)",
    ),
)


def tenant_of(salt: bytes) -> str:
    """A name for a tenant that edge and front both know: fronts are not told accounts."""
    return sha256(b"edgefire usage tenant 1" + salt).hexdigest()[:_TENANT_CHARS]
