"""What this edge knows of its regions, kept fresh: a report each second, a link, a breaker each.

Regions may be away when it starts and come later. Decides nothing: `routing.choose` does, on what
`known()` hands out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf

import anyio
import httpx2
import msgspec

from routing import wire
from routing.choose import Known
from routing.errors import Code, Failure
from routing.health import Breaker
from routing.link import Link
from routing.logs import log
from routing.region import Region, RegionReport
from routing.secret import bearer

logger = logging.getLogger(__name__)

POLL_S = 1.0
POLL_AWAY_S = 0.25  # of a region that cannot serve yet
PATIENCE_S = 5.0  # an edge that has just started waits so long for the last of its regions
LOOK_S = 0.02  # between looks whether they are there
POLL_LIMIT_S = 3.0  # for one report
ASSETS_LIMIT_S = 30.0  # for the tokenizer and template of one model, a few MB
RTT_SHARE = 0.125  # of a slower sample in the estimate; a faster one counts at once, as TCP's do


@dataclass(slots=True, kw_only=True)
class _Seen:
    """One region; written by its watcher and by the verdicts of calls, all on the event loop."""

    region: Region
    link: Link[wire.Event]
    report: RegionReport | None = None
    reported_at: float = -inf
    rtt_ms: float | None = None
    breaker: Breaker = field(default_factory=Breaker)
    served: frozenset[str] = frozenset()
    reached: bool | None = None  # whether the last report came; None: not asked yet

    @property
    def usable(self) -> bool:
        """Whether it was there when last looked for, and serves something."""
        return bool(self.reached and self.link.connected and self.report and self.report.models)

    def heard(self, report: RegionReport, *, now: float, rtt_ms: float) -> None:
        if self.report is None or self.report.epoch != report.epoch:
            self.breaker = Breaker()  # another life: what is held against the former is void
        if self.rtt_ms is None or rtt_ms < self.rtt_ms:
            self.rtt_ms = rtt_ms
        else:
            self.rtt_ms += RTT_SHARE * (rtt_ms - self.rtt_ms)
        self.report, self.reported_at = report, now
        self.served |= {model.model for model in report.models}


class Watch:
    def __init__(
        self,
        regions: Sequence[Region],
        secret: str,
        client: httpx2.AsyncClient,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._headers = bearer(secret)
        self._clock = clock
        self._started = clock()
        self._settled = False
        self._heard = anyio.Event()  # a report, the next
        self._seen = {
            region.name: _Seen(region=region, link=Link(region.url, secret, wire.Event))
            for region in regions
        }

    async def run(self) -> None:
        """Keep every region's report and link up, until cancelled."""
        async with anyio.create_task_group() as tasks:
            for seen in self._seen.values():
                tasks.start_soon(seen.link.run)
                tasks.start_soon(self._keep_fresh, seen)

    def known(self) -> list[Known]:
        return [
            Known(
                region=seen.region,
                report=seen.report,
                reported_at=seen.reported_at,
                rtt_ms=seen.rtt_ms,
                connected=seen.link.connected,
                breaker=seen.breaker,
                served=seen.served,
            )
            for seen in self._seen.values()
        ]

    def ready(self) -> bool:
        """Whether requests may come: some region serves, and new edges know all their regions.

        Without the second, the first clients of a new edge would be sent past their nearest.
        """
        usable = [seen.usable for seen in self._seen.values()]
        return any(usable) and (all(usable) or self._is_old)

    @property
    def _is_old(self) -> bool:
        return self._clock() > self._started + PATIENCE_S

    async def wait_settled(self) -> None:
        """Until it has been ready, or has had its time: who comes sooner need not be sent away."""
        while not self._settled:
            self._settled = self.ready() or self._is_old
            if not self._settled:
                await anyio.sleep(LOOK_S)

    def now(self) -> float:
        """The clock of `Known.reported_at` and of the breakers."""
        return self._clock()

    def link(self, region: str) -> Link[wire.Event]:
        return self._seen[region].link

    def reached_since(self, region: str, moment: float) -> bool:
        """Whether its link is up, and a report has come since that moment of `now`."""
        seen = self._seen[region]
        return bool(seen.reached) and seen.link.connected and seen.reported_at > moment

    async def wait_reached(self, moment: float) -> None:
        """Until some region was `reached_since`. Wakes nobody but where a report comes."""
        while not any(self.reached_since(region, moment) for region in self._seen):
            await self._heard.wait()

    def called(self, region: str) -> None:
        seen = self._seen[region]
        seen.breaker = seen.breaker.called(self._clock())

    def succeeded(self, region: str) -> None:
        self._seen[region].breaker = self._seen[region].breaker.succeeded()

    def failed(self, region: str) -> None:
        seen = self._seen[region]
        seen.breaker = seen.breaker.failed(self._clock())

    def abandoned(self, region: str) -> None:
        self._seen[region].breaker = self._seen[region].breaker.abandoned()

    def draining(self, region: str, model: str) -> None:
        """It takes nothing new for `model`, which its next report will say as well."""
        seen = self._seen[region]
        seen.breaker = seen.breaker.abandoned()
        if seen.report is not None:
            others = tuple(it for it in seen.report.models if it.model != model)
            seen.report = msgspec.structs.replace(seen.report, models=others)

    def tokenizer_digests(self) -> set[str]:
        """Of every model that any region serves."""
        reports = (seen.report for seen in self._seen.values())
        return {model.tokenizer_digest for report in reports if report for model in report.models}

    async def refresh(self) -> None:
        """Ask every region for its report now: what it said last has turned out to be wrong."""
        async with anyio.create_task_group() as tasks:
            for seen in self._seen.values():
                tasks.start_soon(self._ask, seen)

    async def text_assets(self, digest: str) -> wire.TextAssets:
        """From any region that has them. Failure(UNAVAILABLE) when none does."""
        for seen in self._holders(digest):
            url = f"{seen.region.url}/v1/assets/{digest}"
            try:
                answer = await self._client.get(url, headers=self._headers, timeout=ASSETS_LIMIT_S)
                answer.raise_for_status()
                assets = msgspec.msgpack.decode(answer.content, type=wire.TextAssets)
            except (httpx2.HTTPError, msgspec.DecodeError) as exc:
                log(logger, "assets refused", region=seen.region.name, digest=digest, why=str(exc))
                continue
            if assets.digest == digest:
                return assets
            log(logger, "assets are not what was asked", region=seen.region.name, digest=digest)
        raise Failure(Code.UNAVAILABLE, "the model's tokenizer cannot be fetched now")

    def _holders(self, digest: str) -> Iterable[_Seen]:
        """Regions that serve a model with this tokenizer, then the others that are reached."""
        reached = [seen for seen in self._seen.values() if seen.report]
        return sorted(
            reached,
            key=lambda seen: all(
                model.tokenizer_digest != digest
                for model in (seen.report.models if seen.report else ())
            ),
        )

    async def _keep_fresh(self, seen: _Seen) -> None:
        while True:
            await self._ask(seen)
            await anyio.sleep(POLL_S if seen.usable else POLL_AWAY_S)

    async def _ask(self, seen: _Seen) -> None:
        before = self._clock()
        try:
            answer = await self._client.get(
                f"{seen.region.url}/v1/report", headers=self._headers, timeout=POLL_LIMIT_S
            )
            answer.raise_for_status()
            report = msgspec.json.decode(answer.content, type=RegionReport)
        except (httpx2.HTTPError, msgspec.DecodeError) as exc:
            self._note_reached(seen, reached=False, why=f"{type(exc).__name__}: {exc}")
            return
        now = self._clock()
        seen.heard(report, now=now, rtt_ms=1000 * (now - before))
        self._note_reached(seen, reached=True)
        self._heard.set()
        self._heard = anyio.Event()

    def _note_reached(self, seen: _Seen, *, reached: bool, why: str = "") -> None:
        """Log a region's coming and going, not every vain try."""
        if reached != seen.reached:
            event = "region heard" if reached else "region silent"
            log(logger, event, region=seen.region.name, why=why)
        seen.reached = reached
