"""A request walks the whole way: real processes, real sockets, a model that counts."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from tests.fakes.events import frames, read_all
from tests.system.world import MODEL, NEAR_ENAM, NEAR_WEUR, Shape, World, counted, world

pytestmark = pytest.mark.system


async def test_whole_and_streamed_answers_on_both_apis(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        whole = await w.raw("AAAA", 5)
        assert whole.status_code == 200, whole.text
        assert whole.headers["content-type"] == "application/json"
        assert whole.headers["x-served-by"] == "weur"
        assert whole.json() == {
            "result": {
                "response": "BCDEF",
                "finish_reason": "length",
                "usage": {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9},
            },
            "success": True,
            "errors": [],
            "messages": [],
        }
        async with w.stream("AAAA", 5) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            text, usage, done = await read_all(response)
        assert (text, done) == ("BCDEF", True)
        assert usage == whole.json()["result"]["usage"]
        chat = {"model": MODEL, "messages": [{"role": "user", "content": "A"}], "max_tokens": 4}
        answer = await w.client.post(w.v1_url(), json=chat, headers=w.headers())
        assert answer.status_code == 200, answer.text
        assert answer.json()["object"] == "chat.completion"
        assert answer.json()["usage"]["completion_tokens"] == 4
        async with w.client.stream(
            "POST", w.v1_url(), json=chat | {"stream": True}, headers=w.headers()
        ) as response:
            deltas = [f async for f in frames(response)]
        assert deltas[-1] == "[DONE]"
        streamed = "".join(f["choices"][0]["delta"].get("content") or "" for f in deltas[:-1])
        assert streamed == answer.json()["choices"][0]["message"]["content"]
        await w.settled("weur-prefill", "weur-decode")


async def test_the_decode_worker_computes_no_prompt_token(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        assert (await w.raw("A" * 300, 8)).json()["result"]["response"] == "BCDEFGHI"
        await w.settled("weur-prefill", "weur-decode")
        prefill, decode = await w.worker("weur-prefill"), await w.worker("weur-decode")
        assert (prefill.prompt_tokens_computed, decode.prompt_tokens_computed) == (300, 0)


@pytest.mark.slow
async def test_one_worker_of_role_both(tmp_path: Path) -> None:
    async with world(tmp_path, Shape(roles=("both",))) as w:
        assert (await w.raw("AB", 6)).json()["result"]["response"] == "CDEFGH"
        await w.settled("weur-both")


async def test_a_stop_string_ends_the_work_and_the_count(tmp_path: Path) -> None:
    """Usage runs up to and including the token that completes the stop, on both paths."""
    async with world(tmp_path, Shape(step_s=0.01)) as w:
        whole = (await w.raw("A", 60, stop=["EF"])).json()["result"]
        assert (whole["response"], whole["usage"]["completion_tokens"]) == ("BCD", 5)
        async with w.stream("A", 60, stop=["EF"]) as response:
            text, usage, done = await read_all(response)
        assert (text, usage["completion_tokens"], done) == ("BCD", 5, True)
        await w.settled("weur-prefill", "weur-decode")


@pytest.mark.parametrize(
    "num_streams", [200, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
async def test_no_token_is_lost(tmp_path: Path, num_streams: int) -> None:
    """Every stream gets its own tokens, in order, once, however many share the links."""
    flags = ("--kv-tokens", "131072", "--max-running", "1024", "--max-waiting", "2048")
    shape = Shape(
        worker_flags=(*flags, "--max-step-tokens", "4096"),
        front_flags=("--max-wait-s", "0"),  # a line as long as it gets
        step_s=0.005,
    )
    answers: dict[int, tuple[str, dict[str, int], bool]] = {}

    async def one(w: World, n: int) -> None:
        prompt, max_tokens = "!" * (1 + n % 7) + chr(34 + n % 20), 30 + n % 30
        async with w.stream(prompt, max_tokens) as response:
            assert response.status_code == 200, await response.aread()
            answers[n] = await read_all(response)
        assert answers[n][0] == counted(prompt, max_tokens), n
        assert answers[n][1]["prompt_tokens"] == len(prompt)
        assert answers[n][1]["completion_tokens"] == max_tokens
        assert answers[n][2], "no [DONE]"

    async with world(tmp_path, shape) as w:
        async with anyio.create_task_group() as tasks:
            for n in range(num_streams):
                tasks.start_soon(one, w, n)
        assert len(answers) == num_streams
        await w.settled("weur-prefill", "weur-decode")
        assert (await w.worker("weur-decode")).prompt_tokens_computed == 0


@pytest.mark.slow
async def test_a_client_is_served_from_the_nearest_region(tmp_path: Path) -> None:
    async with world(tmp_path, Shape(regions=("weur", "enam"))) as w:
        for near, region in [(NEAR_WEUR, "weur"), (NEAR_ENAM, "enam"), (NEAR_WEUR, "weur")]:
            async with w.stream("A", 3, near=near) as response:
                assert response.headers["x-served-by"] == region
                assert (await read_all(response))[0] == "BCD"


@pytest.mark.slow
async def test_killing_a_region_costs_no_request(tmp_path: Path) -> None:
    """A stream that was running goes on elsewhere, to the letter; later ones start there."""
    async with world(tmp_path, Shape(regions=("weur", "enam"), step_s=0.05)) as w:
        async with w.stream("!", 60) as response:
            assert response.headers["x-served-by"] == "weur"
            texts = frames(response)
            got = (await anext(texts))["response"] + (await anext(texts))["response"]
            for name in ("weur-front", "weur-prefill", "weur-decode"):
                w.processes[name].kill()
            async for frame in texts:
                if isinstance(frame, dict):
                    got += frame["response"]
                    usage = frame.get("usage")
        assert got == counted("!", 60)
        assert usage["prompt_tokens"] == 1
        assert usage["completion_tokens"] == 60
        for _ in range(5):
            async with w.stream("A", 3) as response:
                assert response.headers["x-served-by"] == "enam"
                assert (await read_all(response))[0] == "BCD"
        await w.settled("enam-prefill", "enam-decode")


@pytest.mark.slow
async def test_a_dead_decode_worker_is_worked_around(tmp_path: Path) -> None:
    """The front computes the stream anew on what is left of its region."""
    async with world(tmp_path, Shape(step_s=0.05)) as w:
        async with w.stream("!", 40) as response:
            texts = frames(response)
            got = (await anext(texts))["response"] + (await anext(texts))["response"]
            w.processes["weur-decode"].kill()
            async for frame in texts:
                if isinstance(frame, dict):
                    got += frame["response"]
        assert got == counted("!", 40)
        await w.settled("weur-prefill")
