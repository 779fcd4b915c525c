from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from infire import serve as serve_module
from infire.engine import Engine
from infire.notes import Broken, Drop, Exported, FromEngine, Hello, Note, Notes, Results
from infire.notes import Submit as SubmitNote
from infire.plan import RowResult, StepPlan
from infire.request import Sequence
from infire.serve import Peer, serve
from tests.fakes.counting_engine import counting_engine
from tests.fakes.model_folder import CONTEXT_WINDOW, make_counting_folder
from tests.fakes.runner import CountingRunner
from tests.fakes.sequences import answer, sequence

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60.0


class Worker:
    """The other end: a worker that reads and writes whole frames, and waits for them."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(TIMEOUT_S)
        self._file = sock.makefile("rb")
        self._decoder = msgspec.msgpack.Decoder(FromEngine)

    def read(self) -> Hello | Results | Broken:
        size = int.from_bytes(self._exactly(4), "little")
        return self._decoder.decode(self._exactly(size))

    def results(self) -> Results:
        message = self.read()
        assert isinstance(message, Results), message
        return message

    def send(self, *notes: Note) -> None:
        self.sock.sendall(frame(*notes))

    def submit(self, seq: Sequence) -> None:
        self.send(SubmitNote(seq))

    def ids(self, num_finished: int) -> dict[str, list[int]]:
        """Read until so many requests have finished: the ids of each."""
        ids: dict[str, list[int]] = {}
        while num_finished:
            for step in self.results().steps:
                ids.setdefault(step.request_id, []).extend(step.ids)
                num_finished -= step.finish is not None
        return ids

    def at_end(self) -> bool:
        return self._file.read(1) == b""

    def hang_up(self) -> None:
        self._file.close()
        self.sock.close()

    def _exactly(self, size: int) -> bytes:
        content = self._file.read(size)
        assert len(content) == size, "the engine hung up"
        return content


def frame(*notes: Note) -> bytes:
    body = msgspec.msgpack.encode(Notes(notes))
    return len(body).to_bytes(4, "little") + body


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    """Serve an engine in a thread; at the end hang up, and see the loop leave."""
    workers: list[Worker] = []
    threads: list[threading.Thread] = []

    def start(engine: Engine | None = None, **settings) -> Worker:
        hello, counting = counting_engine(**settings)
        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=serve, args=(theirs, hello, engine or counting))
        thread.start()
        threads.append(thread)
        workers.append(Worker(ours))
        return workers[-1]

    yield start
    for worker in workers:
        worker.hang_up()
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


def test_hello_comes_first_and_says_what_fits(start) -> None:
    worker = start(model="m", kv_tokens=100, block_tokens=8)
    hello = worker.read()
    assert isinstance(hello, Hello)
    assert (hello.model, hello.max_sequence_tokens, hello.vocab_size) == ("m", 96, 259)
    assert hello.layout.groups[0].block_tokens == 8


def test_every_step_is_one_frame(start) -> None:
    worker = start()
    worker.read()
    worker.send(SubmitNote(sequence("a", 3, 3)), SubmitNote(sequence("b", 5, 2)))
    frames = [worker.results() for _ in range(3)]
    assert [results.gauges.step for results in frames] == [1, 2, 3]
    assert [[step.request_id for step in results.steps] for results in frames] == [
        ["a", "b"],
        ["a", "b"],
        ["a"],
    ]


def test_an_idle_engine_still_beats(start) -> None:
    worker = start()
    worker.read()
    assert [worker.results().gauges.step for _ in range(2)] == [0, 0]


def test_an_idle_engine_waits_in_its_selector(start, monkeypatch) -> None:
    """One wait a heartbeat and no step in between: nothing spins."""
    waits: list[float] = []
    wait = Peer.wait

    def counted(peer: Peer, timeout_s: float) -> None:
        waits.append(timeout_s)
        wait(peer, timeout_s)

    monkeypatch.setattr(Peer, "wait", counted)
    worker = start()
    worker.read()
    for _ in range(2):
        worker.results()
    assert len(waits) < 10


def test_acts_between_steps_show_in_the_gauges_at_once(start) -> None:
    worker = start(kv_tokens=64, block_tokens=4)
    worker.read()
    worker.submit(sequence("a", prompt=9, max_tokens=1, hold=True))
    assert worker.results().gauges.held == 1
    worker.send(Drop("a"))
    gauges = worker.results().gauges
    assert (gauges.held, gauges.free_blocks) == (0, 16)


def test_answers_come_without_a_step(start, tmp_path: Path) -> None:
    worker = start()
    worker.read()
    held = sequence("a", prompt=9, max_tokens=1, hold=True)
    worker.send(SubmitNote(held, export_path=str(tmp_path / "kv")))
    assert worker.results().steps
    assert worker.results().answers == (Exported("a", 72, 9),)


def test_frames_may_come_in_pieces(start) -> None:
    worker = start()
    worker.read()
    message = frame(SubmitNote(sequence("a"))) + frame(SubmitNote(sequence("b", 7)))
    for byte in message[:-1]:
        worker.sock.send(bytes([byte]))
    assert worker.ids(num_finished=1) == {"a": answer(3, 4)}
    worker.sock.send(message[-1:])
    assert worker.ids(num_finished=1) == {"b": answer(7, 4)}


def test_a_peer_that_does_not_read_loses_nothing(start, monkeypatch) -> None:
    """Steps stop while frames wait to be read; acts are still heard, and then all goes on."""
    monkeypatch.setattr(serve_module, "MAX_UNREAD_BYTES", 1)
    stalled = threading.Event()
    wait = Peer.wait

    def noticing(peer: Peer, timeout_s: float) -> None:
        if peer.num_unsent:
            stalled.set()
        wait(peer, timeout_s)

    monkeypatch.setattr(Peer, "wait", noticing)
    worker = start(max_running=200, kv_tokens=1 << 16)
    worker.send(*[SubmitNote(sequence(f"r{n}", 3, 200)) for n in range(200)])
    assert stalled.wait(TIMEOUT_S)
    worker.send(*[SubmitNote(sequence(f"late{n}", 3, 2)) for n in range(200)])
    worker.read()
    ids = worker.ids(num_finished=400)
    assert all(ids[f"r{n}"] == answer(3, 200) for n in range(200))
    assert all(ids[f"late{n}"] == answer(3, 2) for n in range(200))


def test_hanging_up_in_the_middle_of_work_ends_the_loop(start) -> None:
    worker = start(step_s=0.001)
    worker.read()
    worker.submit(sequence("a", 3, 10_000))
    worker.results()
    worker.hang_up()


class BrokenRunner(CountingRunner):
    def run(self, plan: StepPlan) -> list[RowResult]:
        raise RuntimeError("out of memory")


def test_a_step_that_fails_is_told_and_raised() -> None:
    hello, _ = counting_engine()
    _, engine = counting_engine()
    engine._runner = BrokenRunner(hello.layout, [4])
    ours, theirs = socket.socketpair()
    worker = Worker(ours)
    worker.submit(sequence("a"))
    with pytest.raises(RuntimeError, match="out of memory"):
        serve(theirs, hello, engine)
    assert isinstance(worker.read(), Hello)
    assert worker.read() == Broken("RuntimeError: out of memory")
    assert worker.at_end()
    worker.hang_up()


def test_frames_queue_behind_a_full_socket_in_order() -> None:
    ours, theirs = socket.socketpair()
    peer, worker = Peer(theirs), Worker(ours)
    sent = 0
    while not peer.num_unsent:
        peer.send_nowait(Broken(f"{sent}" * 100))
        sent += 1
    for _ in range(10):
        peer.send_nowait(Broken(f"{sent}" * 100))
        sent += 1
    flush = threading.Thread(target=peer.flush, args=(TIMEOUT_S,))
    flush.start()
    assert [worker.read() for _ in range(sent)] == [Broken(f"{n}" * 100) for n in range(sent)]
    flush.join(TIMEOUT_S)
    peer.close()
    worker.hang_up()


class Process:
    """A counting engine process and its worker's end of the socket."""

    def __init__(self, *flags: str, command: tuple[str, ...] = ()) -> None:
        ours, theirs = socket.socketpair()
        program = command or (str(ROOT / "tests/fakes/counting_engine.py"), "serve")
        self.child = subprocess.Popen(
            [sys.executable, *program, "--fd", str(theirs.fileno()), *flags],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
            cwd=os.sep,
        )
        theirs.close()
        self.worker = Worker(ours)

    def end(self) -> int:
        """Hang up; its exit status."""
        self.worker.hang_up()
        return self.wait()

    def wait(self) -> int:
        _, self.stderr = self.child.communicate(timeout=TIMEOUT_S)
        return self.child.returncode


@pytest.mark.system
def test_the_counting_engine_is_a_process(tmp_path: Path) -> None:
    folder = make_counting_folder(tmp_path / "model")
    process = Process("--model", "m", "--model-dir", str(folder), "--kv-tokens", "256")
    hello = process.worker.read()
    assert isinstance(hello, Hello)
    assert (hello.context_window, hello.max_sequence_tokens) == (CONTEXT_WINDOW, 256)
    assert hello.model_digest == hello.layout.model_digest != "counting"
    process.child.send_signal(signal.SIGINT)  # Ctrl-C in the worker's terminal
    process.worker.submit(sequence("a"))
    assert process.worker.ids(num_finished=1) == {"a": answer(3, 4)}
    assert process.end() == 0
    assert process.stderr == b""


@pytest.mark.system
def test_an_engine_process_ends_at_sigterm() -> None:
    process = Process()
    process.worker.read()
    process.child.terminate()
    assert process.wait() == -signal.SIGTERM
    assert process.worker.at_end()
    process.worker.hang_up()


@pytest.mark.system
def test_an_engine_that_cannot_load_says_why(tmp_path: Path) -> None:
    (tmp_path / "edgefire.json").write_text("{")
    process = Process("--model-dir", str(tmp_path))
    broken = process.worker.read()
    assert isinstance(broken, Broken)
    assert "JSONDecodeError" in broken.detail
    assert process.end() != 0


def test_the_counting_engine_needs_no_torch() -> None:
    check = "import sys, tests.fakes.counting_engine; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, timeout=TIMEOUT_S)
