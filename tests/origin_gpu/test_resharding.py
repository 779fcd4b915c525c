"""A decode worker collects KV that engines with another number of ranks have computed.

No engine has more than one rank yet. So the test is the other worker: its door is real, and it
offers what each of its ranks would have exported. The decode worker is real, with a real engine
process, of which its KV says that it is one rank of so many: that counts on only if every token of
every head of its rank is in its place.
"""

from __future__ import annotations

import random
import sys
from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from infire.kv_layout import KVLayout
from origin_gpu.handover import KVTicket, Peer, Prefilled, Resume, WorkerEvent
from origin_gpu.kv_offer import Offer
from origin_gpu.kv_transfer import KVDoor
from routing import wire
from routing.errors import Code
from tests.fakes.runner import exported_kv
from tests.origin_gpu.local_workers import COUNTING_ENGINE, SECRET, LocalWorker, ids, local_worker

NUM_HEADS = 4
PATIENCE_S = 60.0


class Giver:
    """Another worker, whose engine has `tp_size` ranks."""

    def __init__(self, door: KVDoor, folder: Path, decode: LocalWorker) -> None:
        self.door = door
        self.folder = folder
        self.decode = decode
        self.offered: Offer | None = None

    @property
    def peer(self) -> Peer:
        url = "http://127.0.0.1:1"
        return Peer(name="p", role="prefill", url=url, kv_address=self.door.address)

    def prefilled(self, asked: wire.Generate, tp_size: int, **other: Any) -> Prefilled:
        layout = self.whole.cut(tp_size, 0)
        num_tokens = len(asked.token_ids)
        ticket = KVTicket(
            worker="p",
            url=self.peer.url,
            request_id="r1#1",
            epoch="life",
            num_tokens=num_tokens,
            num_bytes=len(layout.parts) * layout.exported_bytes(num_tokens),
            layout=layout,
            lease_s=PATIENCE_S,
            parts=layout.parts,
        )
        first = wire.Tokens(((asked.token_ids[-1] + 1) % 256,))
        return Prefilled(first=first, ticket=msgspec.structs.replace(ticket, **other))

    @property
    def whole(self) -> KVLayout:
        layout = self.decode.app.worker.engine.must_be_up().layout
        return layout.cut(1, 0)

    async def resume(
        self, asked: wire.Generate, given: Prefilled, order: list[int] | None = None
    ) -> list[WorkerEvent]:
        """What the decode worker says, with every part on offer, in their order or another."""
        ticket = given.ticket
        assert ticket is not None
        parts = ticket.parts if order is None else tuple(order)
        with ExitStack() as stack:
            paths = [self.folder / f"{part}.kv" for part in parts]
            for part, path in zip(parts, paths, strict=True):
                rank = msgspec.structs.replace(ticket.layout, tp_rank=part)
                path.write_bytes(exported_kv(rank, asked.token_ids))
                stack.callback(path.unlink)
            mine = msgspec.structs.replace(ticket, parts=parts)
            self.offered = stack.enter_context(self.door.offer(mine, *paths))
            self.offered.exported()
            return await self.decode.ask(Resume(asked, given))


@asynccontextmanager
async def giver(
    home: Path, *, tp_size: int = 1, tp_rank: int = 0, ways: str = "tcp"
) -> AsyncGenerator[Giver, None]:
    ranks = ("--heads", NUM_HEADS, "--tp-size", tp_size, "--tp-rank", tp_rank)
    command = (sys.executable, str(COUNTING_ENGINE), *map(str, ranks))
    offered = home / "offered"
    offered.mkdir()
    async with local_worker(home, "d", "decode", engine_command=command, kv_ways=()) as decode:
        with KVDoor("127.0.0.1", SECRET) as door:
            it = Giver(door, offered, decode)
            async with decode.watching(it.peer, decode.peer), anyio.create_task_group() as tasks:
                tasks.start_soon(door.run)
                yield it
                tasks.cancel_scope.cancel()
        assert leftovers(decode) == []


def leftovers(worker: LocalWorker) -> list[Path]:
    """Files of KV that nobody needs any more."""
    folders = worker.app.worker.kv_files._folders
    return [path for folder in folders for path in folder.glob("*.kv")]


@pytest.mark.parametrize(("tp_size", "tp_rank"), [(1, 0), (2, 1), (4, 2), (8, 5)])
async def test_kv_of_any_number_of_ranks_is_gone_on_with(
    tmp_path: Path, tp_size: int, tp_rank: int
) -> None:
    async with giver(tmp_path, tp_size=tp_size, tp_rank=tp_rank) as it:
        for theirs in (1, 2, 4, 8):
            for num_prompt in (1, 33, 150):
                asked = it.decode.generate(65, num_prompt=num_prompt, max_tokens=5)
                events = await it.resume(asked, it.prefilled(asked, theirs))
                assert ids(events) == [67, 68, 69, 70]
                assert it.offered is not None
                assert it.offered.collected.is_set()
                assert leftovers(it.decode) == []
        assert it.decode.report.prompt_tokens_computed == 0


async def test_parts_may_come_in_any_order(tmp_path: Path) -> None:
    draw = random.Random(5)
    async with giver(tmp_path) as it:
        for _ in range(6):
            order = draw.sample(range(4), 4)
            asked = it.decode.generate(65, num_prompt=31, max_tokens=5)
            events = await it.resume(asked, it.prefilled(asked, 4), order)
            assert ids(events) == [67, 68, 69, 70]


async def test_a_part_that_is_missing_is_refused(tmp_path: Path) -> None:
    """By name, before anything moves; and whatever the door then does, nothing wrong is taken."""
    async with giver(tmp_path) as it:
        asked = it.decode.generate(65, num_prompt=31, max_tokens=5)
        size = it.whole.cut(2, 0).exported_bytes(31)
        for change, code, said in (
            ({"parts": (1,), "num_bytes": size}, Code.INCOMPATIBLE, "not all on ranks [1] of 2"),
            ({"num_bytes": size}, Code.INCOMPATIBLE, f"not {2 * size}"),
        ):
            [fault] = await it.resume(asked, it.prefilled(asked, 2, **change))
            assert isinstance(fault, wire.Fault)
            assert fault.code is code
            assert said in fault.detail
            assert it.offered is not None
            assert not it.offered.collected.is_set()
        assert ids(await it.resume(asked, it.prefilled(asked, 2))) == [67, 68, 69, 70]


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ([0, 0], "rank 0 came, where that of [1, 2, 3] is missing"),
        ([3, 7], "rank 7 came, where that of [0, 1, 2] is missing"),
        ([0, 2], "closed the connection"),
    ],
)
async def test_a_door_that_gives_other_parts_is_not_believed(
    tmp_path: Path, order: list[int], said: str
) -> None:
    """One twice, one that was not promised, or not all: it is as good as lost."""
    async with giver(tmp_path) as it:
        asked = it.decode.generate(65, num_prompt=31, max_tokens=5)
        ticket = it.prefilled(asked, 4).ticket
        assert ticket is not None
        paths = [it.folder / f"{part}-{n}.kv" for n, part in enumerate(order)]
        for part, path in zip(order, paths, strict=True):
            path.write_bytes(exported_kv(it.whole.cut(4, part % 4), asked.token_ids))
        with it.door.offer(msgspec.structs.replace(ticket, parts=(0, 1)), *paths) as offer:
            offer.files = tuple(zip(order, paths, strict=True))
            offer.exported()
            [fault] = await it.decode.ask(Resume(asked, it.prefilled(asked, 4)))
            assert isinstance(fault, wire.Fault)
            assert fault.code is Code.LOST
            assert said in fault.detail
            assert offer.collected.is_set() == (order == [0, 2])  # all that there was
            assert leftovers(it.decode) == []


def test_a_ticket_names_each_part_once() -> None:
    layout = KVLayout(groups=(), dtype="float32", model_digest="m", tp_size=2)
    about = {"worker": "p", "url": "u", "request_id": "r", "epoch": "e", "num_tokens": 1}
    about |= {"num_bytes": 1, "layout": msgspec.to_builtins(layout), "lease_s": 1.0}
    assert msgspec.convert(about, KVTicket).parts == (0,)
    for parts in ([], [0, 0], [0, 2], [-1]):
        with pytest.raises(msgspec.ValidationError, match="parts"):
            msgspec.convert(about | {"parts": parts}, KVTicket)
