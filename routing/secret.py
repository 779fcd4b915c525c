"""The secret that the processes of one fleet share, and the check that a caller has it.

Knows no users: who may ask a fleet something from outside is the edge's business.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

SECRET_BYTES = 32


def make_secret(path: Path) -> str:
    """The secret in the file at `path`, which is made (mode 0600) unless it is there.

    Of several processes that make it at once, one wins and all return the same.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    handle = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_urlsafe(SECRET_BYTES) + "\n")
        os.link(draft, path)  # unlike a rename, it never replaces a secret already in use
    except FileExistsError:
        pass
    except OSError as exc:  # which names no file where there is no room for it
        raise OSError(exc.errno, exc.strerror, str(path)) from exc
    finally:
        draft.unlink()
    return read_secret(path)


def read_secret(path: Path) -> str:
    """The secret in the file at `path`; ValueError if it is empty or no header could carry it."""
    secret = path.read_text(encoding="utf-8").strip()
    if not secret or not secret.isascii() or not secret.isprintable():
        raise ValueError(f"{path} holds no usable secret: one line of printable ASCII is needed")
    return secret


def bearer(secret: str) -> dict[str, str]:
    """The header that an internal call carries."""
    return {"authorization": f"Bearer {secret}"}


def authorized(headers: Mapping[str, str], secret: str) -> bool:
    """Whether these headers carry the secret. The time taken does not tell how much of it fits."""
    given = headers.get("authorization", "")
    return hmac.compare_digest(given.encode(), f"Bearer {secret}".encode())


class NeedsSecret:
    """ASGI middleware for internal routes and links: 401 to callers without the secret."""

    def __init__(self, app: ASGIApp, secret: str) -> None:
        self._app = app
        self._secret = secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or authorized(Headers(scope=scope), self._secret):
            await self._app(scope, receive, send)
            return
        refusal = JSONResponse(
            {"error": "the fleet's secret is needed here"},
            status_code=401,
            headers={"www-authenticate": "Bearer"},
        )
        await refusal(scope, receive, send)
