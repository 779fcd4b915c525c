"""Compile a grammar where it can do no harm: in a child process with limits. Knows no engine.

    python -m infire.grammar_check MODEL_FOLDER VOCABULARY_SIZE

The child says that it is ready, then answers each grammar with what is wrong with it, "" for
nothing. It compiles it, and then follows it at random for some tokens, for what is wrong with a
grammar may show only there. One that takes too much ends the child, and nobody else.

Frames are `infire.notes`': 4 bytes little-endian length, then MessagePack.
"""

from __future__ import annotations

import random
import resource
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

import msgspec
import numpy as np

from infire.grammar import BadGrammar, compiled, said
from infire.masks import SLOW
from infire.request import Grammar
from infire.vocabulary import BadVocabulary, Vocabulary, read_vocabulary

CPU_S = 2.0  # of one check
MOST_BYTES = 256 << 20  # of memory, beyond what the child has at first
WALL_S = 20.0  # of one check, on a machine that has other things to do
START_S = 60.0
_STEPS = 64  # tokens followed
_STEP_S = 0.05  # of CPU for one mask: it holds up every stream of the engine
_PREFIX_BYTES = 4
_STDOUT = 1


class CannotCheck(Exception):
    """There is no child, and none can be started: says nothing of the grammar."""


class Checker:
    """One child at a time, started when it is first needed. For one thread."""

    def __init__(self, folder: Path, vocab_size: int, *, wall_s: float = WALL_S) -> None:
        self._words = [sys.executable, "-m", __name__, str(folder), str(vocab_size)]
        self._wall_s = wall_s
        self._child: subprocess.Popen[bytes] | None = None

    def check(self, grammar: Grammar) -> str:
        """What is wrong with it; "" for nothing. Raises `CannotCheck`."""
        child = self._child or self._start()
        assert child.stdin is not None
        try:
            _send(child.stdin, msgspec.msgpack.encode(grammar))
        except OSError:  # it has died since the last one
            self.close()
            child = self._start()
            _send(child.stdin, msgspec.msgpack.encode(grammar))
        answer = _receive(child, self._wall_s)
        if answer is not None:
            return msgspec.msgpack.decode(answer, type=str)
        status = self._end()
        if status == -signal.SIGPROF:
            return f"it takes more than {CPU_S:g} s to compile"
        if status is None:
            return f"it takes more than {self._wall_s:g} s to compile"
        return f"it takes more than {MOST_BYTES >> 20} MiB to compile"

    def warm(self) -> None:
        """Have a child, after the last one came to its end, ahead of who needs one."""
        if self._child is None:
            with suppress(CannotCheck):  # who needs one is told
                self._start()

    def close(self) -> None:
        """End the child, if there is one."""
        if self._child is not None:
            self._end()

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            child = subprocess.Popen(
                self._words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
            )
        except OSError as error:
            raise CannotCheck(str(error)) from error
        self._child = child
        if _receive(child, START_S) is None:
            status = self._end()
            raise CannotCheck(f"the process that checks grammars ended with {status}")
        return child

    def _end(self) -> int | None:
        """How the child ended; None: it had to be killed."""
        child, self._child = self._child, None
        assert child is not None
        try:
            status = child.wait(0.5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            status = None
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            pipe.close()
        return status


def fault_of(grammar: Grammar, vocabulary: Vocabulary) -> str:
    """What is wrong with a grammar; "" for nothing that a walk along it would show."""
    try:
        matcher = compiled(grammar, vocabulary)
    except BadGrammar as error:
        return str(error)
    mask = np.zeros(vocabulary.num_words, np.int32)
    chance = random.Random(0)
    for _ in range(_STEPS):
        began = time.process_time()
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if matcher.is_error():
            return said(matcher)
        ids = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        ids = ids[~np.isin(ids, vocabulary.tokenizer.eos_tokens)]
        if time.process_time() - began > _STEP_S:
            return SLOW
        if matcher.is_stopped() or not len(ids):
            return "" if matcher.is_accepting() else "no token of this model can match it"
        if not matcher.consume_token(int(chance.choice(ids))):
            return said(matcher)
    return ""


def _limit_memory() -> None:
    """Nothing may grow by more than so much from here on."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _send(pipe: IO[bytes] | None, content: bytes) -> None:
    assert pipe is not None
    frame = len(content).to_bytes(_PREFIX_BYTES, "little") + content
    while frame:
        frame = frame[pipe.write(frame) :]


def _receive(child: subprocess.Popen[bytes], within_s: float) -> bytes | None:
    """One frame of a child; None when it ends, or says nothing for so long."""
    assert child.stdout is not None
    found, until = b"", time.monotonic() + within_s
    while True:
        if len(found) >= _PREFIX_BYTES:
            end = _PREFIX_BYTES + int.from_bytes(found[:_PREFIX_BYTES], "little")
            if len(found) >= end:
                return found[_PREFIX_BYTES:end]
        ready, _, _ = select.select([child.stdout], [], [], max(0.0, until - time.monotonic()))
        chunk = child.stdout.read(1 << 16) if ready else None
        if not chunk:
            return None
        found += chunk


def _frames(pipe: IO[bytes]) -> bytes:
    """The next frame; b"" at the end."""
    prefix = pipe.read(_PREFIX_BYTES)
    return pipe.read(int.from_bytes(prefix, "little")) if len(prefix) == _PREFIX_BYTES else b""


def main() -> None:
    """The child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; whoever asks decides
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the limit of CPU: it ends the process
    folder, size = sys.argv[1:]
    try:
        vocabulary = read_vocabulary(Path(folder), int(size))
    except BadVocabulary:
        sys.exit(1)
    if sys.platform == "linux":
        _limit_memory()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(_STDOUT, "wb", buffering=0) as out:
        _send(out, b"ready")
        while frame := _frames(sys.stdin.buffer):
            signal.setitimer(signal.ITIMER_PROF, CPU_S)
            fault = fault_of(msgspec.msgpack.decode(frame, type=Grammar), vocabulary)
            signal.setitimer(signal.ITIMER_PROF, 0)
            _send(out, msgspec.msgpack.encode(fault))


if __name__ == "__main__":
    main()
