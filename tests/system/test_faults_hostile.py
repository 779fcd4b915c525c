"""Input made to break things, with a neighbour that must not notice."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic

import anyio
import httpx2
import msgspec
import pytest

from tests.system.faults import PATIENCE_S, Heard, hear, nothing_in_flight
from tests.system.world import MODEL, Shape, World, counted, world

pytestmark = pytest.mark.system
WORKERS = ("weur-prefill", "weur-decode")
TRIES = 10
BLOCKED_S = 5 * 0.05  # the event loop is never held up for longer than 50 ms
USER = [{"role": "user", "content": "A"}]


def deep(depth: int) -> bytes:
    """A schema within a schema, so many times."""
    return b'{"properties":{"a":' * depth + b"{}" + b"}}" * depth


RECURSIVE = {"$ref": "#", "properties": {"a": {"$ref": "#"}}}
SPOILED: list[dict[str, object]] = [
    {"logit_bias": {"999999": 1}},
    {"logit_bias": {"-1": 1}},
    {"logit_bias": {"1.5": 1}},
    {"logit_bias": {str(n): 1 for n in range(100_000)}},
    {"logit_bias": {"65": 1e300}},
    {"temperature": 1e308},
    {"temperature": -0.0001},
    {"repetition_penalty": -1},
    {"seed": 10**40},
    {"max_tokens": 10**30},
    {"max_tokens": -1},
    {"max_tokens": 1.5},
    {"n": 10**9},
    {"stop": ["x"] * 100_000},
    {"stop": "x" * 1_000_000},
    {"response_format": {"type": "json_schema", "json_schema": RECURSIVE}},
    {"response_format": {"type": "regex", "regex": "(a*)*" * 1000}},
    {"lora": "../../etc/passwd"},
    {"stream": "true"},
]
RAW: list[bytes] = [
    b'{"prompt": "A", "temperature": NaN}',
    b'{"prompt": "A", "temperature": Infinity}',
    b'{"prompt": "A", "top_p": -Infinity}',
    b'{"prompt": "A", "top_p": 1e400}',
    b'{"prompt": "\xc3"}',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    b'{"a":' * 100_000,
    *(b'{"prompt": "A", "guided_json": ' + deep(n) + b"}" for n in (100, 480, 5000, 50_000)),
    b'{"prompt": "A", "response_format": {"type": "json_schema", "json_schema": %b}}' % deep(400),
    b'{"prompt": "A", "prompt": ' + b"9" * 100_000 + b"}",
    b"\x00" * 1000,
]


async def test_hostile_fields_are_refused_to_who_sends_them(tmp_path: Path) -> None:
    """Case 24: each is a 4xx on both APIs; a stream beside them is what it is without them."""
    async with world(tmp_path, Shape(step_s=0.01)) as w:
        async with neighbours(w):
            for fields in SPOILED:
                native = {"prompt": "A", "raw": True, "max_tokens": 4, **fields}
                openai = {"model": MODEL, "messages": USER, "max_tokens": 4, **fields}
                for url, body in ((w.run_url(), native), (w.v1_url(), openai)):
                    await refused(w, url, msgspec.json.encode(body))
            for content in RAW:
                await refused(w, w.run_url(), content)
        await w.settled(*WORKERS)
        await nothing_in_flight(w)
        assert '"trace"' not in "".join(it.log.read_text() for it in w.processes.values())


@pytest.mark.slow
async def test_random_bodies_never_are_an_error_of_ours(tmp_path: Path) -> None:
    """Case 24: bodies with bytes changed, cut or doubled, the same ones each time: 200 or 4xx."""
    chance = random.Random(24)
    good = {"prompt": "A é 🜁", "raw": True, "max_tokens": 4, "stop": ["Z"], "temperature": 0.5}
    async with world(tmp_path) as w:
        async with neighbours(w):
            for _ in range(400):
                content = bytearray(msgspec.json.encode(good))
                for _ in range(chance.randint(1, 4)):
                    at = chance.randrange(len(content))
                    match chance.randrange(3):
                        case 0:
                            content[at] = chance.randrange(256)
                        case 1:
                            del content[at:]
                            content += b"}"
                        case _:
                            content[at:at] = content[at : at + 9]
                answer = await post(w, w.run_url(), bytes(content))
                assert answer.status_code in {200, 400}, (bytes(content), answer.text)
        await w.settled(*WORKERS)
        await nothing_in_flight(w)


@pytest.mark.slow
async def test_long_inputs_do_not_hold_up_the_edge(tmp_path: Path) -> None:
    """Case 24: bodies of nearly 10 MB, which are read and tokenised; a probe is answered all the
    while. What else this machine computes can hold up a probe too, but not in each of ten
    tries, as an edge does, for seconds, that tokenises in its loop."""
    bodies = [
        b'{"raw": true, "prompt": "' + b"wor d" * n + b'"}' for n in (20_000, 100_000, 1_900_000)
    ]
    numbers = b"[" + b"1," * 500_000 + b"1]"
    tool = b'{"name": "f", "parameters": {"type": "object", "x": %b}}' % numbers
    bodies.append(b'{"messages": %b, "tools": [%b]}' % (msgspec.json.encode(USER), tool))
    async with world(tmp_path, Shape(step_s=0.01)) as w:
        longest_s: list[float] = []

        async def probe() -> None:
            async with httpx2.AsyncClient(timeout=60, trust_env=False) as client:
                while True:
                    began = monotonic()
                    assert (await client.get(f"{w.edge.url}/health")).status_code == 200
                    longest_s[-1] = max(longest_s[-1], monotonic() - began)
                    await anyio.sleep(0.005)

        while len(longest_s) < TRIES and min(longest_s, default=BLOCKED_S) >= BLOCKED_S:
            longest_s.append(0.0)
            async with neighbours(w), anyio.create_task_group() as tasks:
                tasks.start_soon(probe)
                await anyio.to_thread.run_sync(post_from_a_thread, w, bodies)
                tasks.cancel_scope.cancel()
        assert min(longest_s) < BLOCKED_S, longest_s
        await w.settled(*WORKERS)
        await nothing_in_flight(w)


@pytest.mark.slow
async def test_characters_of_many_tokens_are_never_broken(tmp_path: Path) -> None:
    """Case 24: the answer runs through bytes that are no UTF-8: whole characters come, each once,
    and a stop string is found though its tokens come one by one."""
    async with world(tmp_path, Shape(step_s=0.002)) as w:
        heard = Heard()
        await hear(w, heard, "0", 100)  # from "1" on, past "~" and DEL, into bytes without a start
        whole = await w.raw("0", 100)
        assert heard.text == whole.json()["result"]["response"]
        assert heard.text.startswith(counted("0", 79))
        assert heard.usage["completion_tokens"] == 100
        stopped = Heard()
        await hear(w, stopped, "!", 80, stop=["XYZ[", "PQRX"])
        assert (stopped.text, stopped.num_done) == (counted("!", ord("W") - ord("!")), 1)
        await w.settled(*WORKERS)
        await nothing_in_flight(w)


@asynccontextmanager
async def neighbours(w: World) -> AsyncGenerator[None, None]:
    """Streams, one after another, for the length of the block: each is checked to the letter."""
    done = False

    async def ask_on() -> None:
        while not done:
            heard = Heard()
            await hear(w, heard, "!", 60)
            assert (heard.text, heard.errors, heard.num_done) == (counted("!", 60), [], 1)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask_on)
        yield
        done = True


async def refused(w: World, url: str, content: bytes) -> None:
    answer = await post(w, url, content)
    assert 400 <= answer.status_code < 500, (content[40:200], answer.text[:200])
    assert "Traceback" not in answer.text


async def post(w: World, url: str, content: bytes) -> httpx2.Response:
    with anyio.fail_after(PATIENCE_S):
        return await w.client.post(url, content=content, headers=w.headers())


def post_from_a_thread(w: World, bodies: list[bytes]) -> None:
    """So that sending them does not hold up the probe, which is in this process too."""
    with httpx2.Client(timeout=60, trust_env=False) as client:
        for content in bodies:
            answer = client.post(w.run_url(), content=content, headers=w.headers())
            assert answer.status_code == 400
