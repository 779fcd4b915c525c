"""How a batch of OpenAI's begins and ends: its file becomes requests, its answers become files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import anyio
from anyio import to_thread

from edge import files, jobs
from edge.batch_lines import Check, Problem, answers, requests
from edge.files import File, FileWriter
from edge.jobs import Extra, Job, Status
from edge.store import Db, Store

_CHUNK_BYTES = 1_000_000  # of requests, in one transaction
_PAGE = 200  # answers read at once

PURPOSE = "batch_output"


class BatchFiles:
    """`checks`: of each endpoint, what its route would refuse. `clock` gives Unix seconds.
    `most_bytes`: of the body of one request."""

    def __init__(
        self,
        store: Store,
        clock: Callable[[], float],
        checks: dict[str, Check],
        *,
        keep_s: float,
        most_bytes: int,
    ) -> None:
        self._store = store
        self._clock = clock
        self._checks = checks
        self._keep_s = keep_s
        self._most_bytes = most_bytes

    async def admit(self, job: Job) -> None:
        """Its requests are in the store, and it runs; or it has failed, and says why.

        Done twice, it comes to the same.
        """
        extra = job.more
        content = await self._store.read(partial(_content, job=job, file=extra.input_file))
        if content is None:
            says = f"the file {extra.input_file} is no longer there"
            found: list[tuple[str | None, bytes]] = []
            problems = [Problem("file_not_found", says, param="/input_file_id")]
        else:
            check = self._checks[extra.endpoint]
            most = self._most_bytes
            read = partial(requests, content, extra.endpoint, check, most_bytes=most)
            found, problems = await to_thread.run_sync(read)
        if problems:
            extra.errors = [problem.told for problem in problems]
            failed = partial(jobs.finish, job=job, status="failed", extra=extra, now=self._clock())
            await self._store.write(failed)
            return
        await self._add(job, found)
        await self._store.write(partial(jobs.admit, job=job, total=len(found)))

    async def _add(self, job: Job, found: Sequence[tuple[str | None, bytes]]) -> None:
        first = 0
        while first < len(found):
            end, num_bytes = first, 0
            while end < len(found) and num_bytes < _CHUNK_BYTES:
                num_bytes += len(found[end][1])
                end += 1
            chunk = found[first:end]
            await self._store.write(
                partial(jobs.add_items, job=job.id, requests=chunk, first=first)
            )
            first = end

    async def outputs(self, job: Job, extra: Extra, ended: Status) -> None:
        """Write the file of answers and the file of errors, as far as there is anything in them."""
        writers = {ok: FileWriter(self._store, self._file(job, ok=ok)) for ok in (True, False)}
        page = await self._page(job, 0)
        while page:
            for ok, line in answers(job.id, page, ended):
                await writers[ok].write(line)
            await anyio.lowlevel.checkpoint()
            page = await self._page(job, page[-1].place + 1)
        if writers[True].num_bytes:
            extra.output_file = (await writers[True].finish()).id
        if writers[False].num_bytes:
            extra.error_file = (await writers[False].finish()).id

    async def _page(self, job: Job, first: int) -> list[jobs.Item]:
        return await self._store.read(partial(jobs.items, job=job.id, first=first, most=_PAGE))

    def _file(self, job: Job, *, ok: bool) -> File:
        kind = "output" if ok else "error"
        now = self._clock()
        return File(
            id=f"file-{kind}-{job.id.removeprefix('batch_')}",
            account=job.account,
            name=f"{job.id}_{kind}.jsonl",
            purpose=PURPOSE,
            num_bytes=-1,
            created=now,
            forget=now + self._keep_s,
        )


def _content(db: Db, job: Job, file: str) -> bytes | None:
    if files.find(db, job.account, file) is None:
        return None
    return files.content(db, file)
