"""OpenVINO GenAI's engine as a process: requests in, ids out, a line of JSON each way a step.

Run by the Python that has `openvino_genai`, of which it needs nothing else: `openvino_server`
starts it. In: [number, prompt ids, max tokens]. Out: "ready", then lists of [number, new ids,
ended].
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np
import openvino
import openvino_genai

BLOCK_TOKENS = 32  # of KV, as OpenVINO has it on a CPU


class Engine:
    """Steps a pipeline, and tells of every step in one line."""

    def __init__(self, pipeline: Any, out: TextIO) -> None:
        self._pipeline = pipeline
        self._out = out
        self._running: dict[int, tuple[Any, int]] = {}  # by number: its handle, ids still to come

    @property
    def idle(self) -> bool:
        return not self._running

    def add(self, number: int, ids: list[int], max_tokens: int) -> None:
        config = openvino_genai.GenerationConfig(
            max_new_tokens=max_tokens, ignore_eos=True, do_sample=False
        )
        prompt = openvino.Tensor(np.array([ids], dtype=np.int64))
        handle = self._pipeline.add_request(number, prompt, config)
        self._running[number] = (handle, max_tokens)

    def step(self) -> None:
        self._pipeline.step()
        if news := list(self._news()):
            self.say(news)

    def say(self, news: object) -> None:
        self._out.write(json.dumps(news, separators=(",", ":")) + "\n")
        self._out.flush()

    def _news(self) -> Iterator[tuple[int, list[int], bool]]:
        for number, (handle, left) in list(self._running.items()):
            if not handle.can_read():
                continue
            [output] = handle.read().values()
            left -= len(output.generated_ids)
            yield number, list(output.generated_ids), left <= 0
            if left > 0:
                self._running[number] = (handle, left)
            else:
                del self._running[number]


def pipeline(asked: argparse.Namespace) -> Any:
    """Continuous batching on the CPU: no prefix cache, prompts in chunks."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.num_kv_blocks = -(-asked.kv_tokens // BLOCK_TOKENS)
    scheduler.enable_prefix_caching = False
    scheduler.dynamic_split_fuse = True
    properties = {
        "INFERENCE_PRECISION_HINT": asked.precision,
        "KV_CACHE_PRECISION": asked.kv_precision,  # else 8 bits: not what the others compute
        "INFERENCE_NUM_THREADS": asked.threads,
    }
    return openvino_genai.ContinuousBatchingPipeline(asked.model, scheduler, "CPU", properties)


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("--model", required=True)
    flags.add_argument("--kv-tokens", type=int, required=True)
    flags.add_argument("--threads", type=int, required=True)
    flags.add_argument("--precision", choices=["bf16", "f32"], required=True)
    flags.add_argument("--kv-precision", choices=["bf16", "f16", "f32"], required=True)
    asked = flags.parse_args()
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the library prints is no news
    engine = Engine(pipeline(asked), out)
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=read, args=(lines,), daemon=True).start()
    engine.say("ready")
    while True:
        while engine.idle or not lines.empty():
            if not (line := lines.get()):
                return
            engine.add(*json.loads(line))
        engine.step()


def read(lines: queue.SimpleQueue[str]) -> None:
    """Everything that is asked, then an empty line at the end."""
    for line in sys.stdin:
        lines.put(line)
    lines.put("")


if __name__ == "__main__":
    main()
