"""Lets an ASGI app drop a connection at once.

uvicorn closes a connection only after what is buffered for it was taken: for a client that takes
nothing, never. An app finds `abort` in its scope's extensions, and is then told of a disconnect as
if the client had hung up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

EXTENSION = "edgefire.abort"


class AbortableProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol, with the extension in every scope."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {EXTENSION: {"abort": self.transport.abort}}


def abort_of(scope: Scope) -> Callable[[], None]:
    """What drops the connection of this request."""
    extensions: dict[str, Any] = scope["extensions"]
    return cast("Callable[[], None]", extensions[EXTENSION]["abort"])
