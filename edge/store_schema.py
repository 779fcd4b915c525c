"""The tables of the store, as statements that SQLite and PostgreSQL both take. No file, no clock.

Times are Unix seconds. A row that one process works on has a `holder` and a `lease_until`: whoever
comes after that may take it over. What is only of interest together is JSON in one column.
"""

from __future__ import annotations

VERSION = 1  # of what follows; a file of another is refused

TABLES = {
    # Asynchronous work, native or a batch of OpenAI's. `ended` is null until it is.
    "jobs": """(
        id TEXT PRIMARY KEY, account TEXT NOT NULL, key_id TEXT NOT NULL, kind TEXT NOT NULL,
        route TEXT NOT NULL, model TEXT NOT NULL, status TEXT NOT NULL, created REAL NOT NULL,
        started REAL, ended REAL, deadline REAL NOT NULL, forget REAL NOT NULL,
        total INTEGER NOT NULL, completed INTEGER NOT NULL, failed INTEGER NOT NULL,
        prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
        webhook TEXT NOT NULL, extra BLOB NOT NULL, holder TEXT NOT NULL, lease_until REAL NOT NULL
    )""",
    # The requests of a job. `status` is the HTTP status of the answer, null until there is one.
    "items": """(
        job TEXT NOT NULL, place INTEGER NOT NULL, name TEXT, body BLOB NOT NULL,
        status INTEGER, answer BLOB, request_id TEXT, PRIMARY KEY (job, place)
    )""",
    # Completions that are still to be told to a URL.
    "hooks": """(
        job TEXT PRIMARY KEY, url TEXT NOT NULL, account TEXT NOT NULL, tries INTEGER NOT NULL,
        due REAL NOT NULL, holder TEXT NOT NULL, lease_until REAL NOT NULL
    )""",
    "secrets": "(account TEXT PRIMARY KEY, secret BLOB NOT NULL)",
    "files": """(
        id TEXT PRIMARY KEY, account TEXT NOT NULL, name TEXT NOT NULL, purpose TEXT NOT NULL,
        num_bytes INTEGER NOT NULL, created REAL NOT NULL, forget REAL NOT NULL
    )""",
    "file_parts": """(
        file TEXT NOT NULL, place INTEGER NOT NULL, content BLOB NOT NULL,
        PRIMARY KEY (file, place)
    )""",
    # Answers given once and told again: by idempotency key, and from the response cache.
    # `status` is null while somebody is at it.
    "replies": """(
        kind TEXT NOT NULL, account TEXT NOT NULL, name TEXT NOT NULL, digest TEXT NOT NULL,
        status INTEGER, head BLOB, body BLOB, num_bytes INTEGER NOT NULL,
        created REAL NOT NULL, forget REAL NOT NULL,
        holder TEXT NOT NULL, lease_until REAL NOT NULL, PRIMARY KEY (kind, account, name)
    )""",
    "logs": """(
        id TEXT PRIMARY KEY, account TEXT NOT NULL, key_id TEXT NOT NULL, route TEXT NOT NULL,
        model TEXT NOT NULL, status INTEGER NOT NULL, outcome TEXT NOT NULL, detail TEXT NOT NULL,
        region TEXT NOT NULL, stream INTEGER NOT NULL, cached INTEGER NOT NULL,
        prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
        cached_tokens INTEGER NOT NULL, started REAL NOT NULL, latency_ms REAL NOT NULL,
        ttft_ms REAL, metadata TEXT NOT NULL, request BLOB, response BLOB
    )""",
    # Responses that a client may refer to later. `body` is JSON.
    "responses": """(
        id TEXT PRIMARY KEY, account TEXT NOT NULL, body BLOB NOT NULL,
        created REAL NOT NULL, forget REAL NOT NULL
    )""",
}

INDEXES = {
    "jobs_open": "jobs (ended, lease_until)",
    "jobs_account": "jobs (account, kind, created)",
    "jobs_forget": "jobs (forget)",
    "hooks_due": "hooks (due)",
    "files_account": "files (account, created)",
    "files_forget": "files (forget)",
    "replies_forget": "replies (forget)",
    "logs_account": "logs (account, started)",
    "logs_started": "logs (started)",
    "responses_account": "responses (account, forget)",
    "responses_forget": "responses (forget)",
}


def drop_parts(table: str, of: str, owners: str) -> str:
    """Drops parts of what has had its time. Given: now, and how many at most, as they are large."""
    return (
        f"DELETE FROM {table} WHERE ({of}, place) IN (SELECT {of}, place FROM {table}"
        f" WHERE {of} IN (SELECT id FROM {owners} WHERE forget < ?) LIMIT ?)"
    )


STATEMENTS = (
    *(f"CREATE TABLE {name} {columns}" for name, columns in TABLES.items()),
    *(f"CREATE INDEX {name} ON {columns}" for name, columns in INDEXES.items()),
)
