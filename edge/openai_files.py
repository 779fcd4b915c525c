"""OpenAI's files, `/ai/v1/files`: what batches read and write."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from functools import partial
from typing import Any
from uuid import uuid4

import anyio
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive

from edge import files
from edge.checks import BadField
from edge.files import PART_BYTES, File, FileWriter
from edge.store_routes import Ground, needed, no_such, told, whole_number
from routing.errors import Code, Failure

PURPOSE = "batch"  # the one thing that files are uploaded for
MOST_BYTES = 100_000_000  # of one file
MOST_BYTES_OF_ACCOUNT = 1_000_000_000  # of all that it has
_MOST_NAME_CHARS = 200
_OVERHEAD_BYTES = 100_000  # of a form around a file


class OpenAIFiles:
    def __init__(self, ground: Ground) -> None:
        self._ground = ground

    def routes(self, v1: str) -> list[Route]:
        at = f"{v1}/files"
        return [
            Route(at, self.upload, methods=["POST"]),
            Route(at, self.list, methods=["GET"]),
            Route(f"{at}/{{file}}", self.retrieve, methods=["GET"]),
            Route(f"{at}/{{file}}", self.delete, methods=["DELETE"]),
            Route(f"{at}/{{file}}/content", self.content, methods=["GET"]),
        ]

    async def upload(self, request: Request) -> Response:
        ground = self._ground
        tenant = ground.tenant(request.scope, request.headers, "files")
        _check_charset(request)
        receive = _bounded(request.receive, stalled_s=ground.settings.stalled_reader_s)
        has = await ground.store.read(partial(files.num_bytes, account=tenant.account))
        if has >= MOST_BYTES_OF_ACCOUNT:
            says = f"this account has {has} bytes of files, of {MOST_BYTES_OF_ACCOUNT}: delete some"
            raise Failure(Code.TOO_LARGE, says)
        try:
            with ground.drain.until_cut():
                async with Request(request.scope, receive).form(max_files=1, max_fields=20) as form:
                    purpose, upload = form.get("purpose"), form.get("file")
                    if not isinstance(upload, UploadFile):
                        raise BadField("/file", "'/file' must be a file")
                    if purpose != PURPOSE:
                        raise BadField("/purpose", f"'/purpose' must be '{PURPOSE}'")
                    return told(file_object(await self._keep(tenant.account, upload)))
        except HTTPException as malformed:
            says = f"the body is not a form with a file: {malformed.detail}"
            raise BadField("", says) from None

    async def list(self, request: Request) -> Response:
        tenant = self._ground.tenant(request.scope, request.headers, "files")
        after, limit = page(request, most=10_000, default=1000)
        found = await self._ground.store.read(
            partial(
                files.listed,
                account=tenant.account,
                purpose=request.query_params.get("purpose"),
                after=after,
                limit=limit + 1,
            )
        )
        shown = [file_object(file) for file in found[:limit]]
        ids = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {}
        return told({"object": "list", "data": shown, "has_more": len(found) > limit, **ids})

    async def retrieve(self, request: Request) -> Response:
        return told(file_object(await self._find(request)))

    async def delete(self, request: Request) -> Response:
        file = await self._find(request)
        await self._ground.store.write(partial(files.drop, account=file.account, file=file.id))
        return told({"id": file.id, "object": "file", "deleted": True})

    async def content(self, request: Request) -> Response:
        file = await self._find(request)
        return StreamingResponse(
            self._parts(file),
            headers={"content-length": str(file.num_bytes)},
            media_type="application/octet-stream",
        )

    async def _parts(self, file: File) -> AsyncGenerator[bytes, None]:
        place = 0
        while part := await self._ground.store.read(partial(files.part, file=file.id, place=place)):
            yield part
            place += 1

    async def _find(self, request: Request) -> File:
        tenant = self._ground.tenant(request.scope, request.headers, "files")
        name = request.path_params["file"]
        find = partial(files.find, account=tenant.account, file=name)
        file = await self._ground.store.read(find)
        if file is None:
            raise no_such("file", name)
        return file

    async def _keep(self, account: str, upload: UploadFile) -> File:
        now = self._ground.clock()
        file = File(
            id=f"file-{uuid4().hex}",
            account=account,
            name=needed(upload.filename, "file")[:_MOST_NAME_CHARS],
            purpose=PURPOSE,
            num_bytes=-1,
            created=now,
            forget=now + self._ground.settings.result_days * 86_400,
        )
        writer = FileWriter(self._ground.store, file)
        while data := await upload.read(PART_BYTES):
            await writer.write(data)
        return await writer.finish(MOST_BYTES_OF_ACCOUNT)


def _check_charset(request: Request) -> None:
    """Of a form. starlette would decode it by any codec that Python has, some of which make texts
    that cannot be written down, or take minutes."""
    _, said = parse_options_header(request.headers.get("content-type"))
    if said.get(b"charset", b"utf-8").lower() not in {b"utf-8", b"utf8"}:
        raise BadField("", "the form must be UTF-8")


def file_object(file: File) -> dict[str, Any]:
    """A file as OpenAI's clients read it."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": int(file.created),
        "expires_at": int(file.forget),
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
    }


def page(request: Request, *, most: int, default: int) -> tuple[str | None, int]:
    """`after` and `limit` of a list."""
    limit = whole_number(request, "limit", default, 1, most)
    return request.query_params.get("after"), limit


def _bounded(receive: Receive, *, stalled_s: float) -> Receive:
    """The body as it comes, as long as it is not too large and comes at all."""
    num_bytes = 0

    async def bounded() -> Message:
        nonlocal num_bytes
        try:
            with anyio.fail_after(stalled_s):
                message = await receive()
        except TimeoutError:
            says = f"nothing of the body arrived for {stalled_s:g} s"
            raise Failure(Code.TIMEOUT, says) from None
        if message["type"] == "http.disconnect":
            raise Failure(Code.ABORTED, "the client left before its request was whole")
        num_bytes += len(message.get("body", b""))
        if num_bytes > MOST_BYTES + _OVERHEAD_BYTES:
            says = f"the file exceeds the limit of {MOST_BYTES} bytes"
            raise Failure(Code.TOO_LARGE, says)
        return message

    return bounded
