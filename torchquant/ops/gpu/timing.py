"""Timing of short GPU work: replays of CUDA graphs, over so many copies of the weights that none stays in the cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch

__all__ = ["Capture", "Sampler", "captured", "copies", "in_turns", "wall_clock"]

Sampler = Callable[[], float]
Capture = Callable[[Sequence[Callable[[], object]]], Sampler]
_Name = TypeVar("_Name", bound=Hashable)
_FEWEST_COPIES, _CACHES = 8, 3
_GRAPH_US, _MOST_ROUNDS = 1000, 64


def copies(weight_bytes: int, cache_bytes: int) -> int:
    """How many copies of a weight to take in turn: three times the cache, and eight at least."""
    return max(_FEWEST_COPIES, -(-_CACHES * cache_bytes // weight_bytes))


def captured(calls: Sequence[Callable[[], object]]) -> Sampler:
    """Capture the calls in one CUDA graph, over and over until it takes about a millisecond.

    Returns:
        A function that replays the graph and returns microseconds per call. The graph also runs once in front of the
        timed replay, which hides the time that launching it takes.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (*calls, *calls)[:2]:  # the first calls compile, load, and allocate workspaces
            call()
    sample = _replayed(_graph(calls, stream), len(calls))
    rounds = min(_MOST_ROUNDS, int(_GRAPH_US / (sample() * len(calls))))
    return sample if rounds < 2 else _replayed(_graph(list(calls) * rounds, stream), len(calls) * rounds)


def _graph(calls: Sequence[Callable[[], object]], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """What `torch.cuda.graph` does, without giving all cached memory back each time."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    return graph


def _replayed(graph: torch.cuda.CUDAGraph, count: int) -> Sampler:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end) / count

    return sample


def wall_clock(calls: Sequence[Callable[[], object]]) -> Sampler:
    """The same on a CPU, without a graph."""

    def sample() -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return 1e6 * (time.perf_counter() - start) / len(calls)

    return sample


def in_turns(samplers: Mapping[_Name, Sampler], rounds: int) -> dict[_Name, list[float]]:
    """Samples of each, taken in turns so that drift hits all alike."""
    samples: dict[_Name, list[float]] = {name: [] for name in samplers}
    for _ in range(rounds):
        for name, sample in samplers.items():
            samples[name].append(sample())
    return samples
