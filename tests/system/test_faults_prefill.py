"""A prefill worker, or who waits for it, is lost around a hand-over."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import anyio
import httpx2
import pytest

from origin_gpu.handover import Computing, Prefill, Prefilled, Resume
from routing import wire
from routing.errors import Code
from tests.system.faults import (
    PATIENCE_S,
    Heard,
    faulty_words,
    hear,
    ids,
    network,
    nothing_in_flight,
    request_to,
    restart,
    status_of,
    told_of,
    wait_served,
)
from tests.system.procs import linked, worker_processes
from tests.system.world import Shape, World, counted, world

pytestmark = pytest.mark.system
ANSWER_S = 5 * 2.0  # a loss is worked around within 2 s


@pytest.mark.parametrize("moment", ["before the read", "after the read"])
async def test_a_killed_prefill_worker_costs_no_token(tmp_path: Path, moment: str) -> None:
    """Case 1: before decode reads the KV, and after it has: the same answer, without a hang."""
    shape = Shape(step_s=0.02)
    async with world(tmp_path, shape) as w:
        heard = Heard()
        async with anyio.create_task_group() as tasks:
            if moment == "before the read":
                w.processes["weur-decode"].pause()
            tasks.start_soon(hear, w, heard, "!!", 60)
            if moment == "before the read":
                with anyio.fail_after(PATIENCE_S):
                    while not (await w.worker("weur-prefill")).held:
                        await anyio.sleep(0.002)
            else:
                await heard.until(5)
            w.processes["weur-prefill"].kill()
            w.processes["weur-decode"].go_on()
            with anyio.fail_after(ANSWER_S + 60 * shape.step_s):
                while not heard.num_done:
                    await anyio.sleep(0.01)
        assert (heard.text, heard.errors, heard.num_done) == (counted("!!", 60), [], 1)
        assert heard.usage["completion_tokens"] == 60
        await w.settled("weur-decode")
        await nothing_in_flight(w)


async def test_a_prefill_worker_killed_in_the_middle_of_the_read(tmp_path: Path) -> None:
    """Case 1: decode says at once that the KV is lost, and computes the rest when asked to."""
    shape = Shape(worker_flags=("--kv-ways", "tcp"))
    async with (
        worker_processes(tmp_path, shape) as made,
        linked(made, "weur-prefill") as prefill,
        linked(made, "weur-decode") as decode,
        told_of(decode, made, prefill) as door,
        network(f"http://{door}") as net,
        told_of(decode, made, prefill, net.address),
    ):
        net.back, net.act = 4000, "hold"
        asked = await request_to(made, "weur-prefill", num_prompt=2000, max_tokens=8)
        async with prefill.open(Prefill(asked)) as held:
            events = aiter(held)
            while isinstance(prefilled := await anext(events), Computing):
                pass
            assert isinstance(prefilled, Prefilled)
            async with decode.open(Resume(asked, prefilled)) as rest:
                with anyio.fail_after(PATIENCE_S):
                    await net.stopped.wait()
                made.processes["weur-prefill"].kill()
                net.cut()  # as the kernel of the dead does
                with anyio.fail_after(ANSWER_S):
                    [fault] = [event async for event in rest]
        assert isinstance(fault, wire.Fault)
        assert fault.code is Code.LOST
        await made.settled("weur-decode")
        got = list(prefilled.first.ids)
        again = await request_to(
            made, "weur-decode", num_prompt=2000, max_tokens=8, generated_ids=tuple(got)
        )
        async with decode.open(again) as whole:
            got += ids([event async for event in whole])
        assert got == list(range(66, 74))
        await made.settled("weur-decode")


@pytest.mark.slow
async def test_a_prefill_that_fails_is_told_at_once(tmp_path: Path) -> None:
    """Case 5: an error inside the step. The decode worker does it all; where it fails, too, the
    client is told, and the next request is served."""
    async with world(tmp_path) as w:
        await restart(w, "weur-prefill", faulty_words(w, "prefill", "--poison", str(ord("%"))))
        await wait_served(w)
        with anyio.fail_after(ANSWER_S):
            answer = await w.raw("AAA%", 8)
        assert answer.json()["result"]["response"] == counted("%", 8)
        await restart(w, "weur-decode", faulty_words(w, "decode", "--poison", str(ord("%"))))
        await wait_served(w)
        with anyio.fail_after(ANSWER_S):
            failed = await w.raw("AAA%", 8)
        assert await status_of(failed) == (503, 7009)
        assert failed.headers["retry-after"]
        assert "memory" not in failed.text
        await wait_served(w)
        assert (await w.raw("A", 5)).json()["result"]["response"] == "BCDEF"
        await w.settled("weur-prefill", "weur-decode")
        await nothing_in_flight(w)


async def ask_in_vain(w: World) -> None:
    with suppress(httpx2.TransportError):
        await w.raw("A" * 100, 8)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["edge killed", "front killed", "front paused"])
async def test_kv_that_nobody_will_ask_for_is_freed(tmp_path: Path, lost: str) -> None:
    """Case 6: prefilled, not yet taken by decode. Where nobody can say so, the lease ends it."""
    shape = Shape(worker_flags=("--lease-s", "2" if lost == "front paused" else "600"))
    async with world(tmp_path, shape) as w:
        assert (await w.raw("A", 2)).status_code == 200
        w.processes["weur-decode"].pause()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask_in_vain, w)
            with anyio.fail_after(PATIENCE_S):
                while not (await w.worker("weur-prefill")).held:
                    await anyio.sleep(0.002)
            match lost:
                case "edge killed":
                    w.processes["edge"].kill()
                case "front killed":
                    w.processes["weur-front"].kill()
                case "front paused":
                    w.processes["weur-front"].pause()
            with anyio.CancelScope(shield=True):
                await w.settled("weur-prefill", within_s=5 * 2)
            tasks.cancel_scope.cancel()
        w.processes["weur-decode"].go_on()
        if lost == "front paused":
            w.processes["weur-front"].go_on()
        await w.settled("weur-prefill", "weur-decode")
