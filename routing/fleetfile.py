"""What a fleet is made of, read from its TOML file. Starts nothing and knows no process.

An operator writes a `FleetFile`; the launcher resolves it into the regions that an edge reads.

[fleet]           model, grace_s
[edge]            host, port, trusted_proxies, geo_db, budget_s, ...
[[region]]        name, port of its front, latitude and longitude where data/regions.toml has none
[[region.worker]] role, model, count, device, kv_tokens, ...
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from routing.drain import GRACE_S
from routing.region import Place

Device = Literal["auto", "cpu", "cuda"]
DEVICES: tuple[str, ...] = get_args(Device)
DATA = Path(__file__).parent / "data"

Port = Annotated[int, Meta(ge=0, le=65535)]  # 0: any free one
Name = Annotated[str, Meta(pattern="^[a-z][a-z0-9-]{0,31}$")]


class FleetFileError(Exception):
    """A fleet file that cannot be used: which file, which row, which field, and why."""


class FleetRow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str  # a name in the catalogue
    grace_s: Annotated[float, Meta(gt=0)] = GRACE_S  # for requests, once a process is told to stop


class EdgeRow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The edge worker. None: its own default."""

    # for the launcher
    host: str = "127.0.0.1"  # only the edge may listen beyond loopback
    port: Port = 8787
    # passed on: EDGE_READS
    trusted_proxies: tuple[str, ...] = ()  # networks whose forwarding headers count
    geo_db: str | None = None  # an .mmdb file: client address to place
    budget_s: Annotated[float, Meta(gt=0)] | None = None  # for one whole request
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None  # when the client names none
    compat: Literal["better", "workers-ai"] | None = None  # whose defaults where they differ
    body_limit_bytes: Annotated[int, Meta(ge=1)] | None = None
    cold_s: Annotated[float, Meta(ge=0)] | None = None  # for a model that is being loaded
    stalled_reader_s: Annotated[float, Meta(gt=0)] | None = None  # clients that take nothing
    grace_s: Annotated[float, Meta(gt=0)] | None = None  # None: the fleet's
    batch_in_flight: Annotated[int, Meta(ge=1)] | None = None  # queued requests asked at once
    result_days: Annotated[float, Meta(gt=0)] | None = None  # that jobs' answers are kept
    log_days: Annotated[float, Meta(gt=0)] | None = None  # that request logs are kept
    allow_private_webhooks: bool | None = None  # URLs that only this host or network can reach
    limits: Literal["off", "workers-ai"] | None = None  # of what each account may use
    cors_origins: tuple[str, ...] | None = None  # web pages that may ask


EDGE_READS = tuple(name for name in EdgeRow.__struct_fields__ if name not in {"host", "port"})


class WorkerRow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`count` workers of one kind. None: the worker's own default."""

    role: Literal["prefill", "decode", "both"]
    model: str | None = None  # a name in the catalogue; None: the fleet's
    count: Annotated[int, Meta(ge=1, le=64)] = 1
    device: Device | None = None  # None: what `fleet up --device` says
    dtype: Literal["auto", "bfloat16", "float32"] | None = None
    kv_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_step_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_running: Annotated[int, Meta(ge=1)] | None = None
    max_waiting: Annotated[int, Meta(ge=1)] | None = None
    lease_s: Annotated[float, Meta(gt=0)] | None = None
    kv_ways: Annotated[str, Meta(pattern="^(shared|nixl|tcp)(,(shared|nixl|tcp))*$")] | None = None
    host_cache_bytes: Annotated[int, Meta(ge=0)] | None = None  # of KV, behind the device
    disk_cache_dir: str | None = None
    disk_cache_bytes: Annotated[int, Meta(ge=0)] | None = None
    threads: Annotated[int, Meta(ge=1)] | None = None


class RegionRow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Name
    latitude: Annotated[float, Meta(ge=-90, le=90)] | None = None
    longitude: Annotated[float, Meta(ge=-180, le=180)] | None = None
    port: Port = 0  # its front's
    workers: Annotated[tuple[WorkerRow, ...], Meta(min_length=1)] = msgspec.field(name="worker")


class FleetFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    fleet: FleetRow
    edge: EdgeRow = EdgeRow()
    regions: Annotated[tuple[RegionRow, ...], Meta(min_length=1)] = msgspec.field(name="region")

    @property
    def edge_grace_s(self) -> float:
        return self.edge.grace_s or self.fleet.grace_s

    @property
    def other_models(self) -> list[str]:
        """That workers have besides the fleet's own, each once."""
        named = (row.model for region in self.regions for row in region.workers)
        return [it for it in dict.fromkeys(named) if it is not None and it != self.fleet.model]


class KnownPlace(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A row of data/regions.toml."""

    title: str
    latitude: float
    longitude: float


def known_places() -> dict[str, KnownPlace]:
    """Names of regions that need no coordinates, and where each is taken to be."""
    table = tomllib.loads((DATA / "regions.toml").read_text())
    return msgspec.convert(table, dict[str, KnownPlace])


def read_fleet(path: Path) -> FleetFile:
    """The fleet that `path` describes. FleetFileError names the row and field at fault."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as exc:
        raise FleetFileError(f"{path}: cannot be read: {exc}") from exc
    except tomllib.TOMLDecodeError as exc:
        raise FleetFileError(f"{path}: not TOML: {exc}") from exc
    try:
        fleet = msgspec.convert(table, FleetFile)
    except msgspec.ValidationError as exc:
        raise FleetFileError(f"{path}: {_in_words(str(exc), table)}") from exc
    if problem := _problem(fleet):
        raise FleetFileError(f"{path}: {problem}")
    return fleet


def resolved(fleet: FleetFile, urls: Mapping[str, str]) -> bytes:
    """The JSON that an edge reads: its own table, and where each region is. `urls`: by name."""
    rows = [
        {
            "name": region.name,
            "url": urls[region.name],
            **msgspec.to_builtins(place_of(region)),
        }
        for region in fleet.regions
    ]
    edge = {**msgspec.to_builtins(fleet.edge), "grace_s": fleet.edge_grace_s}
    told = {name: edge[name] for name in EDGE_READS if edge[name] is not None}
    return msgspec.json.format(msgspec.json.encode({"edge": told, "region": rows}))


def place_of(region: RegionRow) -> Place:
    """Where the region is: its own coordinates, else those its name is known for."""
    if region.latitude is not None and region.longitude is not None:
        return Place(region.latitude, region.longitude)
    known = known_places()[region.name]
    return Place(known.latitude, known.longitude)


def _problem(fleet: FleetFile) -> str | None:
    """What no single field shows: the first thing wrong with the fleet as a whole."""
    places = known_places()
    seen: set[str] = set()
    for number, region in enumerate(fleet.regions, 1):
        row = f"region {number} ({region.name})"
        if region.name in seen:
            return f"{row}: name: used by a region above"
        seen.add(region.name)
        if (region.latitude is None) != (region.longitude is None):
            return f"{row}: latitude and longitude go together"
        if region.latitude is None and region.name not in places:
            known = ", ".join(sorted(places))
            return f"{row}: latitude: needed, as the name is none of {known}"
        if lacks := _lacking(region, fleet.fleet.model):
            return f"{row}: worker: {lacks}, so no request could end"
    return None


def _lacking(region: RegionRow, model: str) -> str | None:
    """What no worker does that a request for one of the region's models needs."""
    by_model: dict[str, set[str]] = {}
    for worker in region.workers:
        by_model.setdefault(worker.model or model, set()).add(worker.role)
    for name, roles in by_model.items():
        if "both" not in roles and roles != {"prefill", "decode"}:
            lacks = "decode" if "prefill" in roles else "prefill"
            of = "" if name == model else f" of {name}"
            return f"none{of} has role {lacks} or both"
    return None


_STEP = re.compile(r"\.?([A-Za-z_]+)|\[(\d+)\]")


def _in_words(message: str, table: dict[str, Any]) -> str:
    """`Expected ... - at `$.region[0].port`` as `region 1 (weur): port: expected ...`."""
    reason, _, path = message.partition(" - at `$")
    words: list[str] = []
    here: Any = table
    for name, index in _STEP.findall(path.rstrip("`")):
        if name:
            here = here.get(name) if isinstance(here, dict) else None
            words.append(name)
        else:
            here = here[int(index)] if isinstance(here, list) else None
            known_as = here.get("name") or here.get("role") if isinstance(here, dict) else None
            number = int(index) + 1
            words[-1] += f" {number} ({known_as})" if isinstance(known_as, str) else f" {number}"
    return ": ".join([*words, reason[:1].lower() + reason[1:]])
