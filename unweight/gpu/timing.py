"""How long a kernel takes on a device, from replayed CUDA graphs. Knows no kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median

import torch

Launches = Callable[[int], object]  # of one of several copies of what is measured


def captured(launches: Launches, num_copies: int) -> torch.cuda.CUDAGraph:
    """A graph that runs once on every copy, in turn: each finds its matrix in memory, not in L2."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for copy in range(min(2, num_copies)):  # compiles, and takes what memory it needs
            launches(copy)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for copy in range(num_copies):
            launches(copy)
    return graph


def replay_us(graph: torch.cuda.CUDAGraph, num_copies: int) -> float:
    """Microseconds of one launch, of one replay."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end) * 1e3 / num_copies)


def time_us(launches: Launches, num_copies: int, rounds: int = 3) -> float:
    """The median of some replays after one."""
    graph = captured(launches, num_copies)
    graph.replay()
    return median(replay_us(graph, num_copies) for _ in range(rounds))


def interleaved_us(
    contenders: Mapping[str, Launches], num_copies: int, rounds: int
) -> dict[str, list[float]]:
    """Of every contender a time a round, one after the other in each round."""
    graphs = {name: captured(launches, num_copies) for name, launches in contenders.items()}
    for graph in graphs.values():
        graph.replay()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, graph in graphs.items():
            times[name].append(replay_us(graph, num_copies))
    return times
