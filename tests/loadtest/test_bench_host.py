"""The host bench: its arithmetic, its load generator against a scripted edge, and one short run."""

import os
import socket
import threading
import time
from pathlib import Path
from struct import Struct

import anyio
import msgspec
import pytest

from infire.admission import Limits
from infire.notes import Submit
from infire.request import SamplingParams, Sequence
from loadtest.bench.host_clock import cpu_s, shared_tally, wakeups
from loadtest.bench.host_engine import sleeping_engine
from loadtest.bench.host_load import Load, Outcome, keep_asking, request
from loadtest.bench.host_model import END_ID, FIRST_WORD, VOCABULARY, make_model
from loadtest.bench.host_report import Reading, Run, Shares, lines_of, shares
from loadtest.bench.host_run import Setting, measure
from origin_gpu.models import read_assets

ENDED = b'data: {"usage":{"completion_tokens":%d,"x":0}}\n\ndata: [DONE]\n\n'


def reading(at_s: float, tokens: int, *, each_s: float) -> Reading:
    """A reading at which every part but the scheduler has spent `each_s`, and that a quarter."""
    return Reading(
        at_s=at_s,
        tokens=tokens,
        scheduler_s=each_s / 4,
        engine_s=each_s,
        worker_s=each_s,
        front_s=each_s,
        edge_s=each_s,
        wakeups={"edge": 3 * tokens},
    )


class TestReport:
    def test_seconds_over_tokens_are_seconds_a_million(self) -> None:
        spent = shares(reading(1.0, 500, each_s=0.5), reading(3.0, 1_000_500, each_s=8.5))
        assert spent.tokens_per_s == 500_000
        assert spent.parts == {
            "scheduler": 2.0,
            "engine loop": 6.0,
            "worker process": 8.0,
            "worker, all": 16.0,
            "front": 8.0,
            "edge": 8.0,
            "all": 32.0,
        }
        assert spent.wakeups == {"edge": 3.0}

    def test_a_window_without_tokens_has_no_shares(self) -> None:
        with pytest.raises(ValueError, match="no token"):
            shares(reading(1.0, 7, each_s=1), reading(2.0, 7, each_s=2))

    def test_the_table_holds_median_and_spread(self) -> None:
        windows = [
            Shares(tokens_per_s=1000.0 * n, parts={"edge": float(n)}, wakeups={"edge": n / 4})
            for n in (3, 1, 2)
        ]
        run = Run(num_streams=1000, step_s=0.058, windows=windows, tokens_per_event=0.99)
        table = "\n".join(lines_of([run]))
        assert "| CPU-s per M tokens | 1,000 streams | target | Infire | vLLM |" in table
        assert "| edge | 2.0 (1.0-3.0) | <= 35 |" in table
        assert "| wake-ups a token: edge | 0.50 (0.25-0.75) |" in table
        assert "| tokens/s | 2,000 (1,000-3,000) |" in table
        assert "| step | 58.0 ms |" in table


class TestClocks:
    def test_a_process_that_works_spends_what_its_own_clock_says(self) -> None:
        before, began = cpu_s(os.getpid()), time.process_time()
        sum(range(2_000_000))
        spent = cpu_s(os.getpid()) - before
        assert spent > 0
        assert abs(spent - (time.process_time() - began)) < 0.5

    def test_who_waits_has_to_be_woken(self) -> None:
        before = wakeups(os.getpid())
        for _ in range(20):
            time.sleep(0.001)
        assert wakeups(os.getpid()) >= before + 20

    def test_what_one_holder_tells_another_reads(self, tmp_path: Path) -> None:
        with shared_tally(tmp_path / "tally") as mine, shared_tally(tmp_path / "tally") as theirs:
            assert theirs.read() == (0, 0, 0)
            mine.tell(7, 2**40, 3)
            assert theirs.read() == (7, 2**40, 3)
        assert (tmp_path / "tally").stat().st_size == Struct("=QQQ").size


class TestEngine:
    def test_it_answers_with_words_and_tells_what_it_did(self, tmp_path: Path) -> None:
        limits = Limits(max_step_tokens=64, max_running=4, vocab_size=VOCABULARY)
        with shared_tally(tmp_path / "tally") as tally:
            _, engine = sleeping_engine(
                model="m", kv_tokens=160, block_tokens=16, limits=limits, step_s=0.0, tally=tally
            )
            sampling = SamplingParams(max_tokens=3, seed=1)
            sequence = Sequence(
                request_id="a", model="m", token_ids=[1, 2], num_prompt=2, sampling=sampling
            )
            engine.do(Submit(sequence))
            ids = []
            while results := engine.step():
                ids += [one for step in results.steps for one in step.ids]
            pid, scheduler_ns, tokens = tally.read()
        assert len(ids) == tokens == 3
        assert all(FIRST_WORD <= one < END_ID for one in ids)
        assert pid == os.getpid()
        assert scheduler_ns > 0

    def test_a_worker_reads_the_model_folder(self, tmp_path: Path) -> None:
        assets = read_assets(make_model(tmp_path / "model"))
        assert assets.stop_ids == (END_ID,)
        vocabulary = msgspec.json.decode(assets.tokenizer_json)["model"]["vocab"]
        assert sorted(vocabulary.values()) == list(range(END_ID))


class ScriptedEdge:
    """Accepts one connection, and answers each request with the next script, piece by piece."""

    def __init__(self, *scripts: list[bytes]) -> None:
        self._scripts = scripts
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.requests: list[bytes] = []
        self.told, self._teller = os.pipe()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def load(self, output_tokens: int) -> Load:
        return Load(
            host="127.0.0.1",
            port=self._listener.getsockname()[1],
            path="/run",
            key="k",
            body={"prompt": "x"},
            num_streams=1,
            output_tokens=output_tokens,
        )

    def _serve(self) -> None:
        client, _ = self._listener.accept()
        with client:
            for script in self._scripts:
                self.requests.append(client.recv(65536))
                for piece in script:
                    client.sendall(piece)
            client.recv(65536)  # the request after the last answer
            os.close(self._teller)
            client.recv(1)  # the end: it is the client who closes

    def close(self) -> None:
        self._thread.join(10)
        self._listener.close()
        os.close(self.told)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


class TestLoad:
    def test_answers_are_counted_however_they_are_cut(self) -> None:
        whole = HEAD + chunk(b"data: 1\n\n") + chunk(ENDED % 5) + b"0\r\n\r\n"
        edge = ScriptedEdge([whole], [whole[at : at + 1] for at in range(len(whole))])
        try:
            outcome = keep_asking(edge.load(5), edge.told)
        finally:
            edge.close()
        assert (outcome.answers, outcome.tokens, outcome.bad) == (2, 10, "")
        assert b'"max_tokens":5' in edge.requests[0]

    @pytest.mark.parametrize(
        "answer",
        [
            b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n",
            HEAD + chunk(ENDED % 4) + b"0\r\n\r\n",  # a token too few
            HEAD + chunk((ENDED % 5).replace(b"[DONE]", b"")) + b"0\r\n\r\n",
        ],
        ids=["refused", "short", "unfinished"],
    )
    def test_an_answer_that_is_not_good_ends_the_load(self, answer: bytes) -> None:
        edge = ScriptedEdge([answer])
        try:
            outcome: Outcome = keep_asking(edge.load(5), edge.told)
        finally:
            edge.close()
        assert outcome.answers == 0
        assert outcome.bad

    def test_a_request_is_whole(self) -> None:
        edge_load = Load(
            host="h", port=1, path="/p", key="k", body={}, num_streams=1, output_tokens=9
        )
        head, _, body = request(edge_load, 7).partition(b"\r\n\r\n")
        assert head.startswith(b"POST /p HTTP/1.1\r\nhost: h:1\r\nauthorization: Bearer k\r\n")
        assert b"content-length: %d" % len(body) in head
        assert msgspec.json.decode(body) == {"max_tokens": 7}


@pytest.mark.system
@pytest.mark.slow
@pytest.mark.parametrize("api", ["native", "openai"])
def test_a_short_run_measures_every_part(api: str) -> None:
    setting = Setting(
        num_streams=5,
        step_s=0.005,
        output_tokens=7,
        api=api,  # type: ignore[arg-type]
        num_windows=2,
        window_s=0.5,
    )
    run = anyio.run(measure, setting, dict(os.environ))
    assert len(run.windows) == 2
    for window in run.windows:
        assert window.tokens_per_s > 0
        assert all(spent > 0 for spent in window.parts.values())
        assert all(woken > 0 for woken in window.wakeups.values())
