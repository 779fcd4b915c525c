"""Workers that come back as others, that sleep, and that do not fit together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import httpx2
import msgspec
import pytest

from infire.kv_layout import WeightCodec
from origin_gpu.handover import KVTicket, Prefill, Prefilled, Resume
from routing import wire
from routing.errors import Code
from tests.fakes.model_folder import make_counting_folder
from tests.system.faults import (
    PATIENCE_S,
    Heard,
    hear,
    ids,
    metric,
    nothing_in_flight,
    request_to,
    restart,
    status_of,
    told_of,
    wait_served,
    worker_words,
)
from tests.system.procs import linked, wait_ready, worker_processes
from tests.system.world import Shape, World, counted, front_words, world

pytestmark = pytest.mark.system


async def test_kv_of_a_former_life_is_refused(tmp_path: Path) -> None:
    """Case 7: restarted at its address, with KV under the same id: its own life's alone counts."""
    async with worker_processes(tmp_path) as made, linked(made, "weur-decode") as decode:
        asked = await request_to(made, "weur-prefill", num_prompt=100, max_tokens=8)
        async with linked(made, "weur-prefill") as prefill, prefill.open(Prefill(asked)) as held:
            stale = await anext(aiter(held))
        assert isinstance(stale, Prefilled)
        await restart(made, "weur-prefill", worker_words(made, "prefill"))
        await wait_ready(made, made.processes["weur-prefill"])
        async with (
            linked(made, "weur-prefill") as prefill,
            told_of(decode, made, prefill),
            prefill.open(Prefill(asked)) as held,
        ):
            fresh = await anext(aiter(held))
            assert isinstance(fresh, Prefilled)
            assert stale.ticket is not None
            assert fresh.ticket is not None
            assert fresh.ticket.request_id == stale.ticket.request_id
            assert fresh.ticket.epoch != stale.ticket.epoch
            async with decode.open(Resume(asked, stale)) as events:
                [fault] = [event async for event in events]
            assert isinstance(fault, wire.Fault)
            assert fault.code is Code.LOST
            refused = "edgefire_worker_kv_refused_total"
            assert await metric(made, "weur-prefill", refused, end="door", reason="epoch") == 1
            async with decode.open(Resume(asked, fresh)) as events:
                rest = [event async for event in events]
            assert [*fresh.first.ids, *ids(rest)] == list(range(66, 74))
        await made.settled("weur-prefill", "weur-decode")


@pytest.mark.parametrize(
    "name", ["weur-prefill", pytest.param("weur-front", marks=pytest.mark.slow)]
)
async def test_a_process_that_restarts_at_its_address_serves_again(
    tmp_path: Path, name: str
) -> None:
    """Case 7: a stream over its death is what it would have been, or ends in an error."""
    shape = Shape(step_s=0.02)
    async with world(tmp_path, shape) as w:
        before = (await w.worker(name)).epoch if name != "weur-front" else ""
        words = {
            "weur-prefill": worker_words(w, "prefill", shape=shape),
            "weur-front": front_words(w, "weur"),
        }[name]
        heard = Heard()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hear, w, heard, "!", 60)
            await heard.until(3)
            await restart(w, name, words)
        if heard.errors:  # the edge does not wait for ever for the only way there is
            assert name == "weur-front"
            assert heard.num_done == 0
            assert counted("!", 60).startswith(heard.text)
        else:
            assert (heard.text, heard.num_done) == (counted("!", 60), 1)
        await wait_ready(w, w.processes[name])
        await wait_served(w)
        if before:
            assert (await w.worker(name)).epoch != before
        await w.settled("weur-prefill", "weur-decode")
        await nothing_in_flight(w)


@pytest.mark.parametrize(
    "name", ["weur-prefill", pytest.param("weur-decode", marks=pytest.mark.slow)]
)
async def test_a_worker_that_sleeps_longer_than_its_lease(tmp_path: Path, name: str) -> None:
    """Case 7: paused for four times the lease, then woken: nothing stale is handed out, and the
    client has its answer, or an error that says so."""
    shape = Shape(step_s=0.01, worker_flags=("--lease-s", "0.5"))
    async with world(tmp_path, shape) as w:
        w.processes["weur-decode"].pause()
        answers: list[httpx2.Response] = []

        async def ask() -> None:
            answers.append(await w.raw("A" * 40, 8))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            with anyio.fail_after(PATIENCE_S):
                while not (await w.worker("weur-prefill")).held:
                    await anyio.sleep(0.002)
            if name == "weur-prefill":
                w.processes[name].pause()
                await anyio.sleep(4 * 0.5)  # the lease has to pass, and nothing else may
                w.processes[name].go_on()
            else:
                await w.settled("weur-prefill")
            w.processes["weur-decode"].go_on()
        [answer] = answers
        if answer.status_code == 200:
            assert answer.json()["result"]["response"] == "BCDEFGHI"
        else:
            assert await status_of(answer) == (503, 7009)
        await w.settled("weur-prefill", "weur-decode")
        assert (await w.raw("A", 5)).json()["result"]["response"] == "BCDEF"
        await nothing_in_flight(w)


def other_model(w: World) -> list[str]:
    folder = make_counting_folder(w.home / "other-model")
    about = msgspec.json.decode((folder / "edgefire.json").read_bytes())
    about["model_digest"] = "f" * 64
    (folder / "edgefire.json").write_bytes(msgspec.json.encode(about))
    return worker_words(w, "decode", folder=folder)


def other_tokenizer(w: World) -> list[str]:
    folder = make_counting_folder(w.home / "other-tokenizer")
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace("<|im_start|>@", "<|im_start|>?"))
    return worker_words(w, "decode", folder=folder)


@pytest.mark.slow
async def test_workers_that_do_not_fit_serve_nothing_together(tmp_path: Path) -> None:
    """Case 8: a decode worker comes back as another: 503 until it fits, never a wrong token.

    Of another tokenizer, it is of no use to the requests of the prefill worker's, which then does
    both parts of those.
    """
    async with world(tmp_path) as w:
        assert (await w.raw("A", 5)).json()["result"]["response"] == "BCDEF"
        await come_back(w, "weur-decode", other_model(w))
        for _ in range(3):
            assert await status_of(await w.raw("A", 5)) == (503, 7009)
        front = w.processes["weur-front"].url
        assert (await w.client.get(f"{front}/ready")).status_code == 503
        await w.settled("weur-prefill", "weur-decode")
        await come_back(w, "weur-decode", other_tokenizer(w))
        await wait_served(w)
        for _ in range(3):
            assert (await w.raw("A", 5)).json()["result"]["response"] == "BCDEF"
        await w.settled("weur-prefill", "weur-decode")
        await come_back(w, "weur-decode", worker_words(w, "decode"))
        await wait_served(w)
        assert (await w.raw("A", 5)).json()["result"]["response"] == "BCDEF"
        await w.settled("weur-prefill", "weur-decode")
        await nothing_in_flight(w)


@pytest.mark.slow
async def test_workers_with_blocks_of_two_sizes_fit(tmp_path: Path) -> None:
    """Case 8: KV passes in token order, so the size of a block is each engine's own affair."""
    async with world(tmp_path) as w:
        await come_back(w, "weur-decode", worker_words(w, "decode", "--block-tokens", "10"))
        await wait_served(w)
        for num_prompt in (1, 10, 16, 31, 160):
            answer = await w.raw("A" * num_prompt, 30)
            assert answer.json()["result"]["response"] == counted("A", 30)
        assert (await w.worker("weur-decode")).prompt_tokens_computed == 0
        await w.settled("weur-prefill", "weur-decode")
        await nothing_in_flight(w)


async def come_back(w: World, name: str, words: list[str]) -> None:
    """Another process in the place of `name`, which its front has heard of."""
    await wait_ready(w, await restart(w, name, words))
    epoch = (await w.worker(name)).epoch
    with anyio.fail_after(PATIENCE_S):
        while not any(it.epoch == epoch and it.ready for it in (await w.region("weur")).processes):
            await anyio.sleep(0.01)


def _layout(ticket: KVTicket, **other: Any) -> KVTicket:
    layout = msgspec.structs.replace(ticket.layout, **other)
    return msgspec.structs.replace(ticket, layout=layout)


def _group(ticket: KVTicket, **other: Any) -> KVTicket:
    [group] = ticket.layout.groups
    return _layout(ticket, groups=(msgspec.structs.replace(group, **other),))


def _ranks(ticket: KVTicket, num_copies: int) -> KVTicket:
    """As from an engine of two ranks, and part 0 of it."""
    [group] = ticket.layout.groups
    groups = (msgspec.structs.replace(group, num_copies=num_copies),)
    return _layout(ticket, groups=groups, tp_size=2)


# What is changed, and how the refusal begins that names it, with what is here where it may.
MISMATCHES: list[tuple[Callable[[KVTicket], KVTicket], str]] = [
    (lambda it: _group(it, num_heads=2), "heads [2] (here [1])"),
    (lambda it: _group(it, head_dim=2), "head_dim [2] (here [1])"),
    (lambda it: _group(it, kind="sliding", window=64), "windows [64] (here [None])"),
    (lambda it: _group(it, layers=(0, 1)), "layers [[0, 1]] (here [[0]])"),
    (lambda it: _layout(it, dtype="bfloat16"), "dtype bfloat16 (here float32)"),
    (lambda it: _ranks(it, num_copies=1), "heads [2] (here [1])"),  # each has one, not the same
    (lambda it: _layout(it, model_digest="f" * 64), "model digest ffffffffffff (here "),
    (lambda it: _layout(it, tokenizer_digest="f" * 64), "tokenizer digest ffffffffffff (here "),
    (lambda it: _layout(it, tokenizer_digest=""), "tokenizer digest none (here "),
    (
        lambda it: _layout(it, codec=WeightCodec("fp8", exact=False)),
        "codec fp8, not exact (here plain)",
    ),
    (lambda it: msgspec.structs.replace(it, num_tokens=98), "KV of 98 tokens for 101 ids"),
    (lambda it: msgspec.structs.replace(it, num_bytes=792), "KV of 792 bytes for 100 tokens"),
    (lambda it: msgspec.structs.replace(it, url="http://127.0.0.1:9"), "its ticket says http"),
]
MATCHES: list[Callable[[KVTicket], KVTicket]] = [
    lambda it: _group(it, block_tokens=3),
    lambda it: _layout(it, codec=WeightCodec("u12")),
    lambda it: _ranks(it, num_copies=2),
]


async def test_kv_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    """Case 8: each mismatch is refused at the hand-over and counted; the KV stays on offer."""
    async with (
        worker_processes(tmp_path) as made,
        linked(made, "weur-prefill") as prefill,
        linked(made, "weur-decode") as decode,
        told_of(decode, made, prefill),
    ):
        asked = await request_to(made, "weur-prefill", num_prompt=100, max_tokens=8)
        async with prefill.open(Prefill(asked)) as held:
            good = await anext(aiter(held))
            assert isinstance(good, Prefilled)
            assert good.ticket is not None
            for spoil, said in MISMATCHES:
                bad = msgspec.structs.replace(good, ticket=spoil(good.ticket))
                async with decode.open(Resume(asked, bad)) as events:
                    [fault] = [event async for event in events]
                assert isinstance(fault, wire.Fault), said
                assert fault.code is Code.INCOMPATIBLE, said
                assert fault.code.meaning.status == 503
                assert said in fault.detail
            refused = "edgefire_worker_kv_refused_total"
            count = await metric(made, "weur-decode", refused, end="collector")
            assert count == len(MISMATCHES)
            async with decode.open(Resume(asked, good)) as events:
                rest = [event async for event in events]
        assert [*good.first.ids, *ids(rest)] == list(range(66, 74))
        await made.settled("weur-prefill", "weur-decode")


async def test_kv_that_fits_all_the_same_is_taken(tmp_path: Path) -> None:
    """Case 8: blocks of another size, weights in another exact form, the same heads on two ranks:
    the door and the collector agree that it is no mismatch."""
    async with (
        worker_processes(tmp_path) as made,
        linked(made, "weur-prefill") as prefill,
        linked(made, "weur-decode") as decode,
        told_of(decode, made, prefill),
    ):
        for change in MATCHES:
            asked = await request_to(made, "weur-prefill", num_prompt=100, max_tokens=8)
            async with prefill.open(Prefill(asked)) as held:
                given = await anext(aiter(held))
                assert isinstance(given, Prefilled)
                assert given.ticket is not None
                given = msgspec.structs.replace(given, ticket=change(given.ticket))
                async with decode.open(Resume(asked, given)) as events:
                    rest = [event async for event in events]
            assert [*given.first.ids, *ids(rest)] == list(range(66, 74))
        await made.settled("weur-prefill", "weur-decode")
