"""Files and batches, as OpenAI's own client uses them."""

from __future__ import annotations

import tracemalloc
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import anyio
import httpx2
import msgspec
import openai
import pytest
from openai.types import Batch

from edge import keys
from edge.app import unix_time
from edge.batch_lines import requests
from edge.openai import parse
from edge.settings import Settings
from tests.fakes.counting_region import MODEL, CountingRegion, Steps, running
from tests.fakes.edge_client import ACCOUNT, EdgeClient, edge_over

OTHER = "globex"
END = {"completed", "failed", "cancelled", "expired"}


@pytest.fixture
def edge_settings(tmp_path: Path) -> dict[str, Any]:
    return {"store": tmp_path / "store.sqlite"}


@pytest.fixture
async def client(edge: EdgeClient) -> AsyncGenerator[openai.AsyncOpenAI, None]:
    async with openai.AsyncOpenAI(
        base_url=f"{edge.ai}/v1", api_key=edge.key, max_retries=0
    ) as made:
        yield made


def line(name: str, **body: object) -> dict[str, Any]:
    turns = [{"role": "user", "content": "A"}]
    asked = {"model": MODEL, "messages": turns, "max_tokens": 3, **body}
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": asked}


def lines(*rows: object) -> bytes:
    return b"\n".join(map(msgspec.json.encode, rows)) + b"\n"


async def start(client: openai.AsyncOpenAI, content: bytes, **more: Any) -> Batch:
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    assert file.bytes == len(content)
    asked = {"endpoint": "/v1/chat/completions", "completion_window": "24h", **more}
    return await client.batches.create(input_file_id=file.id, **asked)


async def ended(client: openai.AsyncOpenAI, batch: str) -> Batch:
    with anyio.fail_after(20):
        while True:
            found = await client.batches.retrieve(batch)
            if found.status in END:
                return found
            await anyio.sleep(0.02)


async def read(client: openai.AsyncOpenAI, file: str | None) -> list[dict[str, Any]]:
    assert file is not None
    content = (await client.files.content(file)).content
    return [msgspec.json.decode(row) for row in content.splitlines()]


async def test_a_batch_from_upload_to_output(client: openai.AsyncOpenAI) -> None:
    made = await start(client, lines(line("a"), line("b", max_tokens=5)), metadata={"who": "me"})
    assert made.status == "validating"
    batch = await ended(client, made.id)
    assert (batch.status, batch.metadata, batch.errors) == ("completed", {"who": "me"}, None)
    assert batch.request_counts is not None
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (2, 2, 0)
    assert batch.error_file_id is None
    assert batch.completed_at is not None
    assert batch.in_progress_at is not None
    rows = await read(client, batch.output_file_id)
    assert [row["custom_id"] for row in rows] == ["a", "b"]
    answers = [row["response"] for row in rows]
    assert [it["status_code"] for it in answers] == [200, 200]
    assert [it["body"]["usage"]["completion_tokens"] for it in answers] == [3, 5]
    assert len({it["request_id"] for it in answers} - {""}) == 2
    assert [row["error"] for row in rows] == [None, None]


async def test_a_batch_of_responses(client: openai.AsyncOpenAI) -> None:
    body = {"model": MODEL, "input": "hello", "max_output_tokens": 3}
    row = {"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": body}
    made = await start(client, lines(row), endpoint="/v1/responses")
    batch = await ended(client, made.id)
    [told] = await read(client, batch.output_file_id)
    answer = told["response"]["body"]
    assert answer["output"][0]["content"][0]["text"] == "ABC"
    assert (await client.responses.retrieve(answer["id"])).output_text == "ABC"


async def test_a_file_that_holds_something_else_fails_the_batch(
    client: openai.AsyncOpenAI, region: CountingRegion
) -> None:
    wrong = line("c") | {"url": "/v1/embeddings"}
    content = lines(line("a"), line("a"), line("b", max_tokens=0), wrong) + b"{\n"
    batch = await ended(client, (await start(client, content)).id)
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [(it.line, it.param) for it in batch.errors.data] == [
        (2, "/custom_id"),
        (3, "/body/max_tokens"),
        (4, "/url"),
        (5, ""),
    ]
    assert region.asked == []
    empty = await ended(client, (await start(client, b"\n")).id)
    assert empty.status == "failed"


@pytest.mark.parametrize("lines_of", [b"\n", b"ab\n"])
def test_a_file_of_many_lines_takes_no_memory_for_each(lines_of: bytes) -> None:
    content = lines_of * 1_000_000
    tracemalloc.start()
    try:
        _, problems = requests(content, "/v1/chat/completions", parse, most_bytes=1000)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000  # a list of them has 8 MB
    finally:
        tracemalloc.stop()
    assert problems


async def test_a_line_that_no_route_would_take_is_not_read(tmp_path: Path) -> None:
    region = CountingRegion()
    limits = {"store": tmp_path / "store.sqlite", "body_limit_bytes": 20_000}
    async with (
        running(region),
        edge_over(tmp_path, [region.region], **limits) as edge,
        openai.AsyncOpenAI(base_url=f"{edge.ai}/v1", api_key=edge.key, max_retries=0) as client,
    ):
        content = lines(line("a"), line("b", x=[[]] * 20_000))
        batch = await ended(client, (await start(client, content)).id)
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    [error] = batch.errors.data
    assert (error.line, error.param) == (2, "")
    assert "may have 20000 bytes" in (error.message or "")


async def test_what_its_route_refuses_later_is_in_the_errors(client: openai.AsyncOpenAI) -> None:
    turns = [{"role": "user", "content": "A" * 9000}]
    content = lines(line("good"), line("long", messages=turns), line("gone", model="@cf/no/such"))
    batch = await ended(client, (await start(client, content)).id)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 2)
    assert [row["custom_id"] for row in await read(client, batch.output_file_id)] == ["good"]
    errors = await read(client, batch.error_file_id)
    assert [(it["custom_id"], it["response"]["status_code"]) for it in errors] == [
        ("long", 400),
        ("gone", 400),
    ]
    assert errors[1]["response"]["body"]["error"]["code"] == "model_not_found"


async def test_cancelling_keeps_what_is_answered(
    client: openai.AsyncOpenAI, region: CountingRegion
) -> None:
    region.gate = steps = Steps(allowed=2)
    made = await start(client, lines(*(line(f"n{n}") for n in range(40))))
    with anyio.fail_after(10):
        while not region.asked:
            await anyio.sleep(0.01)
    batch = await client.batches.cancel(made.id)
    assert batch.status == "cancelling"
    steps.allow(100)
    batch = await ended(client, made.id)
    assert batch.status == "cancelled"
    assert batch.request_counts is not None
    told = await read(client, batch.error_file_id)
    assert {row["error"]["code"] for row in told} == {"batch_cancelled"}
    assert len(told) == 40 - batch.request_counts.completed
    with pytest.raises(openai.ConflictError):
        await client.batches.cancel(made.id)


async def test_files_are_listed_shown_and_deleted(client: openai.AsyncOpenAI) -> None:
    content = bytes(range(256)) * 10_000  # in three parts
    made = [
        await client.files.create(file=(f"{n}.jsonl", content if n else b""), purpose="batch")
        for n in range(5)
    ]
    names = [file.id async for file in client.files.list(limit=2)]
    assert names == [file.id for file in reversed(made)]
    assert [file.id async for file in client.files.list(purpose="batch_output")] == []
    assert (await client.files.content(made[1].id)).content == content
    assert (await client.files.content(made[0].id)).content == b""
    shown = await client.files.retrieve(made[1].id)
    assert (shown.filename, shown.bytes, shown.purpose) == ("1.jsonl", len(content), "batch")
    assert (await client.files.delete(made[1].id)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(made[1].id)
    with pytest.raises(openai.NotFoundError):
        await client.files.content(made[1].id)


async def test_files_at_once_are_no_more_than_an_account_may_have(
    client: openai.AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.openai_files.MOST_BYTES_OF_ACCOUNT", 2500)
    refused: list[int] = []

    async def upload() -> None:
        try:
            await client.files.create(file=("a.jsonl", b"x" * 1000), purpose="batch")
        except openai.APIStatusError as failure:
            refused.append(failure.status_code)

    async with anyio.create_task_group() as tasks:
        for _ in range(6):
            tasks.start_soon(upload)
    kept = [file.id async for file in client.files.list()]
    assert (len(kept), refused) == (2, [413] * 4)
    await client.files.delete(kept[0])
    await upload()
    assert len(refused) == 4


async def test_batches_are_listed_newest_first(client: openai.AsyncOpenAI) -> None:
    made = [await start(client, lines(line("a"))) for _ in range(5)]
    names = [batch.id async for batch in client.batches.list(limit=2)]
    assert names == [batch.id for batch in reversed(made)]


async def test_bad_questions_name_their_field(client: openai.AsyncOpenAI) -> None:
    file = await client.files.create(file=("in.jsonl", lines(line("a"))), purpose="batch")
    good = {
        "input_file_id": file.id,
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }
    bad: dict[str, object] = {
        "input_file_id": "file-none",
        "endpoint": "/v1/none",
        "completion_window": "1h",
        "metadata": {"a": 1},
    }
    for name, value in bad.items():
        with pytest.raises(openai.BadRequestError, match=f"/{name}"):
            await client.batches.create(**{**good, name: value})  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="/purpose"):
        await client.files.create(file=("a", b"b"), purpose="assistants")


async def test_a_body_that_is_no_form(edge: EdgeClient) -> None:
    for headers in ({}, {"content-type": "multipart/form-data"}):
        answer = await edge.http.post(
            f"{edge.ai}/v1/files", content=b"{}", headers=edge.headers() | headers
        )
        assert answer.status_code == 400, answer.text


@pytest.mark.parametrize("charset", ["utf-7", "unicode_escape", "punycode", "undefined"])
async def test_a_form_is_utf_8(edge: EdgeClient, charset: str) -> None:
    """And is decoded by no other codec of Python's: the first two make half a character of this."""
    name = {"utf-7": "+2AA-"}.get(charset, r"\ud800")
    file = f'Content-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n{{}}'
    purpose = 'Content-Disposition: form-data; name="purpose"\r\n\r\nbatch'
    form = f"--x\r\n{file}\r\n--x\r\n{purpose}\r\n--x--\r\n"
    for said, status in ((charset, 400), ("UTF-8", 200)):
        kind = {"content-type": f"multipart/form-data; boundary=x; charset={said}"}
        answer = await edge.http.post(
            f"{edge.ai}/v1/files", content=form.encode(), headers=edge.headers() | kind
        )
        assert answer.status_code == status, answer.text


async def test_another_account_finds_nothing(
    client: openai.AsyncOpenAI, edge: EdgeClient, tmp_path: Path
) -> None:
    made = await start(client, lines(line("a")))
    batch = await ended(client, made.id)
    key = keys.create(tmp_path / "keys", OTHER, days=1, now=unix_time())
    url = f"{edge.ai}/v1".replace(ACCOUNT, OTHER)
    async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as other:
        assert [it async for it in other.files.list()] == []
        assert [it async for it in other.batches.list()] == []
        for ask in (other.batches.retrieve, other.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                await ask(batch.id)
        for file in (batch.input_file_id, batch.output_file_id):
            for ask_file in (other.files.retrieve, other.files.content, other.files.delete):
                with pytest.raises(openai.NotFoundError):
                    await ask_file(file)  # type: ignore[operator]
        with pytest.raises(openai.BadRequestError, match="no such file"):
            await other.batches.create(
                input_file_id=batch.input_file_id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
            )


async def test_without_a_store_there_are_no_files(tmp_path: Path, region: CountingRegion) -> None:
    assert Settings(regions=(), secret="", keys_dir=tmp_path, cache_dir=tmp_path).store is None
    async with edge_over(tmp_path, [region.region]) as edge:
        answer: httpx2.Response = await edge.http.get(f"{edge.ai}/v1/files", headers=edge.headers())
        assert answer.status_code == 404


async def test_no_account_in_the_address(edge: EdgeClient) -> None:
    """As tools write it that take only the base URL of an OpenAI server."""
    url = f"{edge.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key=edge.key, max_retries=0) as client:
        batch = await ended(client, (await start(client, lines(line("a")))).id)
        assert [row["custom_id"] for row in await read(client, batch.output_file_id)] == ["a"]
        with pytest.raises(openai.NotFoundError) as none:
            await client.batches.retrieve("batch_none")
        assert isinstance(none.value.body, dict)  # OpenAI's own shape of errors
