"""Outputs that must match a grammar, from a client to engines with a small real model and back:
on both APIs, streamed or not, and the same when a worker or a region is lost in mid-stream.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx2
import jsonschema
import pytest

from tests.fakes.model_folder import END_ID, make_counting_folder
from tests.infire.grammars import BYTES_SIZE
from tests.infire.small_models import make_folder
from tests.system.faults import (
    PATIENCE_S,
    Heard,
    hear,
    metric,
    nothing_in_flight,
    restart,
    wait_served,
)
from tests.system.world import MODEL, Shape, World, world

pytestmark = pytest.mark.system
CONTEXT = 8192
LETTERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 8},
        "letters": {
            "type": "array",
            "items": {"enum": ["a", "bc", "def"]},
            "minItems": 400,
            "maxItems": 500,
        },
    },
    "required": ["name", "letters"],
    "additionalProperties": False,
}
SHORT: dict[str, Any] = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"const": True}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}
SAMPLING = {"temperature": 1.0, "seed": 5}


def form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def bytes_model(folder: Path) -> Path:
    """Random weights, float32, that say bytes."""
    make_counting_folder(folder)
    sizes = {"vocab_size": BYTES_SIZE, "max_position_embeddings": CONTEXT}
    make_folder("llama", folder, **sizes)
    for name in ("config.json", "generation_config.json"):
        about = json.loads((folder / name).read_text()) | {"eos_token_id": END_ID}
        (folder / name).write_text(json.dumps(about))
    return folder


@asynccontextmanager
async def real_world(home: Path, *regions: str) -> AsyncIterator[World]:
    shape = Shape(regions=regions, folder=bytes_model(home / "weights"))
    async with world(home, shape) as w:
        yield w


async def said(w: World, prompt: str, **fields: Any) -> Any:
    """`result.response` of an answer that is not streamed."""
    answer = await w.raw(prompt, 4000, **SAMPLING, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["result"]["response"]


async def chat(w: World, **fields: Any) -> httpx2.Response:
    """On the other API."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], **SAMPLING, **fields}
    return await w.client.post(w.v1_url(), json=body, headers=w.headers())


async def refused(w: World, **fields: Any) -> str:
    """The message, the same on both APIs."""
    native = await w.raw("A", 10, **fields)
    openai = await chat(w, **fields)
    for answer in (native, openai):
        assert answer.status_code == 400, answer.text
        assert answer.json()["errors"][0]["code"] == 5006
    message = native.json()["errors"][0]["message"]
    assert openai.json()["error"]["message"] == message
    return str(message)


async def test_answers_match_what_was_asked_for(tmp_path: Path) -> None:
    async with real_world(tmp_path, "weur") as w:
        found = await said(w, "A", **form(SHORT))
        jsonschema.validate(found, SHORT)  # an object, as Workers AI documents it
        heard = Heard()
        await hear(w, heard, "A", 4000, **SAMPLING, **form(SHORT))
        assert json.loads(heard.text) == found
        assert heard.num_done == 1
        guided = await said(w, "A", guided_json=json.dumps(SHORT))
        assert guided == found
        assert isinstance(await said(w, "A", response_format={"type": "json_object"}), dict | str)
        assert re.fullmatch("[a-f]{8}", await said(w, "A", guided_regex="[a-f]{8}"))
        assert await said(w, "A", guided_choice=["oui", "né"]) in {"oui", "né"}
        lark = 'start: "<" /[xy]{2,5}/ ">"'
        assert re.fullmatch("<[xy]{2,5}>", await said(w, "A", guided_grammar=lark))
        unending = await said(w, "A", **form(SHORT), ignore_eos=True)
        jsonschema.validate(unending, SHORT)

        envelope = {"type": "json_schema", "json_schema": {"name": "s", "schema": SHORT}}
        answer = (await chat(w, response_format=envelope)).json()
        jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), SHORT)
        assert answer["choices"][0]["finish_reason"] == "stop"

        for prompt, fields, field in (
            ("no type", form({"type": "nope"}), "'/response_format/json_schema': Invalid type"),
            ("no class", {"guided_regex": "["}, "'/guided_regex': "),
            ("circle", form({"$ref": "#"}), "'/response_format/json_schema': nothing can match"),
        ):
            message = await refused(w, **fields)
            assert field in message, prompt
        again = await said(w, "A", **form(SHORT))
        assert again == found
        await w.settled("weur-prefill", "weur-decode")
        await nothing_in_flight(w)


@pytest.mark.slow
async def test_a_stream_outlives_the_worker_and_the_region_that_speak(tmp_path: Path) -> None:
    """Killed in mid-stream: what is heard is what is heard without."""
    fields = {**SAMPLING, **form(LETTERS)}
    async with real_world(tmp_path, "weur", "enam") as w:
        undisturbed = Heard()
        await hear(w, undisturbed, "B", 6000, **fields)
        jsonschema.validate(json.loads(undisturbed.text), LETTERS)
        assert len(undisturbed.text) > 2000
        for victim in ("weur-decode", "weur-front"):
            heard = Heard()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(partial(hear, w, heard, "B", 6000, **fields))
                await heard.until(300)
                w.processes[victim].kill()
                assert len(heard.text) < len(undisturbed.text) - 300, "it had ended before"
            assert heard.text == undisturbed.text
            assert (heard.errors, heard.num_done) == ([], 1)
            assert heard.usage["completion_tokens"] == undisturbed.usage["completion_tokens"]
            if victim == "weur-decode":
                assert await metric(w, "weur-front", "edgefire_front_second_tries_total") == 1
                words = w.processes[victim].words
                await restart(w, victim, words)
                await wait_served(w)
        lost = {"outcome": "lost"}
        with anyio.fail_after(PATIENCE_S):  # counted when the request is over, after its last word
            while await metric(w, "edge", "edgefire_edge_failed_tries_total", **lost) != 1:
                await anyio.sleep(0.05)
