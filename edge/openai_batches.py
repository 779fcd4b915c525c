"""OpenAI's batches, `/ai/v1/batches`: a file of requests is asked when there is room."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import uuid4

import msgspec
from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge import files, jobs
from edge.batch_lines import ENDPOINTS, need_endpoint
from edge.checks import BadField, Fields, read
from edge.jobs import Job
from edge.openai_files import PURPOSE, page
from edge.queued import DEADLINE_S, check_room
from edge.store import Db
from edge.store_routes import Ground, needed, no_such, told
from routing.errors import Code, Failure

WINDOW = "24h"  # the one that OpenAI has, too
_MOST_METADATA = 16
_MOST_CHARS = 512


class OpenAIBatches:
    """`wake` says that there is something to do."""

    def __init__(self, ground: Ground, wake: Callable[[], None]) -> None:
        self._ground = ground
        self._wake = wake

    def routes(self, v1: str) -> list[Route]:
        at = f"{v1}/batches"
        return [
            Route(at, self.create, methods=["POST"]),
            Route(at, self.list, methods=["GET"]),
            Route(f"{at}/{{batch}}", self.retrieve, methods=["GET"]),
            Route(f"{at}/{{batch}}/cancel", self.cancel, methods=["POST"]),
        ]

    async def create(self, request: Request) -> Response:
        tenant = self._ground.tenant(request.scope, request.headers, "batches")
        fields = await to_thread.run_sync(read, await self._ground.body(request))
        endpoint = need_endpoint(fields)
        if fields.text("completion_window") != WINDOW:
            says = f"'/completion_window' must be '{WINDOW}'"
            raise BadField("/completion_window", says)
        now = self._ground.clock()
        extra = jobs.Extra(
            grant=tenant.grant,
            endpoint=endpoint,
            input_file=needed(fields.text("input_file_id"), "input_file_id"),
            window=WINDOW,
            metadata=_metadata(fields),
        )
        job = Job(
            id=f"batch_{uuid4().hex}",
            account=tenant.account,
            key_id=tenant.key_id,
            kind="batch",
            route=ENDPOINTS[endpoint],
            model="",
            status="validating",
            created=now,
            deadline=now + DEADLINE_S,
            forget=now + DEADLINE_S + self._ground.settings.result_days * 86_400,
            extra=msgspec.json.encode(extra),
        )
        await self._ground.store.write(partial(_add, job=job, file=extra.input_file))
        self._wake()
        return told(batch_object(job))

    async def retrieve(self, request: Request) -> Response:
        tenant = self._ground.tenant(request.scope, request.headers, "batches")
        return told(batch_object(await self._find(tenant.account, request.path_params["batch"])))

    async def cancel(self, request: Request) -> Response:
        tenant = self._ground.tenant(request.scope, request.headers, "batches")
        job = await self._find(tenant.account, request.path_params["batch"])
        if job.ended is not None:
            raise Failure(Code.CONFLICT, f"Cannot cancel a batch with status '{job.status}'")
        cancel = partial(jobs.cancel, job=job, now=self._ground.clock())
        await self._ground.store.write(cancel)
        self._wake()
        return told(batch_object(await self._find(tenant.account, job.id)))

    async def list(self, request: Request) -> Response:
        tenant = self._ground.tenant(request.scope, request.headers, "batches")
        after, limit = page(request, most=100, default=20)
        found = await self._ground.store.read(
            partial(jobs.listed, account=tenant.account, kind="batch", after=after, limit=limit + 1)
        )
        shown = [batch_object(job) for job in found[:limit]]
        ids = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {}
        more = len(found) > limit
        return told({"object": "list", "data": shown, "has_more": more, **ids})

    async def _find(self, account: str, batch: str) -> Job:
        find = partial(jobs.find, account=account, job=batch, kind="batch")
        job = await self._ground.store.read(find)
        if job is None:
            raise no_such("batch", batch)
        return job


def batch_object(job: Job) -> dict[str, Any]:
    """A batch as OpenAI's clients read it."""
    extra = job.more
    errors = {"object": "list", "data": extra.errors} if extra.errors else None
    return {
        "id": job.id,
        "object": "batch",
        "endpoint": extra.endpoint,
        "errors": errors,
        "input_file_id": extra.input_file,
        "completion_window": extra.window,
        "status": _status(job),
        "output_file_id": extra.output_file,
        "error_file_id": extra.error_file,
        "created_at": int(job.created),
        "in_progress_at": _seconds(job.started),
        "expires_at": int(job.deadline),
        "finalizing_at": None,
        "cancelling_at": _seconds(extra.cancelling_at),
        **{
            f"{ended}_at": _seconds(job.ended) if job.status == ended else None
            for ended in ("completed", "failed", "expired", "cancelled")
        },
        "request_counts": {"total": job.total, "completed": job.completed, "failed": job.failed},
        "metadata": extra.metadata,
    }


def _status(job: Job) -> str:
    if job.status == "running":
        is_answered = job.total and job.completed + job.failed == job.total
        return "finalizing" if is_answered else "in_progress"
    return job.status


def _seconds(at: float | None) -> int | None:
    return None if at is None else int(at)


def _add(db: Db, job: Job, file: str) -> None:
    found = files.find(db, job.account, file)
    if found is None:
        raise BadField("/input_file_id", f"'/input_file_id': no such file: {file[:80]!r}")
    if found.purpose != PURPOSE:
        says = f"'/input_file_id': the file's purpose is '{found.purpose}', not '{PURPOSE}'"
        raise BadField("/input_file_id", says)
    check_room(db, job.account)
    jobs.add(db, job)


def _metadata(fields: Fields) -> dict[str, str] | None:
    given = fields.fields("metadata")
    if given is None:
        return None
    names = given.names
    if len(names) > _MOST_METADATA:
        raise BadField("/metadata", f"'/metadata' must have <= {_MOST_METADATA} members")
    made = {name: given.text(name) or "" for name in names}
    for name, value in made.items():
        if len(name) > 64 or len(value) > _MOST_CHARS:
            says = f"'{given.at(name)}' must have <= {_MOST_CHARS} characters, its name 64"
            raise BadField(given.at(name), says)
    return made
