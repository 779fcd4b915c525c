"""The engine of vectors, on a model that a person can compute; and its process, on a real one."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from infire.embed import EmbedEngine
from infire.notes import (
    Drop,
    Embedded,
    EmbedTexts,
    FromEngine,
    Hello,
    Notes,
    Refused,
    Results,
    Submit,
)
from tests.fakes.counting_encoder import CountingEncoder, vector
from tests.fakes.counting_engine import counting_engine
from tests.fakes.sequences import sequence

TIMEOUT_S = 60.0


def asked(request_id: str, *texts: tuple[int, ...], **more: str) -> EmbedTexts:
    return msgspec.convert(
        {"type": "embed", "request_id": request_id, "texts": texts, **more}, EmbedTexts
    )


def made(max_batch_tokens: int = 10) -> tuple[EmbedEngine, CountingEncoder]:
    model = CountingEncoder()
    return EmbedEngine(model, max_batch_tokens=max_batch_tokens), model


def test_a_request_is_answered_once_when_it_is_whole() -> None:
    engine, model = made()
    engine.do(asked("a", (1, 2, 3, 4, 5, 6), (7,) * 6, (1,)))
    engine.do(asked("b", (9,), pooling="cls"))
    first = engine.step()
    assert first is not None
    assert (first.answers, first.gauges.waiting) == ((), 2)
    second = engine.step()
    assert second is not None
    assert model.batches == [[(1, 2, 3, 4, 5, 6)], [(7,) * 6, (1,), (9,)]]
    whole = vector((1, 2, 3, 4, 5, 6)) + vector((7,) * 6) + vector((1,))
    assert second.answers == (
        Embedded(request_id="a", vectors=whole, width=3, pooling="mean"),
        Embedded(request_id="b", vectors=vector((9,), "cls"), width=3, pooling="cls"),
    )
    assert second.gauges.prompt_tokens_computed == 14
    assert (second.gauges.waiting, second.gauges.running) == (0, 0)
    assert engine.step() is None


def test_what_is_dropped_is_computed_no_further() -> None:
    engine, model = made()
    engine.do(asked("a", (1,) * 9, (2,) * 9))
    engine.do(asked("b", (3,)))
    assert engine.step() is not None
    engine.do(Drop("a"))
    last = engine.step()
    assert last is not None
    assert [it.request_id for it in last.answers] == ["b"]
    assert model.batches == [[(1,) * 9], [(3,)]]


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        ((), "there are no texts"),
        (((1,), ()), "text 1 has no tokens"),
        (((1,) * 41,), "text 0 of 41 tokens exceeds 40"),
        (((1,), (50_000,)), "text 1 has ids beyond a vocabulary of 50000"),
        (((-1,),), "text 0 has ids beyond"),
    ],
)
def test_what_can_never_be_computed_is_refused(texts: tuple[tuple[int, ...]], why: str) -> None:
    engine, model = made()
    engine.do(asked("a", *texts))
    results = engine.step()
    assert results is not None
    [refused] = results.answers
    assert isinstance(refused, Refused)
    assert (refused.code, model.batches) == ("bad_input", [])
    assert refused.detail.startswith(why)


def test_each_engine_refuses_what_the_other_does() -> None:
    encoder, _ = made()
    encoder.do(Submit(sequence("a")))
    _, decoder = counting_engine()
    decoder.do(asked("b", (1,)))
    for engine, name in ((encoder, "a"), (decoder, "b")):
        results = engine.step()
        assert results is not None
        [refused] = results.answers
        assert isinstance(refused, Refused)
        assert (refused.request_id, refused.code) == (name, "bad_input")


def test_a_process_of_the_real_model(minilm_folder: Path) -> None:
    """`infire serve` on a folder of an encoder: its hello, its vectors, and its end."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "infire", "serve", "--model", "m"]
    command += ["--model-dir", str(minilm_folder), "--device", "cpu", "--threads", "1"]
    with subprocess.Popen(
        [*command, "--fd", str(theirs.fileno())], pass_fds=[theirs.fileno()]
    ) as it:
        theirs.close()
        ours.settimeout(TIMEOUT_S)
        frames = ours.makefile("rb")

        def read() -> Hello | Results:
            size = int.from_bytes(frames.read(4), "little")
            message = msgspec.msgpack.decode(frames.read(size), type=FromEngine)
            assert isinstance(message, Hello | Results)
            return message

        hello = read()
        assert isinstance(hello, Hello)
        assert (hello.task, hello.context_window, hello.dtype) == (
            "text-embeddings",
            512,
            "float32",
        )
        body = msgspec.msgpack.encode(Notes((asked("a", (101, 2023, 102), (101, 4937, 102)),)))
        ours.sendall(len(body).to_bytes(4, "little") + body)
        answers: tuple[object, ...] = ()
        while not answers:
            results = read()
            assert isinstance(results, Results)
            answers = results.answers
        [answer] = answers
        assert isinstance(answer, Embedded)
        numbers = struct.unpack(f"<{2 * 384}f", answer.vectors)
        assert answer.width == 384
        assert sum(it * it for it in numbers[:384]) == pytest.approx(1.0, abs=1e-5)
        frames.close()
        ours.close()
        assert it.wait(TIMEOUT_S) == 0
