from edge import sse


def test_an_event_is_one_line_of_json_and_an_empty_line() -> None:
    assert sse.event({"response": "a\nb"}) == b'data: {"response":"a\\nb"}\n\n'


def test_text_beyond_ascii_travels_as_utf_8() -> None:
    assert sse.event({"response": "é🙂"}) == 'data: {"response":"é🙂"}\n\n'.encode()


def test_a_named_event_says_its_name_first() -> None:
    assert sse.event([1], "error") == b"event: error\ndata: [1]\n\n"


def test_a_stream_ends_with_done() -> None:
    assert sse.DONE == b"data: [DONE]\n\n"


def test_an_event_cut_around_a_text_takes_any_other() -> None:
    data = {"model": '"content":""', "delta": {"content": ""}, "last": [{}]}
    before, after = sse.around(data, "content")
    for text in ("", 'a"b\n', "é🙂"):
        assert before + sse.encode(text) + after == sse.event(data | {"delta": {"content": text}})
