"""`fleet scale`: what it asks of whom, and what it refuses; its processes are stand-ins."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from routing import scale as scale_module
from routing.children import Children, Command
from routing.control import Answered, Asked, ask, listen
from routing.fleetfile import FleetFile, FleetRow, RegionRow, WorkerRow
from routing.layout import Ground
from routing.region import ProcessReport, RegionReport
from routing.scale import CannotScale, Scaler
from routing.secret import make_secret
from tests.fakes.serving import Serving
from tests.fakes.stand_in_fleet import stand_in

pytestmark = pytest.mark.system


@dataclass
class Front:
    """A front that takes whatever workers it is told of, or `refuses`."""

    told: list[dict[str, str]] = field(default_factory=list)
    refuses: str = ""
    blind: bool = False  # it sees no worker

    async def workers(self, request: Request) -> Response:
        if self.refuses:
            return PlainTextResponse(self.refuses, status_code=409)
        self.told = await request.json()
        return JSONResponse(self.told)

    async def report(self, request: Request) -> Response:
        rows = tuple(
            ProcessReport(
                name=row["name"], region="weur", role="both", pid=1, url=row["url"], epoch="e",
                ready=True,
            )
            for row in self.told
            if not self.blind
        )  # fmt: skip
        told = RegionReport(region="weur", epoch="e", room=1, models=(), processes=rows)
        return Response(msgspec.json.encode(told))

    @property
    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/workers", self.workers, methods=["PUT"]),
                Route("/v1/report", self.report),
            ]
        )

    def names(self) -> list[str]:
        return [row["name"] for row in self.told]


@dataclass
class Grounds:
    scaler: Scaler
    children: Children
    front: Front

    def alive(self) -> set[str]:
        return {
            it.command.name
            for it in self.children
            if it.process.returncode is None and it.command.role != "front"
        }


@asynccontextmanager
async def region(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, behaviour: str = "serve", others: int = 0
) -> AsyncGenerator[Grounds, None]:
    """weur with a prefill and a decode worker, kept by children; new ones are `behaviour`. And so
    many `others` of another model."""
    (folder / "logs").mkdir()
    ground = Ground(
        folder=folder, keys_dir=folder, cache_dir=folder, model_dir=folder, usage_dir=folder,
        device="cpu", cores=1,
        say=lambda line: None,
    )  # fmt: skip
    make_secret(ground.secret_file)
    rows = (WorkerRow(role="prefill"), WorkerRow(role="decode"))
    fleet = FleetFile(
        fleet=FleetRow(model="@cf/m"), regions=(RegionRow(name="weur", workers=rows),)
    )

    def worker_command(name: str, row: WorkerRow, number: int, *_: Any) -> Command:
        return stand_in(f"{name}-{row.role}-{number}", row.role, folder / "logs", behaviour)

    monkeypatch.setattr(scale_module, "worker_command", worker_command)
    front = Front()
    serving = Serving(front.app)
    commands = [
        stand_in("weur-prefill-0", "prefill", folder / "logs", "serve"),
        stand_in("weur-decode-0", "decode", folder / "logs", "serve"),
    ]
    for n in range(others):
        other = stand_in(f"weur-other-{n}", "both", folder / "logs", "serve")
        commands.append(replace(other, other_model="@cf/other"))
    async with anyio.create_task_group() as tasks:
        await serving.start(tasks)
        door = stand_in("weur-front", "front", folder / "logs", "serve")
        monkeypatch.setattr(Command, "url", property(lambda it: _url(it, serving.url)))
        children = Children([door, *commands], os.environ, say=lambda line: None)
        await children.start()
        tasks.start_soon(children.keep)
        await anyio.lowlevel.checkpoint()
        yield Grounds(Scaler(children, fleet, ground, lambda line: None), children, front)
        await children.stop()
        for child in children:
            child.command.listener.close()
        await serving.stop()
        tasks.cancel_scope.cancel()


def _url(command: Command, front: str) -> str:
    if command.role == "front":
        return front
    port = command.listener.getsockname()[1]
    return f"http://127.0.0.1:{port}"


async def test_more_are_started_before_the_front_is_told_and_fewer_ended_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with region(tmp_path, monkeypatch) as it:
        assert await it.scaler.scale("weur", {"prefill": 3}) == {
            "prefill": 3,
            "decode": 1,
            "both": 0,
        }
        names = ["weur-prefill-0", "weur-decode-0", "weur-prefill-1", "weur-prefill-2"]
        assert it.front.names() == names
        assert it.alive() == {*names}
        assert (await it.scaler.scale("weur", {"prefill": 1, "decode": 2}))["prefill"] == 1
        assert it.front.names() == ["weur-prefill-0", "weur-decode-0", "weur-decode-1"]
        assert it.alive() == {*it.front.names()}
        (front,) = [child.command for child in it.children if child.command.role == "front"]
        assert sum(word == "--worker" for word in front.words) == 3  # as it is started again
        await it.scaler.scale("weur", {"prefill": 2})
        assert it.front.names()[-1] == "weur-prefill-1"  # the first number that is free


async def test_workers_of_another_model_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with region(tmp_path, monkeypatch, others=2) as it:
        assert await it.scaler.scale("weur", {"prefill": 2, "both": 0}) == {
            "prefill": 2,
            "decode": 1,
            "both": 0,
        }
        names = {"weur-prefill-0", "weur-decode-0", "weur-prefill-1"}
        names |= {"weur-other-0", "weur-other-1"}
        assert {*it.front.names()} == it.alive() == names
        with pytest.raises(CannotScale, match="with 2 prefill no request could end"):
            await it.scaler.scale("weur", {"decode": 0})


@pytest.mark.parametrize(
    ("name", "counts", "says"),
    [
        ("enam", {"prefill": 1}, "no region enam, only weur"),
        ("weur", {"prefill": 0}, "with 1 decode no request could end"),
        ("weur", {"prefill": 65}, "prefill: 65 is not between 0 and 64"),
        ("weur", {"edge": 1}, "edge: no role"),
    ],
)
async def test_what_cannot_be_is_refused_and_nothing_changes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    counts: dict[str, int],
    says: str,
) -> None:
    async with region(tmp_path, monkeypatch) as it:
        before = it.alive()
        with pytest.raises(CannotScale, match=says):
            await it.scaler.scale(name, counts)
        assert it.alive() == before
        assert it.front.told == []


async def test_a_worker_that_dies_while_it_starts_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with region(tmp_path, monkeypatch, behaviour="dies") as it:
        before = it.alive()
        with pytest.raises(CannotScale, match="nothing has changed"):
            await it.scaler.scale("weur", {"decode": 2})
        assert it.alive() == before
        assert it.front.told == []


async def test_a_front_that_refuses_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with region(tmp_path, monkeypatch) as it:
        it.front.refuses = "weur-decode-1 is elsewhere still"
        before = it.alive()
        with pytest.raises(CannotScale, match="elsewhere still"):
            await it.scaler.scale("weur", {"decode": 2})
        assert it.alive() == before


async def test_a_front_that_does_not_see_the_new_ones_keeps_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale_module, "KNOWN_S", 0.3)
    async with region(tmp_path, monkeypatch) as it:
        it.front.blind = True
        before = it.alive()
        with pytest.raises(CannotScale, match="does not see all of weur-both-0"):
            await it.scaler.scale("weur", {"both": 1, "prefill": 0, "decode": 0})
        assert it.alive() == before == {*it.front.names()}
        it.front.blind = False
        assert (await it.scaler.scale("weur", {"both": 1}))["both"] == 1


async def test_a_machine_without_room_for_more_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with region(tmp_path, monkeypatch) as it:

        def no_room(*_: Any) -> Command:
            raise OSError("too many open files")

        monkeypatch.setattr(scale_module, "worker_command", no_room)
        before = it.alive()
        with pytest.raises(CannotScale, match="nothing has changed: too many open files"):
            await it.scaler.scale("weur", {"decode": 2})
        assert it.alive() == before


async def test_the_launcher_answers_who_knows_the_secret() -> None:
    async def scale(name: str, counts: dict[str, int]) -> dict[str, int]:
        if name != "weur":
            raise CannotScale("no such region")
        return counts

    async with anyio.create_task_group() as tasks:
        at = await tasks.start(listen, scale, "s3cret")
        asked = Asked(secret="s3cret", region="weur", counts={"prefill": 2})
        assert await ask(at, asked) == Answered(counts={"prefill": 2})
        elsewhere = msgspec.structs.replace(asked, region="nowhere")
        assert await ask(at, elsewhere) == Answered(error="no such region")
        wrong = await ask(at, msgspec.structs.replace(asked, secret="guess"))
        assert wrong.error is not None
        assert "secret" in wrong.error
        async with await anyio.connect_tcp("127.0.0.1", int(at.split(":")[1])) as stream:
            await stream.send(b"nonsense\n")
            assert b"not understood" in await stream.receive()
        tasks.cancel_scope.cancel()
    with pytest.raises(OSError, match="the launcher does not answer at 127"):
        await ask(at, asked)
