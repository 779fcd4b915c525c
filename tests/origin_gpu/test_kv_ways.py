"""Ways that KV goes: what happens when one fails, and when messages come in any order."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest

from origin_gpu import kv_transfer
from origin_gpu.kv_offer import Offer
from origin_gpu.kv_shared import SharedFiles
from origin_gpu.kv_transfer import DoorTransport, KVDoor
from origin_gpu.kv_ways import Refused, Way
from origin_gpu.settings import parse_ways
from routing.errors import Code, Failure
from tests.fakes.faulty_way import Act, Faulty, Take, Turns, scatters
from tests.origin_gpu.conftest import Ends, shared
from tests.origin_gpu.crossing import Outcome, crossing
from tests.origin_gpu.test_kv_transfer import PATIENCE_S, SECRET, peer, ticket, wait_collected


async def refuses(take: Take, into: Path) -> None:
    raise Refused("not today")


async def truncates(take: Take, into: Path) -> None:
    await take()
    content = into.read_bytes()
    into.unlink()
    into.write_bytes(content[:-1])


async def drops(take: Take, into: Path) -> None:
    """Says that all is well, and there is nothing."""


async def delays(take: Take, into: Path) -> None:
    await anyio.sleep(1.0)
    await take()


async def at_once(take: Take, into: Path) -> None:
    await take()


async def repeats(take: Take, into: Path) -> None:
    await take()
    await take()


async def hangs(take: Take, into: Path) -> None:
    await anyio.sleep_forever()


@dataclass
class Pair:
    door: KVDoor
    offered: Path
    into: Path

    async def collect(self, *ways: Way) -> str:
        transport = DoorTransport(SECRET, ways=ways, stall_s=PATIENCE_S)
        return await transport.collect(ticket(1000), peer(self.door.address), self.into)


@asynccontextmanager
async def pair(tmp_path: Path, offered: Path, stall_s: float = 0.3) -> AsyncGenerator[Pair, None]:
    """The door has the shared way, and little patience."""
    with KVDoor("127.0.0.1", SECRET, ways=[shared(tmp_path)], stall_s=stall_s) as door:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(door.run)
            yield Pair(door, offered, tmp_path / "in")
            tasks.cancel_scope.cancel()


async def test_where_a_way_does_not_work_it_goes_over_the_connection(
    tmp_path: Path, offered: Path
) -> None:
    async with pair(tmp_path, offered) as it:
        for ways in (
            [Faulty(shared(tmp_path), refuses)],
            [SharedFiles([tmp_path / "nowhere"])],  # the same host, and other folders
            [],
        ):
            with it.door.offer(ticket(1000), offered) as offer:
                offer.exported()
                assert await it.collect(*ways) == "tcp"
                assert it.into.read_bytes() == b"k" * 1000
                assert not it.into.samefile(offered)
                it.into.unlink()
                await wait_collected(offer)


async def test_a_door_without_the_way_sends_the_bytes(tmp_path: Path, offered: Path) -> None:
    with KVDoor("127.0.0.1", SECRET) as door:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(door.run)
            with door.offer(ticket(1000), offered) as offer:
                offer.exported()
                assert await Pair(door, offered, tmp_path / "in").collect(shared(tmp_path)) == "tcp"
                await wait_collected(offer)
            tasks.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (truncates, "999 of 1000 bytes came by shared"),
        (drops, "No such file"),
        (repeats, "File exists"),
    ],
)
async def test_what_did_not_arrive_whole_is_still_on_offer(
    tmp_path: Path, offered: Path, act: Act, said: str
) -> None:
    async with pair(tmp_path, offered) as it:
        with it.door.offer(ticket(1000), offered) as offer:
            offer.exported()
            with pytest.raises(Failure, match=said) as failed:
                await it.collect(Faulty(shared(tmp_path), act))
            assert failed.value.code is Code.LOST
            assert not offer.collected.is_set()
            it.into.unlink(missing_ok=True)
            assert await it.collect(shared(tmp_path)) == "shared"
            await wait_collected(offer)
            assert offered.read_bytes() == b"k" * 1000


async def test_who_takes_its_time_says_so(
    tmp_path: Path, offered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times as long as the door waits for a sign of life."""
    monkeypatch.setattr(kv_transfer, "BUSY_EVERY_S", 0.05)
    async with pair(tmp_path, offered) as it:
        with it.door.offer(ticket(1000), offered) as offer:
            offer.exported()
            assert await it.collect(Faulty(shared(tmp_path), delays)) == "shared"
            await wait_collected(offer)


async def test_who_gives_up_leaves_the_offer(tmp_path: Path, offered: Path) -> None:
    async with pair(tmp_path, offered) as it:
        with it.door.offer(ticket(1000), offered) as offer:
            offer.exported()
            with anyio.move_on_after(0.2) as given_up:
                await it.collect(Faulty(shared(tmp_path), hangs))
            assert given_up.cancelled_caught
            assert await it.collect(shared(tmp_path)) == "shared"
            await wait_collected(offer)


# --- things in another order ---------------------------------------------------------------------
#
# A connection keeps its bytes in order; nothing else does. Hand-overs overtake each other, parts
# come as they like, pieces land in memory one by one, and acknowledgements come when nobody waits
# for them, or after all that they were about.


@pytest.mark.parametrize("seed", range(3))
async def test_hand_overs_that_overtake_each_other(ends: Ends, seed: int) -> None:
    """KV goes in one order, and is acknowledged in another."""
    draw = random.Random(seed)
    names = range(6)
    going, saying = (Turns(draw.sample(names, 6)) for _ in range(2))
    numbers = iter(names)

    async def takes_turns(take: Take, into: Path) -> None:
        await going.wait(next(numbers))
        await take()

    async def gate(way: str, connection: int, passed: int) -> None:
        if way == "forth" and passed:
            await saying.wait(connection)
        if way == "back" and not passed and not ends[1]:
            await going.wait(connection)

    async with crossing(ends, takes_turns) as it:
        it.proxy.gate = gate
        outcomes: list[Outcome] = []

        async def one(name: int) -> None:
            num_bytes = draw.randint(1, 300_000)
            outcomes.append(await it.hand_over(f"r{name}", num_bytes=num_bytes))

        async with anyio.create_task_group() as tasks:
            for name in names:
                tasks.start_soon(one, name)
        assert outcomes == [Outcome(None, collected=True)] * 6


async def test_parts_in_any_order(ends: Ends) -> None:
    async with crossing(ends) as it:
        for order in itertools.permutations(range(3)):
            assert await it.hand_over(num_parts=3, order=order) == Outcome(None, collected=True)


async def test_pieces_that_land_in_any_order(ends: Ends) -> None:
    """Over the connection, pieces are cut as the network likes; what is not whole is not used."""
    offers: list[Offer] = []

    async def lands(take: Take, into: Path) -> None:
        await scatters(take, into)
        assert not offers[-1].collected.is_set()

    async with crossing(ends, lands) as it:
        for num_bytes in (1, 6, 1000, 300_001):
            outcome = await it.hand_over(num_bytes=num_bytes, num_parts=2, offered=offers.append)
            assert outcome == Outcome(None, collected=True)


DONE, INSTEAD, BUSY = b"\x06", b"\x15", b"\x16"


@pytest.mark.parametrize(
    "early",
    [
        DONE + bytes(4),
        INSTEAD + bytes(4),
        DONE,  # and its number later, after another DONE
        DONE * 10,
        BUSY + DONE + b"\xff" * 4,
        INSTEAD + bytes(4) + DONE + bytes(4),
        bytes(5),
    ],
)
async def test_an_acknowledgement_out_of_turn_frees_nothing(ends: Ends, early: bytes) -> None:
    """It is said before there was anything to acknowledge."""
    async with crossing(ends) as it:
        it.proxy.early = early
        for num_parts in (1, 2):
            outcome = await it.hand_over(num_parts=num_parts)
            assert not outcome.collected
        it.proxy.early = b""
        assert await it.hand_over() == Outcome(None, collected=True)


async def test_signs_of_life_out_of_turn_do_no_harm(ends: Ends) -> None:
    async with crossing(ends) as it:
        it.proxy.early = BUSY * 3
        assert await it.hand_over(num_parts=2) == Outcome(None, collected=True)


async def test_an_acknowledgement_that_is_said_again_frees_nothing(ends: Ends) -> None:
    """What the collector said of a former try is heard in the next."""
    async with crossing(ends) as it:
        assert await it.hand_over() == Outcome(None, collected=True)
        it.proxy.early = bytes(it.proxy.said[0][-5:])
        assert it.proxy.early.startswith(DONE)
        assert not (await it.hand_over()).collected


async def test_an_acknowledgement_comes_while_it_is_collected_again(ends: Ends) -> None:
    """The first try has all of it, its DONE is late; the second is at it when everything goes."""
    late, begun, gone = anyio.Event(), anyio.Event(), anyio.Event()

    async def second() -> None:
        begun.set()
        await gone.wait()

    async def takes(take: Take, into: Path) -> None:
        if late.is_set():
            await second()
        await take()

    async def gate(way: str, connection: int, passed: int) -> None:
        if (connection, way, passed > 0) == (0, "forth", True):
            late.set()
            await begun.wait()
        if (connection, way, passed, ends[1]) == (1, "back", 0, ()):
            await second()

    async with crossing(ends, takes) as it, anyio.create_task_group() as tasks:
        it.proxy.gate = gate
        offers: list[Offer] = []

        async def again() -> None:
            await late.wait()
            outcome = await it.collect_again(offers[0])
            assert outcome is None or outcome.code is Code.LOST

        tasks.start_soon(again)
        first = await it.hand_over(offered=offers.append)
        assert first == Outcome(None, collected=True)
        gone.set()


async def test_who_was_given_up_has_all_of_it_or_nothing(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was silent for longer than the door waits, as one that was stopped, and then takes."""
    monkeypatch.setattr(kv_transfer, "BUSY_EVERY_S", 60.0)
    async with crossing(ends, delays, stall_s=0.2) as it:
        outcome = await it.hand_over(num_bytes=300_000)
        assert ends[1] == () or not outcome.collected
        if ends[1] and not ends[1][0].lasting:
            assert outcome.failure is not None  # what it read may be anything


@pytest.mark.parametrize("seed", range(8))
async def test_any_disorder_ends_right_or_lost(ends: Ends, seed: int) -> None:
    draw = random.Random(seed)

    async def shuffles(take: Take, into: Path) -> None:
        await draw.choice([scatters, repeats, refuses, at_once])(take, into)

    async def gate(way: str, connection: int, passed: int) -> None:
        await anyio.sleep(draw.choice([0.0, 0.0, 0.01]))

    async with crossing(ends, shuffles) as it:
        it.proxy.gate = gate
        for _ in range(4):
            said = [draw.choice([DONE, INSTEAD, BUSY, draw.randbytes(4)]) for _ in range(3)]
            it.proxy.early = b"".join(said[: draw.randint(0, 3)])
            num_parts = draw.randint(1, 4)
            order = draw.sample(range(num_parts), num_parts)
            num_bytes = draw.randint(1, 200_000)
            await it.hand_over(num_bytes=num_bytes, num_parts=num_parts, order=order)


@pytest.mark.parametrize(
    ("text", "ways"),
    [
        ("shared", ("shared",)),
        ("nixl,shared", ("nixl", "shared")),
        ("tcp", ()),
        ("shared,tcp", ("shared",)),
    ],
)
def test_ways_in_settings(text: str, ways: tuple[str, ...]) -> None:
    assert parse_ways(text) == ways


@pytest.mark.parametrize("text", ["", "udp", "shared,", "Shared"])
def test_ways_that_there_are_not(text: str) -> None:
    with pytest.raises(ValueError, match="is none of"):
        parse_ways(text)
