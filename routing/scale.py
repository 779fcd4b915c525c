"""`fleet scale`: other numbers of workers in a region that is running, without a request failing.

New workers are started first, then the front is told who there is, then those that are too many
are drained: they finish what they have. Knows no socket of the command: see `control`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import anyio
import httpx2
import msgspec

from routing.children import Children, Command, DiedStarting
from routing.fleetfile import FleetFile, WorkerRow
from routing.layout import Ground, front_command, worker_command
from routing.region import RegionReport
from routing.secret import bearer, read_secret

ROLES = ("prefill", "decode", "both")
MOST = 64  # workers of a role, as in a fleet file
READY_WITHIN_S = 900.0
TELL_S = 5.0
KNOWN_S = 30.0  # that a front takes to see workers that are ready
POLL_S = 0.1


class CannotScale(Exception):
    """What was asked for cannot be, or did not come about; says why, and what is left as it was."""


class Scaler:
    """Changes the workers of regions, one change at a time."""

    def __init__(
        self, children: Children, fleet: FleetFile, ground: Ground, say: Callable[[str], None]
    ) -> None:
        self._children = children
        self._fleet = fleet
        self._ground = ground
        self._say = say
        self._turn = anyio.Lock()

    async def scale(self, region: str, counts: Mapping[str, int]) -> dict[str, int]:
        """Have so many workers of each role named; how many there are then. Raises CannotScale."""
        grace_s = self._ground.grace_s
        async with self._turn:
            here = [it.command for it in self._children if it.command.region == region]
            front = next((it for it in here if it.role == "front"), None)
            if front is None:
                known = ", ".join(row.name for row in self._fleet.regions)
                raise CannotScale(f"there is no region {region}, only {known}")
            others = [it for it in here if it.other_model is not None]  # stay as they are
            workers = [it for it in here if it.role in ROLES and it not in others]
            wanted = _wanted(workers, counts)
            try:
                new = [
                    command
                    for role, count in wanted.items()
                    for command in self._more(region, role, workers, count)
                ]
                await self._children.add(new, within_s=READY_WITHIN_S)
            except (DiedStarting, OSError) as exc:
                raise CannotScale(f"nothing has changed: {exc}") from exc
            leaving = _too_many(workers, wanted)
            staying = [it for it in workers if it not in leaving] + new
            try:
                await self._tell(front, [*staying, *others])
                await self._wait_known(front, [*staying, *others])
            except CannotScale:
                with suppress(CannotScale):  # or it is gone, and comes back with the old ones
                    await self._tell(front, [*workers, *others])
                await self._children.retire([it.name for it in new], grace_s=grace_s)
                raise
            self._children.say_again(
                front_command(region, [*staying, *others], self._ground, front.listener)
            )
            await self._children.retire([it.name for it in leaving], grace_s=grace_s)
            self._say(f"{region}: {_words(staying)}")
            return {role: sum(it.role == role for it in staying) for role in ROLES}

    def _more(
        self, region: str, role: str, workers: Sequence[Command], count: int
    ) -> list[Command]:
        """Those that are missing, with the first numbers that are free."""
        names = {it.name for it in workers}
        missing = count - sum(it.role == role for it in workers)
        free = (n for n in range(2 * MOST) if f"{region}-{role}-{n}" not in names)
        row, model = self._row(region, role), self._fleet.fleet.model
        return [
            worker_command(region, row, next(free), model, self._ground) for _ in range(missing)
        ]

    def _row(self, region: str, role: str) -> WorkerRow:
        """As the fleet file has workers of this role here; else as it has others here."""
        here = next(it.workers for it in self._fleet.regions if it.name == region)
        rows = [row for row in here if row.model in {None, self._fleet.fleet.model}]
        if not rows:
            raise CannotScale(f"{region} has no worker of {self._fleet.fleet.model}")
        alike = next((row for row in rows if row.role == role), rows[0])
        return msgspec.structs.replace(alike, role=role)

    async def _wait_known(self, front: Command, workers: Sequence[Command]) -> None:
        """Until the front would give each of these something to do."""
        names = {it.name for it in workers}
        with anyio.move_on_after(KNOWN_S):
            while True:
                answer = await self._ask(front, "GET", "/v1/report")
                report = msgspec.json.decode(answer.content, type=RegionReport)
                if names <= {it.name for it in report.processes if it.ready}:
                    return
                await anyio.sleep(POLL_S)
        raise CannotScale(f"{front.name} does not see all of {', '.join(sorted(names))} ready")

    async def _tell(self, front: Command, workers: Sequence[Command]) -> None:
        body = [{"name": it.name, "role": it.role, "url": it.url} for it in workers]
        answer = await self._ask(front, "PUT", "/v1/workers", msgspec.json.encode(body))
        if answer.status_code != httpx2.codes.OK:
            raise CannotScale(f"{front.name} refused: {answer.text}")

    async def _ask(
        self, front: Command, method: str, path: str, content: bytes | None = None
    ) -> httpx2.Response:
        headers = bearer(read_secret(self._ground.secret_file))
        try:
            async with httpx2.AsyncClient(timeout=TELL_S, trust_env=False) as client:
                return await client.request(
                    method, f"{front.url}{path}", content=content, headers=headers
                )
        except httpx2.HTTPError as exc:
            raise CannotScale(f"{front.name} cannot be asked: {exc}") from exc


def _wanted(workers: Sequence[Command], counts: Mapping[str, int]) -> dict[str, int]:
    """Of every role how many. CannotScale where no request could end."""
    wanted = {role: sum(it.role == role for it in workers) for role in ROLES}
    for role, count in counts.items():
        if role not in ROLES:
            raise CannotScale(f"{role}: no role, those are {', '.join(ROLES)}")
        if not 0 <= count <= MOST:
            raise CannotScale(f"{role}: {count} is not between 0 and {MOST}")
        wanted[role] = count
    if not wanted["both"] and not (wanted["prefill"] and wanted["decode"]):
        raise CannotScale(f"with {_counted(wanted)} no request could end")
    return wanted


def _too_many(workers: Sequence[Command], wanted: Mapping[str, int]) -> list[Command]:
    """Of each role the last."""
    return [
        it
        for role, count in wanted.items()
        for it in [worker for worker in workers if worker.role == role][count:]
    ]


def _words(workers: Sequence[Command]) -> str:
    return _counted({role: sum(it.role == role for it in workers) for role in ROLES})


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {role}" for role, count in counts.items() if count) or "no workers"
