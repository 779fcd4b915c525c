"""Embeddings and reranking: bodies as they are read, answers as they are spelled. Pure."""

from __future__ import annotations

import json
import struct
from base64 import b64decode
from typing import Any

import pytest

from edge.checks import BadField, Fields
from edge.embeddings import EmbedAsk, parse, parse_fields, spelled
from routing.wire import Embedded


def native(**body: Any) -> EmbedAsk:
    return parse_fields(Fields(body), "m")


def openai(**body: Any) -> EmbedAsk:
    return parse(json.dumps({"model": "m", **body}).encode())


def made(*rows: tuple[float, ...]) -> Embedded:
    numbers = [number for row in rows for number in row]
    return Embedded(
        vectors=struct.pack(f"<{len(numbers)}f", *numbers),
        width=len(rows[0]),
        pooling="cls",
        prompt_tokens=7,
    )


def test_native_texts() -> None:
    one = native(text="a", pooling="cls", options={"rejectIfBusy": True})
    assert (one.texts, one.pooling, one.reject_if_busy) == (("a",), "cls", True)
    assert native(text=["a", "b"], pooling=None).texts == ("a", "b")
    assert len(native(text=["a"] * 100).texts) == 100


def test_a_query_and_its_contexts() -> None:
    asked = native(query="q", contexts=[{"text": "a"}, {"text": "b"}], top_k=1)
    assert (asked.texts, asked.top_k) == (("q", "a", "b"), 1)
    assert [asked.pointer(n) for n in range(3)] == [
        "/query",
        "/contexts/0/text",
        "/contexts/1/text",
    ]


@pytest.mark.parametrize(
    ("body", "pointer", "says"),
    [
        ({}, "", "0 matches: required properties at '/' are 'text', "),
        ({"messages": []}, "", "m is for text-embeddings"),
        ({"text": "a", "query": "b"}, "", "2 matches"),
        ({"text": ""}, "/text", "Length of '/text' must be >= 1"),
        ({"text": 3}, "/text", "'integer' not in 'string', 'array'"),
        ({"text": []}, "/text", "must have 1 to 100 items, got 0"),
        ({"text": ["a"] * 101}, "/text", "must have 1 to 100 items, got 101"),
        ({"text": ["a", 3]}, "/text/1", "Type mismatch"),
        ({"text": ["a", ""]}, "/text/1", "Length of '/text/1'"),
        ({"text": "a", "pooling": "max"}, "/pooling", "must be one of mean, cls"),
        ({"query": "q"}, "/contexts", "'contexts'"),
        ({"contexts": [{"text": "a"}]}, "/query", "'query'"),
        ({"query": "q", "contexts": []}, "/contexts", "1 to 99 items"),
        ({"query": "q", "contexts": ["a"]}, "/contexts/0", "'string' not in 'object'"),
        ({"query": "q", "contexts": [{}]}, "/contexts/0/text", "required properties"),
        ({"query": 1, "contexts": [{"text": "a"}]}, "/query", "Type mismatch"),
        ({"query": "q", "contexts": [{"text": "a"}], "top_k": 0}, "/top_k", ">= 1"),
    ],
)
def test_native_bodies_that_are_refused(body: dict[str, Any], pointer: str, says: str) -> None:
    with pytest.raises(BadField) as caught:
        native(**body)
    assert caught.value.pointer == pointer
    assert says in caught.value.detail


def test_openai_inputs() -> None:
    assert openai(input="a").texts == ("a",)
    assert openai(input=["a", "b"], models=["x"]).fallbacks == ("x",)
    assert openai(input=[1, 2]).token_ids == ((1, 2),)
    assert openai(input=[[1, 2], [3]], encoding_format="base64").token_ids == ((1, 2), (3,))
    assert (openai(input="a").format, openai(input="a", user="u").pooling) == ("float", None)


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/input"),
        ({"input": []}, "/input"),
        ({"input": [[]]}, "/input/0"),
        ({"input": [[1], 2]}, "/input/1"),
        ({"input": [1, "a"]}, "/input/1"),
        ({"input": ["a", 1]}, "/input/1"),
        ({"input": [[1], [-1]]}, "/input/1/0"),
        ({"input": [True]}, "/input/0"),
        ({"input": ["a"] * 2049}, "/input"),
        ({"input": {"a": 1}}, "/input"),
        ({"input": "a", "encoding_format": "int8"}, "/encoding_format"),
        ({"input": "a", "dimensions": 0}, "/dimensions"),
    ],
)
def test_openai_bodies_that_are_refused(body: dict[str, Any], pointer: str) -> None:
    with pytest.raises(BadField) as caught:
        openai(**body)
    assert caught.value.pointer == pointer


def test_vectors_natively() -> None:
    body = json.loads(spelled(native(text=["a", "b"]), made((1, 0.5), (2, -1))))
    result = {"shape": [2, 2], "data": [[1.0, 0.5], [2.0, -1.0]], "pooling": "cls"}
    assert body == {"result": result, "success": True, "errors": [], "messages": []}


def test_vectors_as_openai_has_them() -> None:
    rows = made((1, 0.5), (2, -1))
    body = json.loads(spelled(openai(input=["a", "b"]), rows))
    assert body["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert (body["object"], body["model"]) == ("list", "m")
    assert body["data"][1] == {"object": "embedding", "index": 1, "embedding": [2.0, -1.0]}
    packed = json.loads(spelled(openai(input=["a", "b"], encoding_format="base64"), rows))
    assert struct.unpack("<2f", b64decode(packed["data"][1]["embedding"])) == (2.0, -1.0)


def test_vectors_of_another_size_are_not_to_be_had() -> None:
    assert spelled(openai(input="a", dimensions=2), made((1, 2)))
    with pytest.raises(BadField, match="vectors of m have 2 numbers"):
        spelled(openai(input="a", dimensions=1), made((1, 2)))


def test_contexts_by_how_near_they_are_to_the_query() -> None:
    contexts = [{"text": name} for name in "abcd"]
    rows = made((1, 0), (0, 5), (3, 3), (7, 0), (0, 0))
    body = json.loads(spelled(native(query="q", contexts=contexts), rows))
    found = body["result"]["response"]
    assert [it["id"] for it in found] == [2, 1, 0, 3]
    assert [it["score"] for it in found] == pytest.approx([1.0, 2**-0.5, 0.0, 0.0])
    best = json.loads(spelled(native(query="q", contexts=contexts, top_k=1), rows))
    assert [it["id"] for it in best["result"]["response"]] == [2]
