"""KV between a door and its collectors by every way, with a network in between that may fail."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import msgspec
import pytest

from origin_gpu.handover import KVTicket, Peer
from origin_gpu.kv_offer import Offer
from origin_gpu.kv_socket import CHUNK_BYTES, MAX_MESSAGE_BYTES
from origin_gpu.kv_transfer import DoorTransport, KVDoor, Wanted, door_address
from origin_gpu.kv_ways import Way
from routing.errors import Code, Failure
from tests.fakes.runner import counting_layout
from tests.fakes.tcp_proxy import Proxy, tcp_proxy
from tests.origin_gpu.conftest import OVER_THE_CONNECTION, Ends

SECRET = "fleet-secret"
LAYOUT = counting_layout()
OTHER_LAYOUT = counting_layout(model_digest="another model")
PATIENCE_S = 60.0


def ticket(num_bytes: int, request_id: str = "r1#1", num_parts: int = 1) -> KVTicket:
    """`num_bytes` a part."""
    return KVTicket(
        worker="p",
        url="http://127.0.0.1:1",
        request_id=request_id,
        epoch="life",
        num_tokens=1,
        num_bytes=num_bytes * num_parts,
        layout=msgspec.structs.replace(LAYOUT, tp_size=num_parts),
        lease_s=PATIENCE_S,
        parts=tuple(range(num_parts)),
    )


def peer(address: str) -> Peer:
    return Peer(name="p", role="prefill", url="http://127.0.0.1:1", kv_address=address)


@dataclass
class Ground:
    folder: Path
    door: KVDoor
    proxy: Proxy
    ways: Sequence[Way]  # of the collector
    offered: Path  # where what is on offer lies: a folder as `kv_files` makes them

    def write(self, num_bytes: int, seed: int = 0) -> Path:
        path = self.offered / f"{seed}.kv"
        path.write_bytes(random.Random(seed).randbytes(num_bytes))
        return path

    async def collect(
        self, it: KVTicket, name: str = "in", *, secret: str = SECRET, stall_s: float = PATIENCE_S
    ) -> bytes:
        into = self.folder / name
        with anyio.fail_after(PATIENCE_S):
            transport = DoorTransport(secret, ways=self.ways, stall_s=stall_s)
            went = await transport.collect(it, peer(self.proxy.address), into)
        assert went == (self.ways[0].kind if self.ways else "tcp")
        return into.read_bytes()


@asynccontextmanager
async def ground(
    folder: Path, ends: Ends = OVER_THE_CONNECTION, *, stall_s: float = PATIENCE_S
) -> AsyncGenerator[Ground, None]:
    offered = folder / "edgefire-kv-1-0123abcd"
    offered.mkdir(mode=0o700)
    with KVDoor("127.0.0.1", SECRET, ways=ends[0], stall_s=stall_s) as door:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(door.run)
            async with tcp_proxy(door.address) as proxy:
                yield Ground(folder, door, proxy, ends[1], offered)
            tasks.cancel_scope.cancel()
        assert door.num_offers == 0


async def wait_collected(offer: Offer) -> None:
    with anyio.fail_after(PATIENCE_S):
        await offer.collected.wait()


@pytest.mark.parametrize(
    "num_bytes", [1, 1000, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5_000_001]
)
async def test_every_byte_arrives_and_only_then_is_it_collected(
    tmp_path: Path, ends: Ends, num_bytes: int
) -> None:
    async with ground(tmp_path, ends) as it:
        path = it.write(num_bytes)
        with it.door.offer(ticket(num_bytes), path) as offer:
            offer.exported()
            assert await it.collect(ticket(num_bytes)) == path.read_bytes()
            await wait_collected(offer)


async def test_many_at_once(tmp_path: Path, ends: Ends) -> None:
    draw = random.Random(3)
    sizes = [draw.randint(1, 300_000) for _ in range(40)]
    async with ground(tmp_path, ends) as it, anyio.create_task_group() as tasks:

        async def one(n: int, num_bytes: int) -> None:
            path, mine = it.write(num_bytes, seed=n), ticket(num_bytes, f"r{n}")
            with it.door.offer(mine, path) as offer:
                offer.exported()
                assert await it.collect(mine, f"in-{n}") == path.read_bytes()
                await wait_collected(offer)

        for n, num_bytes in enumerate(sizes):
            tasks.start_soon(one, n, num_bytes)


@pytest.mark.parametrize(
    ("secret", "change", "code", "said"),
    [
        ("guessed", {}, Code.LOST, "secret"),
        ("", {}, Code.LOST, "secret"),
        (SECRET, {"request_id": "r1#2"}, Code.LOST, "r1#2"),
        (SECRET, {"epoch": "another"}, Code.LOST, "life another"),
        (SECRET, {"layout": OTHER_LAYOUT}, Code.INCOMPATIBLE, OTHER_LAYOUT.digest[:12]),
        (SECRET, {"num_bytes": 99}, Code.INCOMPATIBLE, "100 bytes"),
    ],
)
async def test_what_is_refused_leaves_the_offer_as_it_was(
    tmp_path: Path, ends: Ends, secret: str, change: dict[str, object], code: Code, said: str
) -> None:
    async with ground(tmp_path, ends) as it:
        path = it.write(100)
        with it.door.offer(ticket(100), path) as offer:
            offer.exported()
            wrong = msgspec.structs.replace(ticket(100), **change)
            with pytest.raises(Failure, match=said) as refused:
                await it.collect(wrong, secret=secret)
            assert refused.value.code is code
            assert not (tmp_path / "in").exists()
            assert not offer.collected.is_set()
            assert await it.collect(ticket(100)) == path.read_bytes()


async def test_who_comes_early_waits_for_the_file(tmp_path: Path, ends: Ends) -> None:
    async with ground(tmp_path, ends) as it, anyio.create_task_group() as tasks:
        got: list[bytes] = []

        async def collect() -> None:
            got.append(await it.collect(ticket(100), stall_s=0.2))  # of a transfer, not of a step

        path = it.offered / "0.kv"
        with it.door.offer(ticket(100), path) as offer:
            tasks.start_soon(collect)
            await anyio.sleep(0.5)
            assert not got
            it.write(100)
            offer.exported()
            await wait_collected(offer)
    assert got == [path.read_bytes()]


async def test_who_waits_learns_that_the_hold_has_ended(tmp_path: Path, ends: Ends) -> None:
    async with ground(tmp_path, ends) as it, anyio.create_task_group() as tasks:
        refused: list[Failure] = []

        async def collect() -> None:
            with pytest.raises(Failure, match="not held here any more") as failed:
                await it.collect(ticket(100))
            refused.append(failed.value)

        with it.door.offer(ticket(100), it.offered / "9.kv") as offer:
            tasks.start_soon(collect)
            with anyio.fail_after(PATIENCE_S):
                while not offer._news.statistics().tasks_waiting:
                    await anyio.sleep(0.005)
    assert [failure.code for failure in refused] == [Code.LOST]


@pytest.mark.parametrize("act", ["cut", "hold"])
async def test_a_transfer_that_breaks_off_can_be_tried_again(tmp_path: Path, act: str) -> None:
    """Cut in the middle, or silent: both ends let go, the offer stays."""
    num_bytes = 20_000_000  # more than the kernel buffers on the way
    async with ground(tmp_path, stall_s=0.3) as it:
        path = it.write(num_bytes)
        with it.door.offer(ticket(num_bytes), path) as offer:
            offer.exported()
            it.proxy.act, it.proxy.back = act, 3_000_000  # type: ignore[assignment]
            said = "closed the connection after" if act == "cut" else "neither sent nor took"
            with pytest.raises(Failure, match=rf"{said}.*of {num_bytes} bytes") as failed:
                await it.collect(ticket(num_bytes), stall_s=0.3)
            assert failed.value.code is Code.LOST
            assert not offer.collected.is_set()
            it.proxy.back = 1 << 60
            assert await it.collect(ticket(num_bytes), "again") == path.read_bytes()
            await wait_collected(offer)


async def test_without_an_acknowledgement_it_is_not_collected(tmp_path: Path) -> None:
    async with ground(tmp_path, stall_s=0.3) as it:
        path = it.write(100)
        wanted = Wanted(secret=SECRET, request_id="r1#1", epoch="life", layout_digest=LAYOUT.digest)
        it.proxy.act, it.proxy.forth = "hold", 4 + len(msgspec.msgpack.encode(wanted))
        with it.door.offer(ticket(100), path) as offer:
            offer.exported()
            assert await it.collect(ticket(100)) == path.read_bytes()
            with anyio.fail_after(PATIENCE_S):
                await it.proxy.closed.wait()
            assert it.proxy.stopped.is_set()
            assert not offer.collected.is_set()


async def test_giving_up_closes_the_connection(tmp_path: Path) -> None:
    async with ground(tmp_path) as it:
        it.write(20_000_000)
        with it.door.offer(ticket(20_000_000), it.offered / "0.kv") as offer:
            offer.exported()
            it.proxy.act, it.proxy.back = "hold", 1_000_000
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(it.collect, ticket(20_000_000))
                await it.proxy.stopped.wait()
                tasks.cancel_scope.cancel()
            with anyio.fail_after(PATIENCE_S):
                await it.proxy.closed.wait()
            assert not offer.collected.is_set()


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x05\0\0\0abcde",
        (MAX_MESSAGE_BYTES + 1).to_bytes(4, "little"),
        b"\x02\0",
        b"",
    ],
)
async def test_strangers_do_not_disturb_the_door(tmp_path: Path, said: bytes) -> None:
    async with ground(tmp_path, stall_s=0.3) as it:
        path = it.write(100)
        host, _, port = it.door.address.rpartition(":")
        async with await anyio.connect_tcp(host, int(port)) as stranger:
            if said:
                await stranger.send(said)
            with (
                anyio.fail_after(PATIENCE_S),
                pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)),
            ):
                await stranger.receive()
        with it.door.offer(ticket(100), path) as offer:
            offer.exported()
            assert await it.collect(ticket(100)) == path.read_bytes()


async def test_a_door_that_is_gone(tmp_path: Path) -> None:
    with KVDoor("127.0.0.1", SECRET) as door:
        address = door.address
    with pytest.raises(Failure, match="cannot be had from p") as failed:
        await DoorTransport(SECRET).collect(ticket(100), peer(address), tmp_path / "in")
    assert failed.value.code is Code.LOST


async def test_a_file_that_cannot_be_written(tmp_path: Path, ends: Ends) -> None:
    async with ground(tmp_path, ends) as it:
        it.write(100)
        with it.door.offer(ticket(100), it.offered / "0.kv") as offer:
            offer.exported()
            with pytest.raises(Failure, match="No such file") as failed:
                await it.collect(ticket(100), "no folder/in")
            assert failed.value.code is Code.LOST
            assert not offer.collected.is_set()


@pytest.mark.parametrize(
    ("kv_address", "url", "expected"),
    [
        ("127.0.0.1:80", "http://10.0.0.1:1", ("127.0.0.1", 80)),
        ("[::1]:80", "http://10.0.0.1:1", ("::1", 80)),
        ("0.0.0.0:80", "http://10.0.0.1:1", ("10.0.0.1", 80)),
        ("[::]:80", "http://[fd00::7]:1", ("fd00::7", 80)),
    ],
)
def test_where_a_door_is(kv_address: str, url: str, expected: tuple[str, int]) -> None:
    assert door_address(Peer(name="p", role="both", url=url, kv_address=kv_address)) == expected


async def test_what_is_there_goes_while_the_rest_is_computed(tmp_path: Path) -> None:
    """Over the connection, part by part; a pause as long as the lease is none."""
    whole = ticket(300)
    early = msgspec.structs.replace(whole, num_ready=10, num_tokens=30, lease_s=PATIENCE_S)
    async with ground(tmp_path) as it, anyio.create_task_group() as tasks:
        got: list[bytes] = []

        async def collect() -> None:
            got.append(await it.collect(early, stall_s=0.2))

        path = it.write(100)
        with it.door.offer(early, path) as offer:
            offer.wrote(100, 10)
            tasks.start_soon(collect)
            with anyio.fail_after(PATIENCE_S):
                while it.proxy.num_back < 100:
                    await anyio.sleep(0.005)
            await anyio.sleep(0.5)
            for num_bytes, num_tokens in ((200, 20), (300, 30)):
                with path.open("ab") as file:
                    file.write(bytes([num_tokens]) * 100)
                offer.wrote(num_bytes, num_tokens)
            await wait_collected(offer)
    assert got == [path.read_bytes()]


async def test_a_hold_that_ends_while_it_is_collected_is_told(tmp_path: Path) -> None:
    early = msgspec.structs.replace(ticket(300), num_ready=10, num_tokens=30)
    async with ground(tmp_path) as it, anyio.create_task_group() as tasks:
        failures: list[Failure] = []

        async def collect() -> None:
            with pytest.raises(Failure) as failed:
                await it.collect(early)
            failures.append(failed.value)

        path = it.write(100)
        with it.door.offer(early, path) as offer:
            offer.wrote(100, 10)
            tasks.start_soon(collect)
            with anyio.fail_after(PATIENCE_S):
                while it.proxy.num_back < 100:
                    await anyio.sleep(0.005)
    assert [failure.code for failure in failures] == [Code.LOST]
