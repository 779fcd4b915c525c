"""KV handed over as workers do it, in their folders, over a network that the test has in hand.

The giver drops its files as soon as it is told that they have been collected; the collector keeps
what came. Whatever happens on the way, there are two outcomes: all of it, or a `Failure` after
which the request can be computed elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

import anyio

from origin_gpu.kv_files import SHARED_MEMORY, KVFiles, open_files
from origin_gpu.kv_offer import Offer
from origin_gpu.kv_transfer import DoorTransport, KVDoor
from origin_gpu.kv_warm import WarmFiles
from origin_gpu.kv_ways import Way
from routing.errors import Code, Failure
from tests.fakes.faulty_way import Act, Faulty
from tests.fakes.tcp_proxy import Proxy, tcp_proxy
from tests.origin_gpu.conftest import Ends
from tests.origin_gpu.test_kv_transfer import SECRET, peer, ticket

STALL_S = 1.0
WITHIN_S = 5 * STALL_S  # of a hand-over of which one end stalls


@dataclass
class Outcome:
    """Of one hand-over; `failure` is None where all that came is what was given."""

    failure: Failure | None
    collected: bool


@dataclass
class Crossing:
    door: KVDoor
    proxy: Proxy
    ways: Sequence[Way]  # of the collector
    given: KVFiles
    taken: KVFiles
    warm: WarmFiles

    async def hand_over(
        self,
        name: str = "r",
        *,
        num_bytes: int = 1000,
        num_parts: int = 1,
        order: Sequence[int] | None = None,
        offered: Callable[[Offer], None] = lambda _: None,
    ) -> Outcome:
        """Parts are given in `order`. AssertionError if wrong KV came, or what came lasts not."""
        parts = range(num_parts)
        content = [_content(name, part, num_bytes) for part in parts]
        with ExitStack() as stack:
            into = [stack.enter_context(self.taken.new(num_bytes)) for _ in parts]
            with ExitStack() as hold:
                paths = [hold.enter_context(self.given.new(num_bytes)) for _ in parts]
                for path, part in zip(paths, content, strict=True):
                    path.write_bytes(part)
                mine = ticket(num_bytes, name, num_parts)
                offer = hold.enter_context(self.door.offer(mine, *paths))
                offer.files = tuple(offer.files[part] for part in order or parts)
                offered(offer)
                offer.exported()
                failure = await self._collect(offer, paths, into)
                if failure is None:
                    with anyio.move_on_after(STALL_S / 2):  # the last of it is on its way
                        await offer.collected.wait()
            if failure is None:
                assert [path.read_bytes() for path in into] == content
            else:
                assert failure.code is Code.LOST
                assert failure.code.elsewhere
        return Outcome(failure, offer.collected.is_set())

    async def collect_again(self, offer: Offer) -> Failure | None:
        """Another try at what `hand_over` has offered without a word more, in one part."""
        with self.taken.new(offer.ticket.num_bytes) as into:
            failure = await self._collect(offer, [], [into])
            if failure is None:
                content = _content(offer.ticket.request_id, 0, offer.ticket.num_bytes)
                assert into.read_bytes() == content
            return failure

    async def _collect(self, offer: Offer, paths: list[Path], into: list[Path]) -> Failure | None:
        async def let_go() -> None:
            await offer.collected.wait()
            for path in paths:
                path.unlink()

        transport = DoorTransport(SECRET, ways=self.ways, warm=self.warm, stall_s=STALL_S)
        found: Failure | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(let_go)
            try:
                with anyio.fail_after(WITHIN_S):
                    await transport.collect(offer.ticket, peer(self.proxy.address), *into)
            except Failure as failure:
                found = failure
            tasks.cancel_scope.cancel()
        return found


def _content(name: str, part: int, num_bytes: int) -> bytes:
    return random.Random(f"{name} {part}").randbytes(num_bytes)


@asynccontextmanager
async def crossing(
    ends: Ends, act: Act | None = None, *, stall_s: float = STALL_S
) -> AsyncGenerator[Crossing, None]:
    """With `act` in the place of the collector's taking; nothing is left when the block is."""
    ways = [Faulty(way, act) for way in ends[1]] if act else ends[1]
    with (
        open_files([SHARED_MEMORY]) as given,
        open_files([SHARED_MEMORY]) as taken,
        closing(WarmFiles()) as warm,
        KVDoor("127.0.0.1", SECRET, ways=ends[0], stall_s=stall_s) as door,
    ):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(door.run)
            async with tcp_proxy(door.address) as proxy:
                yield Crossing(door, proxy, ways, given, taken, warm)
            tasks.cancel_scope.cancel()
        assert door.num_offers == 0
        folders = [*given._folders, *taken._folders]
        assert [path for folder in folders for path in folder.glob("*.kv")] == []
    assert not any(folder.exists() for folder in folders)
