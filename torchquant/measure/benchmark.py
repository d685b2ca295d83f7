"""Interleaved latency: ratios of things timed in turns in one process, since single timings drift."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from torchquant.calibration import batches as data
from torchquant.errors import InputError

__all__ = ["Latency", "interleaved"]


@dataclass(frozen=True)
class Latency:
    """Wall time of one call over all rounds, in milliseconds.

    Args:
        median_ms, min_ms: over the rounds.
        iqr_ms: distance between the quartiles, the spread.
        rounds: how many.
        p99_ms: of 100 calls, 99 take no longer.
    """

    median_ms: float
    min_ms: float
    iqr_ms: float
    rounds: int
    p99_ms: float


def interleaved(
    candidates: Mapping[str, Callable[..., Any]], batch: Any, *, rounds: int = 50, warmup: int = 3
) -> dict[str, Latency]:
    """Time the candidates in turns on one batch: A B C, A B C, ...

    Args:
        candidates: name -> callable that takes the batch.
        batch: as for `calibrate`.
        rounds, warmup: counted and uncounted turns; at least 4 counted ones.

    Raises:
        InputError: no candidates or fewer than 4 rounds.
    """
    if not candidates or rounds < 4:
        raise InputError("interleaved needs at least one candidate and 4 rounds")
    times: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.no_grad():
        for turn in range(warmup + rounds):
            for name, run in candidates.items():
                start = time.perf_counter()
                data.call(run, batch)
                if turn >= warmup:
                    times[name].append((time.perf_counter() - start) * 1e3)
    return {name: _summary(values) for name, values in times.items()}


def _summary(values: list[float]) -> Latency:
    low, median, high = statistics.quantiles(values, n=4)
    most = min(statistics.quantiles(values, n=100)[98], max(values))  # few values are extrapolated
    return Latency(median, min(values), high - low, len(values), most)
