"""Timing a stream, with a clock that a person can follow."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.samples import Reading, Refused, Sample, read_samples, write_line


class Ticking:
    """Every look at it is a second later."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def text(word: str) -> list[bytes]:
    return [f'data: {{"response":"{word}","p":"abc"}}\r\n'.encode(), b"\r\n"]


USAGE = [b'data: {"response":"","usage":{"prompt_tokens":5,"completion_tokens":3}}\n', b"\n"]
DONE = [b"data: [DONE]\n", b"\n"]


def test_each_piece_of_text_is_timed_and_usage_kept() -> None:
    reading = Reading(Ticking())
    reading.read([*text("a"), *text("b"), *text("c"), *text(""), *USAGE, *DONE])
    assert reading.texts == [1.0, 2.0, 3.0]
    assert reading.completion_tokens == 3


@pytest.mark.parametrize("lines", [[], text("a"), [*text("a"), *USAGE], [b"<html>\n"]])
def test_a_stream_without_its_end_is_cut_short(lines: list[bytes]) -> None:
    with pytest.raises(Refused, match=r"without \[DONE\]"):
        Reading(Ticking()).read(lines)


@pytest.mark.parametrize("event", [b'{"errors":[{"code":7009}]}', b'{"error":{"message":"x"}}'])
def test_an_error_in_the_stream_is_one_whatever_follows(event: bytes) -> None:
    with pytest.raises(Refused, match="error in the stream"):
        Reading(Ticking()).read([*text("a"), b"data: " + event + b"\n", *DONE])


def sample(**changes: object) -> Sample:
    values = {"client": "Europe", "region": "weur", "sent": 10.0, "ended": 15.0, **changes}
    return Sample(**values)  # type: ignore[arg-type]


def test_what_a_sample_says() -> None:
    one = sample(texts=(11.0, 11.5, 12.5, 13.0), completion_tokens=5)
    assert one.ttft_s == 1.0
    assert one.gaps_s == [0.5, 1.0, 0.5]
    assert one.tokens_per_s == (5 - 1) / 2.0


@pytest.mark.parametrize("texts", [(), (11.0,)])
def test_an_answer_too_short_to_flow_has_no_rate(texts: tuple[float, ...]) -> None:
    one = sample(texts=texts, completion_tokens=len(texts))
    assert one.gaps_s == []
    assert one.tokens_per_s is None


def test_samples_come_back_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    assert list(read_samples(path)) == []
    written = [sample(texts=(11.25,)), sample(error="HTTP 503: no\nline", region="")]
    path.write_bytes(b"".join(write_line(one) for one in written))
    assert list(read_samples(path)) == written
