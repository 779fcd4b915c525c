"""`fleet up`, but for its processes, which are stand-ins. Run as a program:
stand_in_fleet.py FOLDER NAME=BEHAVIOUR... [--once] [--grace-s=SECONDS]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import anyio

from routing.children import Command, bind
from routing.drain import GRACE_S
from routing.firstrun import Caller
from routing.fleetfile import FleetFile, FleetRow, RegionRow, WorkerRow
from routing.launch import Launch, Prepared, UpSettings
from routing.layout import Ground
from routing.paths import paths
from routing.region import Role
from routing.runs import new_run
from routing.screen import Screen
from routing.secret import make_secret

PROGRAM = Path(__file__).with_name("stand_in.py")


def stand_in(name: str, role: Role, folder: Path, *behaviour: str) -> Command:
    return Command(
        name=name,
        region="" if role == "edge" else "weur",
        role=role,
        words=[sys.executable, str(PROGRAM), *behaviour],
        listener=bind("127.0.0.1", 0),
        log=folder / f"{name}.log",
    )


def prepared(home: Path, *kinds: str) -> tuple[UpSettings, Prepared]:
    """A run of stand-ins: `kinds` are NAME=BEHAVIOUR, the first is the edge."""
    settings = UpSettings(
        paths=paths({"EDGEFIRE_HOME": str(home)}), environ=os.environ, once="--once" in sys.argv
    )
    folder = new_run(settings.paths.state)
    commands = []
    for kind in kinds:
        name, _, behaviour = kind.partition("=")
        role: Role = "both" if commands else "edge"
        commands.append(stand_in(name, role, folder / "logs", *behaviour.split("+")))
    caller = Caller(edge_url=commands[0].url, account="demo", key="a-key", model="@cf/m")
    ground = Ground(
        folder=folder,
        keys_dir=settings.keys_dir,
        cache_dir=settings.paths.cache,
        model_dir=folder,
        usage_dir=folder,
        device="cpu",
        cores=1,
        say=lambda line: None,
    )
    make_secret(ground.secret_file)
    workers = (WorkerRow(role="both"),)
    return settings, Prepared(
        folder=folder,
        secret_file=ground.secret_file,
        model="@cf/m",
        commands=commands,
        caller=caller,
        fleet=FleetFile(
            fleet=FleetRow(model="@cf/m", grace_s=_grace_s()),
            regions=(RegionRow(name="weur", workers=workers),),
        ),
        ground=ground,
    )


def _grace_s() -> float:
    said = [word.removeprefix("--grace-s=") for word in sys.argv if word.startswith("--grace-s=")]
    return float(said[0]) if said else GRACE_S


def main() -> int:
    kinds = [word for word in sys.argv[2:] if not word.startswith("--")]
    settings, ready = prepared(Path(sys.argv[1]), *kinds)
    return anyio.run(Launch(settings, ready, Screen()).run)


if __name__ == "__main__":
    sys.exit(main())
