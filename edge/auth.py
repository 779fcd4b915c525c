"""Who is asking: a signed key becomes a tenant, without a call to anyone.

Reads only public keys and revocations, so an edge worker cannot issue keys. Knows no request body.
"""

from __future__ import annotations

import hmac
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from jwt.types import Options
from msgspec import Struct, convert

from edge.keys import ACCOUNT, PUBLIC, REVOKED, RUN, Grant, public_keys, revoked_ids
from edge.limits import Limit, parse_limit
from routing.errors import Code, Failure

_RECHECK_S = 1.0  # how often the folder is looked at: a revocation holds within this
_MAX_KEY_CHARS = 4096
_CACHED_KEYS = 10_000
_SALT_DOMAIN = b"edgefire tenant salt 1"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    account: str
    key_id: str  # the key's jti
    salt: bytes  # 32; separates this account's prefix caches from all others'
    scopes: frozenset[str]
    limits: tuple[Limit, ...] = ()  # of this key, over its account's
    priority: int = 0

    @property
    def grant(self) -> Grant:
        """What its key is good for, as it is written."""
        limits = tuple(map(str, self.limits))
        return Grant(scopes=tuple(sorted(self.scopes)), limits=limits, priority=self.priority)


def tenant_of(account: str, key_id: str, grant: Grant) -> Tenant:
    """Who holds a key of this id that is good for so much."""
    return Tenant(
        account=account,
        key_id=key_id,
        salt=_salt(account),
        scopes=frozenset(grant.scopes),
        limits=tuple(map(parse_limit, grant.limits)),
        priority=grant.priority,
    )


class _Claims(Struct, frozen=True):
    """What a key must say. Read strictly: a claim of another type is no claim."""

    jti: str
    sub: str
    exp: int
    scopes: frozenset[str]
    limits: tuple[str, ...] = ()
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """A key whose signature was checked."""

    tenant: Tenant
    expires: int  # Unix seconds


class Verifier:
    """Checks keys against a folder's `public` and `revoked.txt`; `clock` gives Unix seconds.

    Without a readable list of revocations no key is trusted, and what was once read as revoked
    stays so for as long as this lives, whatever becomes of the file.
    """

    def __init__(self, folder: Path, clock: Callable[[], float]) -> None:
        self._folder = folder
        self._clock = clock
        self._checked_at = float("-inf")
        self._public_stat: _Stat = None
        self._revoked_stat: _Stat = None
        self._public: dict[str, Ed25519PublicKey] = {}
        self._revoked: frozenset[str] | None = None  # None: the list was never read
        self._known: OrderedDict[bytes, _Known] = OrderedDict()  # sha256 of the key; oldest first

    def tenant(self, authorization: str | None, account: str | None, *, scope: str = RUN) -> Tenant:
        """Who holds the bearer key; Failure(UNAUTHENTICATED) unless it is `account`'s and good.

        None: whichever account the key is for, where an address names none."""
        now = self._clock()
        self._refresh(now)
        known = self._key(_bearer(authorization))
        tenant = known.tenant
        if now >= known.expires:
            raise _refusal("the key has expired")
        if self._revoked is None or tenant.key_id in self._revoked:
            raise _refusal("the key is revoked")
        if account not in {None, tenant.account}:
            raise _refusal("the key is for another account")
        if scope not in tenant.scopes:
            raise _refusal(f"the key lacks the scope {scope}")
        return tenant

    def check(self, tenant: Tenant) -> None:
        """Failure where its key, once found good, has been revoked since: UNAUTHENTICATED, which is
        for good, and UNAVAILABLE while that cannot be known."""
        self._refresh(self._clock())
        if self._revoked is None:
            raise Failure(Code.UNAVAILABLE, "which keys are revoked cannot be read")
        if tenant.key_id in self._revoked:
            raise _refusal("the key is revoked")

    def _key(self, key: str) -> _Known:
        """From the cache when its signature was checked before."""
        digest = sha256(key.encode()).digest()
        known = self._known.get(digest)
        if known is not None:
            self._known.move_to_end(digest)
            return known
        known = self._known[digest] = _verified(key, self._public)
        if len(self._known) > _CACHED_KEYS:
            self._known.popitem(last=False)
        return known

    def _refresh(self, now: float) -> None:
        """Read again what changed on the disk, at most once a second (a clock may be set back)."""
        if abs(now - self._checked_at) < _RECHECK_S:
            return
        self._checked_at = now
        self._refresh_revoked(self._folder / REVOKED)
        self._refresh_public(self._folder / PUBLIC)

    def _refresh_revoked(self, path: Path) -> None:
        seen = _stat(path)
        if seen == self._revoked_stat and seen is not None:
            return
        try:
            self._revoked = (self._revoked or frozenset()) | revoked_ids(path)
        except OSError as unreadable:
            if self._revoked_stat is not None:
                _logger.warning("revocations cannot be read: %s", unreadable)
            seen = None
        self._revoked_stat = seen

    def _refresh_public(self, path: Path) -> None:
        seen = _stat(path)
        if seen is None or seen == self._public_stat:
            return
        try:
            self._public = public_keys(path)
        except OSError as unreadable:
            _logger.warning("public keys cannot be read: %s", unreadable)
            return
        self._public_stat = seen
        self._known.clear()  # a key may have been signed by one that is no longer there


_Stat = tuple[int, int, int] | None


def _stat(path: Path) -> _Stat:
    """What changes when a file or folder does; None when it cannot be looked at."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _bearer(authorization: str | None) -> str:
    scheme, _, key = (authorization or "").partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key:
        raise _refusal("no bearer key was given")
    if len(key) > _MAX_KEY_CHARS or not key.isascii():
        raise _refusal("the key is malformed")
    return key


def _verified(key: str, public: dict[str, Ed25519PublicKey]) -> _Known:
    """A key whose signature one of `public` made. Time and revocation are checked each time."""
    try:
        kid = jwt.get_unverified_header(key).get("kid")
        signer = public.get(kid) if isinstance(kid, str) else None
        if signer is None:
            raise _refusal("the key is signed by nobody known here")
        claims = convert(jwt.decode(key, signer, algorithms=["EdDSA"], options=_UNTIMED), _Claims)
        grant = Grant(scopes=tuple(claims.scopes), limits=claims.limits, priority=claims.priority)
    except (jwt.InvalidTokenError, ValueError, RecursionError):  # msgspec's are ValueErrors
        raise _refusal("the key is malformed") from None
    if not ACCOUNT.fullmatch(claims.sub):
        raise _refusal("the key names no account")
    return _Known(tenant=tenant_of(claims.sub, claims.jti, grant), expires=claims.exp)


# PyJWT would ask the system's clock; this module is given one.
_UNTIMED: Options = {"verify_exp": False, "verify_iat": False, "verify_nbf": False}


def _salt(account: str) -> bytes:
    """The same on every edge. The length goes ahead, so that no two accounts share a message."""
    name = account.encode()
    return hmac.digest(_SALT_DOMAIN, len(name).to_bytes(2, "big") + name, "sha256")


def _refusal(why: str) -> Failure:
    """`why` is for the log: a client is told only that it was refused (edge.envelope)."""
    return Failure(Code.UNAUTHENTICATED, why)
