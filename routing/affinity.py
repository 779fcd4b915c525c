"""Which region has probably computed this before: keys, and a hash that all edges agree on. Pure.

Rendezvous hashing: each region's weight for a key depends on the two alone, so edges need no shared
state, and a region that leaves or comes moves only its own share of keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import msgspec

# Shorter prompts than this are recomputed sooner than a region is chosen for them; longer ones are
# told apart by this much of their beginning: a conversation keeps its key as it grows.
PREFIX_TOKENS = 256


def session_key(account: str, session: str) -> bytes:
    """Of an `x-session-affinity` header: two accounts that name a session alike do not share it."""
    return _digest(b"session", account.encode(), session.encode())


def prefix_key(account: str, token_ids: Sequence[int]) -> bytes | None:
    """Of a prompt's beginning, which a prefix cache may hold; None when too short to matter."""
    if len(token_ids) < PREFIX_TOKENS:
        return None
    return _digest(b"prefix", account.encode(), msgspec.msgpack.encode(token_ids[:PREFIX_TOKENS]))


def by_rendezvous(key: bytes, names: Iterable[str]) -> list[str]:
    """Names in this key's order of preference, the same wherever it is computed."""
    return sorted(names, key=lambda name: _digest(key, name.encode()), reverse=True)


def _digest(*parts: bytes) -> bytes:
    """Over the parts and their lengths, so that no two lists of parts read alike."""
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
