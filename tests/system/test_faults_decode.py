"""A decode worker is lost, left alone, or told something late."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import anyio
import msgspec
import pytest

from origin_gpu.handover import Collected, Prefill, Prefilled, Resume, WorkerEvent
from origin_gpu.kv_transfer import Wanted
from routing import wire
from routing.errors import Code
from routing.link import Link
from tests.system.faults import (
    PATIENCE_S,
    Heard,
    hear,
    ids,
    metric,
    network,
    nothing_in_flight,
    request_to,
    restart,
    told_of,
    wait_served,
    worker_words,
)
from tests.system.procs import linked, worker_processes
from tests.system.world import Shape, World, counted, world

pytestmark = pytest.mark.system
LEASE_S = 1.0


async def test_a_killed_decode_worker_loses_and_doubles_no_token(tmp_path: Path) -> None:
    """Case 2: with 20 streams in flight; once it is back, requests are split again."""
    num_streams = 20
    shape = Shape(step_s=0.05)  # none has ended when the last has begun
    async with world(tmp_path, shape) as w:
        streams = [Heard() for _ in range(num_streams)]
        prompts = ["A" * n + chr(33 + n) for n in range(num_streams)]
        async with anyio.create_task_group() as tasks:
            for heard, prompt in zip(streams, prompts, strict=True):
                tasks.start_soon(hear, w, heard, prompt, 60)
            for heard in streams:
                await heard.until(3)
            w.processes["weur-decode"].kill()
        for heard, prompt in zip(streams, prompts, strict=True):
            assert heard.text == counted(prompt, 60)
            assert (heard.errors, heard.num_done) == ([], 1)
            assert heard.usage["completion_tokens"] == 60
        assert await metric(w, "weur-front", "edgefire_front_second_tries_total") == num_streams
        await w.settled("weur-prefill")
        await restart(w, "weur-decode", worker_words(w, "decode", shape=shape))
        await wait_served(w)
        with anyio.fail_after(PATIENCE_S):  # the prefill worker may serve a few more alone
            while not (await w.worker("weur-decode")).in_flight:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(hear, w, heard := Heard(), "!", 20)
                    await heard.until(3)
                    if (await w.worker("weur-decode")).in_flight:
                        break
        await w.settled("weur-prefill", "weur-decode")
        await nothing_in_flight(w)


@dataclass
class Pair:
    """Two workers, a way to speak to each, and the network between their KV doors."""

    made: World
    prefill: Link[WorkerEvent]
    decode: Link[WorkerEvent]

    async def asked(self, **other: object) -> wire.Generate:
        return await request_to(
            self.made, "weur-prefill", **{"num_prompt": 300, "max_tokens": 8, **other}
        )

    async def resumed(self, asked: wire.Generate, prefilled: Prefilled) -> list[WorkerEvent]:
        with anyio.fail_after(PATIENCE_S):
            async with self.decode.open(Resume(asked, prefilled)) as rest:
                return [event async for event in rest]

    async def handed_over(self, last: int = 65) -> None:
        """One request goes the whole way, and its tokens are right."""
        asked = await self.asked(last=last, request_id=f"fine-{last}")
        async with self.prefill.open(Prefill(asked)) as held:
            answer = aiter(held)
            prefilled = await anext(answer)
            assert isinstance(prefilled, Prefilled)
            rest = await self.resumed(asked, prefilled)
            assert await anext(answer) == Collected()
        assert [*prefilled.first.ids, *ids(rest)] == list(range(last + 1, last + 9))
        assert isinstance(rest[-1], wire.Finish)


def code_of(events: list[WorkerEvent]) -> Code | None:
    """Of the fault that is all that was answered; None when it went well."""
    match events:
        case [wire.Fault() as fault]:
            return fault.code
    assert isinstance(events[-1], wire.Finish)
    return None


async def test_blocks_are_not_written_to_by_who_has_left(tmp_path: Path) -> None:
    """Case 3: given up while its KV comes in, in a pool for one; the next must not see it."""
    shape = Shape(worker_flags=("--kv-ways", "tcp", "--kv-tokens", "512"))
    async with (
        worker_processes(tmp_path, shape) as made,
        linked(made, "weur-prefill") as prefill,
        linked(made, "weur-decode") as decode,
        told_of(decode, made, prefill) as door,
        network(f"http://{door}") as net,
        told_of(decode, made, prefill, net.address),
    ):
        pair = Pair(made, prefill, decode)
        for n in range(3):
            net.back, net.act, net.stopped = 1000 + n, "hold", anyio.Event()
            asked = await pair.asked(request_id=f"left-{n}")
            async with prefill.open(Prefill(asked)) as held:
                prefilled = await anext(aiter(held))
                assert isinstance(prefilled, Prefilled)
                async with decode.open(Resume(asked, prefilled)):
                    with anyio.fail_after(PATIENCE_S):
                        await net.stopped.wait()
                net.let_on()  # what was held arrives after its reader has left
            await pair.handed_over(90 + n)
        await made.settled("weur-prefill", "weur-decode")


async def done_is_lost(pair: Pair, hold_after: Callable[[int], None]) -> None:
    """The lease frees what was collected without a word; decode has its answer all the same."""
    asked = await pair.asked()
    async with pair.prefill.open(Prefill(asked)) as held:
        answer = aiter(held)
        prefilled = await anext(answer)
        assert isinstance(prefilled, Prefilled)
        assert prefilled.ticket is not None
        ticket = prefilled.ticket
        wanted = Wanted(
            secret=pair.made.secret,
            request_id=ticket.request_id,
            epoch=ticket.epoch,
            layout_digest=ticket.layout.digest,
        )
        hold_after(4 + len(msgspec.msgpack.encode(wanted)))
        rest = await pair.resumed(asked, prefilled)
        assert code_of(rest) is None
        with anyio.fail_after(5 * LEASE_S):
            ended = await anext(answer)
        assert isinstance(ended, wire.Fault)
        assert ended.code is Code.LOST


async def collected_twice(pair: Pair, hold_after: Callable[[int], None]) -> None:
    asked = await pair.asked()
    async with pair.prefill.open(Prefill(asked)) as held:
        answer = aiter(held)
        prefilled = await anext(answer)
        assert isinstance(prefilled, Prefilled)
        first = await pair.resumed(asked, prefilled)
        assert await anext(answer) == Collected()
        assert code_of(first) is None
        assert code_of(await pair.resumed(asked, prefilled)) is Code.LOST


async def collected_by_two_at_once(pair: Pair, hold_after: Callable[[int], None]) -> None:
    asked = await pair.asked()
    codes: list[Code | None] = []
    async with pair.prefill.open(Prefill(asked)) as held:
        prefilled = await anext(aiter(held))
        assert isinstance(prefilled, Prefilled)

        async def one() -> None:
            rest = await pair.resumed(asked, prefilled)
            codes.append(code_of(rest))
            if codes[-1] is None:
                assert [*prefilled.first.ids, *ids(rest)] == list(range(66, 74))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one)
            tasks.start_soon(one)
    assert len(codes) == 2
    assert None in codes
    assert set(codes) <= {None, Code.LOST}


async def collected_after_hanging_up(pair: Pair, hold_after: Callable[[int], None]) -> None:
    asked = await pair.asked()
    async with pair.prefill.open(Prefill(asked)) as held:
        prefilled = await anext(aiter(held))
        assert isinstance(prefilled, Prefilled)
    await pair.made.settled("weur-prefill")
    assert code_of(await pair.resumed(asked, prefilled)) is Code.LOST


async def collected_after_the_lease(pair: Pair, hold_after: Callable[[int], None]) -> None:
    asked = await pair.asked()
    async with pair.prefill.open(Prefill(asked)) as held:
        answer = aiter(held)
        prefilled = await anext(answer)
        assert isinstance(prefilled, Prefilled)
        with anyio.fail_after(5 * LEASE_S):
            ended = await anext(answer)
        assert isinstance(ended, wire.Fault)
        assert code_of(await pair.resumed(asked, prefilled)) is Code.LOST


async def of_an_unknown_id(pair: Pair, hold_after: Callable[[int], None]) -> None:
    asked = await pair.asked()
    async with pair.prefill.open(Prefill(asked)) as held:
        prefilled = await anext(aiter(held))
        assert isinstance(prefilled, Prefilled)
        assert prefilled.ticket is not None
        other = msgspec.structs.replace(prefilled.ticket, request_id="never-heard-of")
        wrong = msgspec.structs.replace(prefilled, ticket=other)
        assert code_of(await pair.resumed(asked, wrong)) is Code.LOST
        assert code_of(await pair.resumed(asked, prefilled)) is None


WORDS: list[Callable[[Pair, Callable[[int], None]], Awaitable[None]]] = [
    done_is_lost,
    collected_twice,
    collected_by_two_at_once,
    collected_after_hanging_up,
    collected_after_the_lease,
    of_an_unknown_id,
]


@pytest.mark.slow
async def test_words_lost_doubled_late_or_of_strangers_do_no_harm(tmp_path: Path) -> None:
    """Case 4: each in turn, and after each the next hand-over is as it should be."""
    shape = Shape(worker_flags=("--kv-ways", "tcp", "--lease-s", str(LEASE_S)))
    async with (
        worker_processes(tmp_path, shape) as made,
        linked(made, "weur-prefill") as prefill,
        linked(made, "weur-decode") as decode,
        told_of(decode, made, prefill) as door,
        network(f"http://{door}") as net,
        told_of(decode, made, prefill, net.address),
    ):
        pair = Pair(made, prefill, decode)

        def hold_after(num_bytes: int) -> None:
            net.forth, net.act = num_bytes, "hold"

        for n, happens in enumerate(WORDS):
            await happens(pair, hold_after)
            net.let_on()  # too late by now
            await pair.handed_over(70 + n)
            await made.settled("weur-prefill", "weur-decode")


@pytest.mark.slow
async def test_the_same_again_is_answered_again(tmp_path: Path) -> None:
    """Case 9: a prompt that was there before, of less than a block, of whole ones, and of more."""
    async with world(tmp_path) as w:
        for num_prompt in [it for it in (1, 16, 17, 160) for _ in range(3)]:
            with anyio.fail_after(PATIENCE_S):
                answer = await w.raw("A" * num_prompt, 6)
            assert answer.json()["result"]["response"] == "BCDEFG"
            assert answer.json()["result"]["usage"]["prompt_tokens"] == num_prompt
        await w.settled("weur-prefill", "weur-decode")
        await nothing_in_flight(w)
