"""Make, list and revoke the keys that clients show: one folder, used by the `edge key` commands.

    signing.pem    Ed25519, mode 0600; made by the first `create`, never changed
    public/K.pem   what edge workers check keys with; K is the key id
    revoked.txt    one key's jti a line; only ever appended to
    issued.jsonl   what was issued, without the keys themselves

An edge worker needs only `public` and `revoked.txt`. Knows no request.
"""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import jwt
import msgspec
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Struct

from edge.limits import check_name, parse_limit

ACCOUNT = re.compile(r"[A-Za-z0-9_-]{1,64}")
RUN = "ai:run"  # the scope that lets a key run models
REVOKED = "revoked.txt"
PUBLIC = "public"
_SIGNING = "signing.pem"
_ISSUED = "issued.jsonl"
_JTI = re.compile(r"[0-9a-f]{32}")
_DAY_S = 86_400
_MAX_DAYS = 36_500
MOST_PRIORITY = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What a key is good for. ValueError says what is wrong with it."""

    scopes: tuple[str, ...] = (RUN,)
    limits: tuple[str, ...] = ()
    priority: int = 0  # below 0: for capacity that nobody else wants

    def __post_init__(self) -> None:
        for text in self.limits:
            parse_limit(text)
        if abs(self.priority) > MOST_PRIORITY:
            raise ValueError(f"a priority is -{MOST_PRIORITY} to {MOST_PRIORITY}")


class Issued(Struct, frozen=True, kw_only=True):
    """What is remembered of a key."""

    jti: str
    account: str
    scopes: tuple[str, ...]
    created: int  # Unix seconds
    expires: int
    kid: str
    revoked: bool = False
    limits: tuple[str, ...] = ()  # as `edge.limits.parse_limit` takes them
    priority: int = 0


def create(
    folder: Path,
    account: str,
    *,
    days: int,
    now: float,
    grant: Grant = Grant(),
) -> str:
    """A new key for `account`, good for `days` from `now` (Unix seconds). Remembered, not kept."""
    if not ACCOUNT.fullmatch(account):
        raise ValueError(f"account id {account!r} must be 1 to 64 letters, digits, '-' or '_'")
    if not 1 <= days <= _MAX_DAYS:
        raise ValueError(f"a key must last 1 to {_MAX_DAYS} days, not {days}")
    for text in grant.limits:
        check_name(parse_limit(text))
    signing = _signing_key(folder)
    created = int(now)
    issued = Issued(
        jti=secrets.token_hex(16),
        account=account,
        scopes=grant.scopes,
        limits=grant.limits,
        priority=grant.priority,
        created=created,
        expires=created + days * _DAY_S,
        kid=key_id(signing.public_key()),
    )
    claims = {
        "jti": issued.jti,
        "sub": account,
        "scopes": list(grant.scopes),
        "iat": issued.created,
        "exp": issued.expires,
    }
    if grant.limits:
        claims["limits"] = list(grant.limits)
    if grant.priority:
        claims["priority"] = grant.priority
    _append(folder / _ISSUED, msgspec.json.encode(issued))
    return jwt.encode(claims, signing, algorithm="EdDSA", headers={"kid": issued.kid})


def revoke(folder: Path, key_or_jti: str) -> str:
    """End a key, given whole or by its jti, for good. The jti comes back."""
    jti = _jti_of(key_or_jti.strip())
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _append(folder / REVOKED, jti.encode())
    return jti


def listing(folder: Path) -> tuple[Issued, ...]:
    """Every key issued here, oldest first, with whether it is revoked."""
    issued, gone = folder / _ISSUED, folder / REVOKED
    if not issued.exists():
        return ()
    revoked = revoked_ids(gone) if gone.exists() else frozenset()
    keys = [msgspec.json.decode(line, type=Issued) for line in issued.read_bytes().splitlines()]
    return tuple(msgspec.structs.replace(key, revoked=key.jti in revoked) for key in keys)


def revoked_ids(path: Path) -> frozenset[str]:
    return frozenset(path.read_text(encoding="ascii", errors="replace").split())


def public_keys(folder: Path) -> dict[str, Ed25519PublicKey]:
    """Key id -> public key, of a `public` folder. A file that holds no such key is passed over."""
    found: dict[str, Ed25519PublicKey] = {}
    for path in folder.glob("*.pem"):
        try:
            key = pem.load_pem_public_key(path.read_bytes())
        except ValueError:
            continue
        if isinstance(key, Ed25519PublicKey):
            found[key_id(key)] = key
    return found


def key_id(public: Ed25519PublicKey) -> str:
    return sha256(public.public_bytes_raw()).hexdigest()[:16]


def _jti_of(key_or_jti: str) -> str:
    if _JTI.fullmatch(key_or_jti):
        return key_or_jti
    try:
        claims = jwt.decode(key_or_jti, options={"verify_signature": False})
    except jwt.InvalidTokenError:
        claims = {}
    jti = claims.get("jti")
    if not (isinstance(jti, str) and _JTI.fullmatch(jti)):
        raise ValueError("neither a key nor a key's jti (32 hexadecimal digits)")
    return jti


def _signing_key(folder: Path) -> Ed25519PrivateKey:
    """The folder's key, made if there is none; of two who make it at once, one wins for both."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / PUBLIC).mkdir(mode=0o700, exist_ok=True)
    (folder / REVOKED).touch(mode=0o600)  # an edge worker without it trusts no key
    path = folder / _SIGNING
    if not path.exists():
        _place(path, _private_pem(Ed25519PrivateKey.generate()))
    if path.stat().st_mode & 0o077:
        raise ValueError(f"{path} can be read by others: chmod 600 {path}")
    signing = pem.load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(signing, Ed25519PrivateKey):
        raise ValueError(f"{path} holds no Ed25519 key")
    public = signing.public_key()
    _place(folder / PUBLIC / f"{key_id(public)}.pem", _public_pem(public))
    return signing


def _place(path: Path, data: bytes) -> None:
    """Put a whole file at `path` unless one is there: a reader sees all of it or none."""
    if path.exists():
        return
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with open(draft, "xb", opener=_private) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(draft, path)  # fails where a rename would replace
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def _append(path: Path, line: bytes) -> None:
    """One line at the end, on the disk before this returns; appends never mix."""
    with open(path, "ab", buffering=0, opener=_private) as file:
        file.write(line + b"\n")
        os.fsync(file.fileno())


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)


def _private_pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())


def _public_pem(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
