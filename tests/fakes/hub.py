"""A Hugging Face hub with one repository, over a real socket.

It answers what `huggingface_hub` asks to list and fetch a repository's files. `ours/small` has the
files it is given; `ours/gated` asks for terms to be accepted; there is no other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec

REVISIONS = ("main", "v2")
COMMIT = "f" * 40


class Hub(ThreadingHTTPServer):
    """Serves `files` (path: content); `fetched` are the paths that were asked for, in order."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Asked)
        self.files = files
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Hub]:
    with Hub(files) as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Asked(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        match self.path.partition("?")[0].strip("/").split("/", 5):
            case ["api", "models", "ours", "small", "revision", name] if name in REVISIONS:
                files = [{"rfilename": path} for path in self.server.files]
                self._json({"id": "ours/small", "sha": COMMIT, "siblings": files})
            case ["api", "models", "ours", "small", "tree", name] if name == COMMIT:
                self._json([self._entry(path) for path in self.server.files])
            case ["ours", "small", "resolve", name, *path] if name == COMMIT:
                self._file("/".join(path))
            case ["api", "models", "ours", "gated", *_]:
                self._refuse(401, "GatedRepo")
            case _:
                self._refuse(404, "RepoNotFound")

    do_HEAD = do_GET  # noqa: N815  the name is the standard library's

    def _entry(self, path: str) -> dict[str, Any]:
        content = self.server.files[path]
        return {"type": "file", "oid": "0" * 40, "size": len(content), "path": path}

    def _file(self, path: str) -> None:
        content = self.server.files[path]
        if self.command == "GET":
            self.server.fetched.append(path)
        self._send(200, content, ETag=f'"{sha256(content).hexdigest()}"', X_Repo_Commit=COMMIT)

    def _json(self, value: object) -> None:
        self._send(200, msgspec.json.encode(value), Content_Type="application/json")

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b'{"error": "no"}', X_Error_Code=code)

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Say nothing."""
