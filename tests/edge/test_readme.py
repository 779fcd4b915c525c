"""The edge's README says what is so: its settings, its metrics, its files."""

from __future__ import annotations

import re
from pathlib import Path

import httpx2

from edge.ledger import open_ledger
from edge.metrics import Metrics
from edge.settings import EdgeTable, Settings
from edge.thinking import THINKING
from edge.tool_families import BY_NAME
from edge.watch import Watch
from routing.region import Place, Region

EDGE = Path(__file__).parents[2] / "edge"
README = (EDGE / "README.md").read_text()


def test_every_setting_of_the_file_is_there_with_its_default() -> None:
    table = README.partition("## Settings")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.M))
    assert set(rows) == set(EdgeTable.__struct_fields__)
    settings = Settings(regions=(), secret="", keys_dir=EDGE, cache_dir=EDGE)
    assert rows.pop("allow_private_webhooks") == "false"
    assert (rows["cors_origins"],) == settings.cors_origins
    for name in set(rows) - {"trusted_proxies", "geo_db", "cors_origins"}:
        default = getattr(settings, name)
        assert type(default)(rows[name]) == default


def test_every_file_that_is_named_exists() -> None:
    named = re.findall(r"`([\w/]+\.py)`", README)
    assert named
    for name in named:
        assert (EDGE / name).exists() or (EDGE.parent / name).exists(), name


def test_every_family_of_tools_is_there() -> None:
    table = README.partition("## Tools and thoughts")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[\w`, ]+`) \|", table, re.M)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(BY_NAME)
    assert all(f"`{row.open}`" in table for row in THINKING)


async def test_every_metric_is_there(tmp_path: Path) -> None:
    region = Region(name="r", url="http://127.0.0.1:9", place=Place(0, 0))
    async with httpx2.AsyncClient() as client:
        ledger = open_ledger(tmp_path / "ledger.sqlite", lambda: 0.0)
        text = Metrics(Watch([region], "s", client), ledger).text().decode()
        ledger.close()
    assert "edgefire_edge_ledger_lost_total" in text
    for name, kind in re.findall(r"^# TYPE (\S+) (\w+)$", text, re.M):
        if name.endswith("_created"):
            continue
        short = name.removeprefix("edgefire_edge_region")
        assert f"`{name}`" in README or f"`{short}`" in README, (name, kind)
