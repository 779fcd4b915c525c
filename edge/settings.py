"""What an edge worker is told when it starts. Read once, in `__main__.py`; then it stays."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from routing.drain import GRACE_S
from routing.geo import LOOPBACK
from routing.region import Place, Region

Compat = Literal["better", "workers-ai"]
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\sA-Z]+")  # as browsers write them


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    regions: tuple[Region, ...]
    secret: str  # the fleet's: regions ask for it, and so does /v1/report
    keys_dir: Path  # public keys and revocations
    cache_dir: Path  # tokenizers; may be deleted
    ledger: Path | None = None  # of usage; None: it is not kept
    catalogue: Path | None = None  # rows of models beside those that come with this
    store: Path | None = None  # of jobs, files, replies and logs; None: there are none
    name: str = "edge"
    trusted_proxies: tuple[str, ...] = LOOPBACK  # whose word on a client's place counts
    geo_db: Path | None = None  # an .mmdb file: address to place
    budget_s: float = 300.0  # for a whole request, from its body's last byte to its last token
    max_output_tokens: int = 2048  # when the client names no max_tokens
    compat: Compat = "better"  # "workers-ai": also where Workers AI's own defaults are in the way
    body_limit_bytes: int = 10_000_000  # as Workers AI documents for its payloads
    cold_s: float = 10.0  # that a request waits for a model that is being loaded
    grace_s: float = GRACE_S  # that requests have to end once it is told to stop
    stalled_reader_s: float = 60.0  # a client that takes nothing for so long is hung up on
    batch_in_flight: int = 8  # queued requests that are asked at once
    result_days: float = 7.0  # that answers of jobs, and files, are kept
    log_days: float = 30.0  # that request logs are kept
    allow_private_webhooks: bool = False  # also URLs that only this host or network can reach
    limits: str = "off"  # of every account: a name in edge.limits.PRESETS
    cors_origins: tuple[str, ...] = ("*",)  # web pages that may ask; none: no headers for them


class EdgeTable(Struct, frozen=True, kw_only=True):
    """`[edge]` of a fleet file. None: the default above."""

    trusted_proxies: tuple[str, ...] = ()
    geo_db: str | None = None
    budget_s: Annotated[float, Meta(gt=0)] | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    compat: Compat | None = None
    body_limit_bytes: Annotated[int, Meta(ge=1)] | None = None
    cold_s: Annotated[float, Meta(ge=0)] | None = None
    stalled_reader_s: Annotated[float, Meta(gt=0)] | None = None
    grace_s: Annotated[float, Meta(gt=0)] | None = None
    batch_in_flight: Annotated[int, Meta(ge=1)] | None = None
    result_days: Annotated[float, Meta(gt=0)] | None = None
    log_days: Annotated[float, Meta(gt=0)] | None = None
    allow_private_webhooks: bool | None = None
    limits: Literal["off", "workers-ai"] | None = None
    cors_origins: tuple[str, ...] | None = None


class RegionRow(Struct, frozen=True, kw_only=True):
    name: Annotated[str, Meta(min_length=1)]
    url: Annotated[str, Meta(pattern="^https?://[^/]+$")]  # of its front
    latitude: Annotated[float, Meta(ge=-90, le=90)]
    longitude: Annotated[float, Meta(ge=-180, le=180)]


class Fleet(Struct, frozen=True, kw_only=True):
    """What an edge reads of a fleet file: its own table, and where the regions are."""

    edge: EdgeTable = EdgeTable()
    region: Annotated[tuple[RegionRow, ...], Meta(min_length=1)]

    @property
    def regions(self) -> tuple[Region, ...]:
        return tuple(
            Region(name=row.name, url=row.url, place=Place(row.latitude, row.longitude))
            for row in self.region
        )


def settings_of(fleet: Fleet, flags: Mapping[str, Any], **given: Any) -> Settings:
    """Defaults, over which goes what the fleet file says, over which go the flags.

    ValueError for an origin that no browser would send.
    """
    table = {
        name: value
        for name in EdgeTable.__struct_fields__
        if (value := getattr(fleet.edge, name)) is not None
    }
    if not table["trusted_proxies"]:
        del table["trusted_proxies"]
    if "geo_db" in table:
        table["geo_db"] = Path(table["geo_db"]).expanduser()
    settings = Settings(regions=fleet.regions, **given, **(table | dict(flags)))
    for origin in settings.cors_origins:
        if not _ORIGIN.fullmatch(origin):
            raise ValueError(f"cors_origins: {origin!r} is not * and not like https://example.com")
    return settings


def read_fleet(path: Path) -> Fleet:
    """The fleet in a TOML or JSON file; ValueError names the file and the field at fault."""
    try:
        text = path.read_text(encoding="utf-8")
        table = msgspec.json.decode(text) if path.suffix == ".json" else tomllib.loads(text)
        fleet = msgspec.convert(table, Fleet)
    except (OSError, ValueError) as exc:  # msgspec's and tomllib's errors are ValueErrors
        raise ValueError(f"{path}: {exc}") from exc
    if len({row.name for row in fleet.region}) < len(fleet.region):
        raise ValueError(f"{path}: two regions have the same name")
    return fleet
