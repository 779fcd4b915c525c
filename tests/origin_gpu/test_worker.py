"""One worker over a counting engine: whole requests, handed over, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from origin_gpu.handover import Collected, Prefill, Prefilled, Resume, Watch
from routing import wire
from routing.errors import Code
from routing.wire import Logprob
from tests.origin_gpu.local_workers import (
    PATIENCE_S,
    LocalWorker,
    fault,
    ids,
    local_pair,
    local_worker,
    prefilled_of,
    watched,
)


def usage(prompt: int, completion: int) -> wire.Usage:
    return wire.Usage(prompt_tokens=prompt, completion_tokens=completion)


def refusals(worker: LocalWorker) -> dict[tuple[str, str], int]:
    """KV that was refused there, by end and reason."""
    (counter,) = worker.app.worker.metrics._kv_refused.collect()
    return {
        (sample.labels["end"], sample.labels["reason"]): int(sample.value)
        for sample in counter.samples
        if sample.name.endswith("_total")
    }


async def test_a_whole_request(tmp_path: Path) -> None:
    async with local_worker(tmp_path) as w:
        events = await w.ask(w.generate(65, num_prompt=3, max_tokens=4))
        assert events[0] == wire.Started(0)
        assert ids(events) == [66, 67, 68, 69]
        assert events[-1] == wire.Finish("length", usage(3, 4))
        stopped = await w.ask(w.generate(65, max_tokens=9, sampling={"stop_ids": (68, 200)}))
        assert ids(stopped) == [66, 67, 68]
        assert stopped[-1] == wire.Finish("stop", usage(2, 3))


async def test_ids_made_elsewhere_count_as_completion(tmp_path: Path) -> None:
    async with local_worker(tmp_path) as w:
        events = await w.ask(w.generate(65, generated_ids=(66, 67), max_tokens=5))
        assert ids(events) == [68, 69, 70]
        assert events[-1] == wire.Finish("length", usage(2, 5))


async def test_logprobs_come_with_their_tokens(tmp_path: Path) -> None:
    async with local_worker(tmp_path) as w:
        events = await w.ask(w.generate(65, max_tokens=2, sampling={"logprobs": 2}))
        tokens = [it for it in events if isinstance(it, wire.Tokens)]
        got = [logprob for it in tokens for logprob in it.logprobs]
        assert got == [
            Logprob(66, 0.0, ((66, 0.0), (67, -1.0))),
            Logprob(67, 0.0, ((67, 0.0), (68, -1.0))),
        ]


async def test_prefill_hands_over_to_decode_which_computes_no_prompt_token(tmp_path: Path) -> None:
    async with local_pair(tmp_path) as (p, d):
        request = p.generate(65, num_prompt=300, max_tokens=6)
        async with p.link.open(Prefill(request)) as held:
            prefilled = await prefilled_of(held)
            assert prefilled.first == wire.Tokens((66,))
            assert prefilled.finish is None
            ticket = prefilled.ticket
            assert ticket is not None
            assert (ticket.worker, ticket.url) == ("p", p.url)
            assert (ticket.num_tokens, ticket.num_bytes) == (300, 2400)  # 8 bytes a token
            assert ticket.epoch == p.report.epoch
            await p.until(lambda report: report.held == 1)
            events = await d.ask(Resume(request, prefilled))
            with anyio.fail_after(PATIENCE_S):
                assert [event async for event in held] == [Collected()]
        assert ids(events) == [67, 68, 69, 70, 71]
        assert events[-1] == wire.Finish("length", usage(300, 6))
        assert (await p.settled()).prompt_tokens_computed == 300
        assert (await d.settled()).prompt_tokens_computed == 0


async def test_a_worker_that_is_being_stopped_finishes_what_the_region_has_begun(
    tmp_path: Path,
) -> None:
    """It says so at once, takes nothing new, gives the KV that it has, and takes KV over."""
    async with local_pair(tmp_path) as (p, d):
        request = p.generate(65, num_prompt=300, max_tokens=6)
        async with p.link.open(Prefill(request)) as held, p.link.open(Watch((p.peer, d.peer))) as w:
            prefilled = await prefilled_of(held)
            watch = aiter(w)
            with anyio.fail_after(PATIENCE_S):
                while not (await watched(watch)).report.ready:
                    pass
            for worker in (p, d):
                worker.app.worker.drain.begin(0.0)
            with anyio.fail_after(PATIENCE_S):
                while (await watched(watch)).report.ready:
                    pass
            assert (await p.client.get("/ready")).status_code == 503
            fault(await p.ask(Prefill(request)), Code.DRAINING)
            fault(await d.ask(request), Code.DRAINING)
            assert p.app.worker.drain.num_left() == 1
            events = await d.ask(Resume(request, prefilled))
            with anyio.fail_after(PATIENCE_S):
                assert [event async for event in held] == [Collected()]
        assert ids(events) == [67, 68, 69, 70, 71]
        assert p.app.worker.drain.num_left() == d.app.worker.drain.num_left() == 0
        for worker in (p, d):
            worker.app.worker.drain.begun = False  # for those who wait until it is as before


async def test_a_resumed_request_is_handed_over_too(tmp_path: Path) -> None:
    async with local_pair(tmp_path) as (p, d):
        request = p.generate(65, generated_ids=(66, 67), max_tokens=5)
        async with p.link.open(Prefill(request)) as held:
            prefilled = await prefilled_of(held)
            assert prefilled.first == wire.Tokens((68,))
            events = await d.ask(Resume(request, prefilled))
        assert ids(events) == [69, 70], events
        assert events[-1] == wire.Finish("length", usage(2, 5))


@pytest.mark.parametrize(
    ("sampling", "reason"), [({"max_tokens": 1}, "length"), ({"stop_ids": (66,)}, "stop")]
)
async def test_a_request_that_ends_with_its_first_token_has_no_ticket(
    tmp_path: Path, sampling: dict[str, Any], reason: wire.Reason
) -> None:
    async with local_worker(tmp_path, role="prefill") as w:
        (prefilled,) = await w.ask(Prefill(w.generate(65, sampling=sampling)))
        assert prefilled == Prefilled(
            first=wire.Tokens((66,)), finish=wire.Finish(reason, usage(2, 1))
        )


async def test_a_prompt_with_room_for_one_token_gets_one(tmp_path: Path) -> None:
    """Whatever it asks for; one token longer, it is refused with the numbers."""
    async with local_worker(tmp_path, kv_tokens=64) as w:
        whole = await w.ask(w.generate(65, num_prompt=63, max_tokens=1000))
        assert ids(whole) == [66]
        assert whole[-1] == wire.Finish("length", usage(63, 1))
        (prefilled,) = await w.ask(Prefill(w.generate(65, num_prompt=63, max_tokens=1000)))
        assert isinstance(prefilled, Prefilled)
        found = msgspec.structs.replace(usage(63, 1), cached_tokens=48)  # in three full blocks
        assert prefilled.finish == wire.Finish("length", found)
        assert len(ids(await w.ask(w.generate(65, num_prompt=40, max_tokens=1000)))) == 24
        detail = fault(await w.ask(w.generate(65, num_prompt=64)), Code.BAD_INPUT)
        assert "64 tokens" in detail
        assert "64 that one request may have" in detail


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"model": "@cf/other"}, Code.UNAVAILABLE, "@cf/other"),
        ({"tokenizer_digest": "f" * 64}, Code.STALE_TOKENIZER, "ffffffffffff"),
        ({"token_ids": ()}, Code.BAD_INPUT, "prompt"),
        ({"token_ids": (1, 259)}, Code.BAD_INPUT, "259 is no token of a vocabulary of 259"),
        ({"token_ids": (-1,)}, Code.BAD_INPUT, "-1"),
        ({"generated_ids": (300,)}, Code.BAD_INPUT, "generated_ids: 300"),
        ({"sampling": {"logit_bias": ((999, 1.0),)}}, Code.BAD_INPUT, "logit_bias: 999"),
        ({"sampling": {"stop_ids": (1, 400)}}, Code.BAD_INPUT, "stop_ids: 400"),
        ({"max_tokens": 2, "generated_ids": (1, 2)}, Code.BAD_INPUT, "max_tokens: 2"),
        ({"adapter": "mine"}, Code.BAD_INPUT, "'mine'"),
        ({"grammar": wire.Grammar("regex", "a+")}, Code.BAD_INPUT, "regex"),
        ({"budget_s": 0.0}, Code.TIMEOUT, "0 s"),
    ],
)
async def test_what_cannot_run_is_refused_with_the_reason(
    worker: LocalWorker, change: dict[str, Any], code: Code, named: str
) -> None:
    request = worker.generate(**change)
    for asked in (request, Prefill(request)):
        events = await worker.ask(asked)
        assert named in fault(events, code)
        assert len(events) == 1
    assert ids(await worker.ask(worker.generate(65))) == [66, 67, 68, 69]


async def test_a_resume_needs_a_ticket(worker: LocalWorker) -> None:
    request = worker.generate()
    events = await worker.ask(Resume(request, Prefilled(first=wire.Tokens((66,)))))
    assert "ticket" in fault(events, Code.BAD_INPUT)


async def test_tickets_are_not_trusted(tmp_path: Path) -> None:
    """A worker that is not in the table, an address that is not the table's, KV of another shape:
    nothing is dialled, and the ticket can still be used as it was given."""
    async with local_pair(tmp_path) as (p, d):
        request = p.generate(65, max_tokens=3)
        async with p.link.open(Prefill(request)) as held:
            prefilled = await prefilled_of(held)
            ticket = prefilled.ticket
            assert ticket is not None
            layout = msgspec.structs.replace(ticket.layout, model_digest="another")
            other_ids = msgspec.structs.replace(ticket.layout, tokenizer_digest="another")
            assert ticket.layout.tokenizer_digest == p.app.worker.assets_digest
            for change, code, named in (
                ({"worker": "mallory"}, Code.LOST, "mallory"),
                ({"url": "http://127.0.0.1:1"}, Code.INCOMPATIBLE, "http://127.0.0.1:1"),
                ({"layout": layout}, Code.INCOMPATIBLE, "model digest another"),
                ({"layout": other_ids}, Code.INCOMPATIBLE, "tokenizer digest another"),
                ({"num_tokens": 1}, Code.INCOMPATIBLE, "1 tokens"),
                ({"num_bytes": 1 << 40}, Code.INCOMPATIBLE, "bytes for 2 tokens, not 16"),
                ({"epoch": "before"}, Code.LOST, "before"),
                ({"request_id": "r2#9"}, Code.LOST, "r2#9"),
            ):
                forged = msgspec.structs.replace(
                    prefilled, ticket=msgspec.structs.replace(ticket, **change)
                )
                assert named in fault(await d.ask(Resume(request, forged)), code)
            assert p.report.held == 1
            assert ids(await d.ask(Resume(request, prefilled))) == [67, 68]
        assert refusals(d) == {("collector", Code.LOST): 1, ("collector", Code.INCOMPATIBLE): 5}
        assert refusals(p) == {("door", "epoch"): 1, ("door", "unknown"): 1}
