from __future__ import annotations

import pytest

from loadtest.bench.streams import BrokenStream, StreamReader

ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n'
DONE = b"data: [DONE]\n\n"


def text(said: str) -> bytes:
    return b'data: {"choices":[{"delta":{"content":"' + said.encode() + b'"}}],"usage":null}\n\n'


def test_pieces_of_text_are_timed_and_the_usage_is_counted() -> None:
    reader = StreamReader(10.0)
    for at, chunk in ((11.0, ROLE), (12.0, text("a")), (12.5, text("b")), (14.0, USAGE + DONE)):
        reader.feed(chunk, at)
    answer = reader.end(14.0)
    assert answer.texts == (12.0, 12.5)
    assert (answer.prompt_tokens, answer.completion_tokens) == (7, 3)
    assert answer.ttft_s == 2.0
    assert answer.gaps_s == [0.5]
    assert answer.decode_rate == 1.0  # two tokens in the two seconds after the first


def test_an_answer_may_be_cut_anywhere() -> None:
    whole = ROLE + text("a") + text("b") + USAGE + DONE
    for size in (1, 7, 63):
        reader = StreamReader(0.0)
        for begin in range(0, len(whole), size):
            reader.feed(whole[begin : begin + size], float(begin))
        assert len(reader.end(0.0).texts) == 2


def test_several_pieces_in_one_chunk_count_one_by_one() -> None:
    reader = StreamReader(0.0)
    reader.feed(text("a") + text("b") + text("c") + USAGE + DONE, 1.0)
    assert reader.end(1.0).texts == (1.0, 1.0, 1.0)


def test_spaces_in_the_json_and_line_ends_with_cr_change_nothing() -> None:
    reader = StreamReader(0.0)
    reader.feed(b'data: {"delta": {"content": "a"}}\r\n\r\n', 1.0)
    reader.feed(b'data: {"usage": {"prompt_tokens": 1, "completion_tokens": 1}}\r\n', 1.0)
    reader.feed(b"data: [DONE]\r\n", 1.0)
    answer = reader.end(1.0)
    assert answer.texts == (1.0,)
    assert answer.decode_rate is None  # nothing came after the first token


@pytest.mark.parametrize("said", ['\\"usage\\":{', '\\"error\\":{', "[DONE]"])
def test_what_the_model_says_is_not_taken_for_protocol(said: str) -> None:
    reader = StreamReader(0.0)
    reader.feed(text(said) + USAGE + DONE, 1.0)
    assert reader.end(1.0).completion_tokens == 3


def test_an_error_in_the_stream_is_told() -> None:
    with pytest.raises(BrokenStream, match="no capacity"):
        StreamReader(0.0).feed(b'data: {"error":{"message":"no capacity"}}\n\n', 0.0)


@pytest.mark.parametrize("chunk", [text("a") + USAGE, text("a") + DONE, USAGE + DONE])
def test_an_answer_that_lacks_its_end_its_usage_or_its_text_is_broken(chunk: bytes) -> None:
    reader = StreamReader(0.0)
    reader.feed(chunk, 0.0)
    with pytest.raises(BrokenStream):
        reader.end(0.0)


def test_a_server_that_marks_no_end_has_ended_with_its_usage() -> None:
    reader = StreamReader(0.0, marks_end=False)
    reader.feed(text("a") + USAGE, 1.0)
    assert reader.end(1.0).completion_tokens == 3
    cut = StreamReader(0.0, marks_end=False)
    cut.feed(text("a"), 1.0)
    with pytest.raises(BrokenStream, match="usage missing"):
        cut.end(1.0)
