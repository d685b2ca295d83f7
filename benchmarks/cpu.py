"""Latency on this CPU: all runtimes interleaved in one process, so that drift of the machine hits all alike.

python benchmarks/cpu.py [--network lite0] [--runtime x86] [--batch 1] [--threads 1] [--seconds 30]
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import records
import torch
import torch._inductor.config
from networks import NETWORKS, Batch, load_network
from runtimes import RUNTIMES, Case, Run, set_threads

import torchquant as tq

KEY = ("network", "batch", "threads", "runtime")
BATCHES = {
    "lite0": (1, 16),
    "resnet20": (1, 16),
    "minilm": (1, 8, 16),
    "mobilenetv2": (1, 16),
    "resnet18": (1, 16),
    "resnet50": (1, 16),
}
CALLS, WARM_CALLS, MIN_ROUNDS, PAUSE_S = 3, 1, 8, 0.005


def main() -> None:
    """Measure what the command line asks for; the rows of a setting are written when it is done."""
    options = _options()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    for name in options.network or BATCHES:
        network = load_network(name)
        for size in options.batch or BATCHES.get(name, (1,)):
            with tempfile.TemporaryDirectory() as folder:
                case = Case(network.batched(size), Path(folder))
                for threads in options.threads or (1, 2):
                    with torch._inductor.config.patch(freezing=True):  # for every call: without it Dynamo compiles anew
                        rows = list(_rows(case, size, threads, options))
                    records.write("cpu", rows, KEY)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", action="append", choices=NETWORKS, help="repeatable; those of BATCHES if left out")
    parser.add_argument("--runtime", action="append", choices=RUNTIMES, help="repeatable; all if left out")
    parser.add_argument("--batch", action="append", type=int, help="repeatable; those of BATCHES if left out")
    parser.add_argument("--threads", action="append", type=int, help="repeatable; 1 and 2 if left out")
    parser.add_argument("--seconds", type=float, default=30, help="how long to measure one setting")
    return parser.parse_args()


def _rows(case: Case, size: int, threads: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Build every runtime for the setting, measure them together, and describe each."""
    network, example = case.network, case.network.held_out[0]
    case.threads = threads
    print(f"\n{network.name}, batch {size}, threads {threads}", flush=True)
    built = _build(case, options.runtime or list(RUNTIMES))
    with torch.no_grad():
        reference = network.model(*example)
        load = os.getloadavg()[0]
        times = measure({name: run for name, (run, _) in built.items()}, example, options.seconds)
        for name, (run, coverage) in built.items():
            row = {"network": network.name, "batch": size, "threads": threads, "runtime": RUNTIMES[name].name}
            row |= {"coverage": coverage, "sqnr_db": tq.sqnr_db(reference, run(example)), **_spread(times[name])}
            row |= {"load_before": load, "load_after": os.getloadavg()[0]}
            print(_line(row), flush=True)
            yield row


def _build(case: Case, names: Sequence[str]) -> dict[str, tuple[Run, str]]:
    """The runtimes that can be built here; what cannot is skipped with the reason."""
    torch._dynamo.reset()
    set_threads(case.threads)
    built = {}
    for name in names:
        runtime = RUNTIMES[name]
        if not (runtime.transformer if case.network.transformer else runtime.cnn):
            continue
        start = time.perf_counter()
        try:
            built[name] = runtime.build(case)
        except Exception as error:
            text = " ".join(str(error).split())
            print(f"  skipped: {runtime.name}: {type(error).__name__}: {text[:300]}", flush=True)
            continue
        logging.getLogger(__name__).info("%s built in %.1f s", runtime.name, time.perf_counter() - start)
    return built


def measure(runs: dict[str, Run], batch: Batch, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of single calls: round after round, each runtime in turn, the order rotated.

    In its turn a runtime is called `WARM_CALLS` times untimed, then `CALLS` times timed. The pause before a
    turn lets the thread pool of the runtime before it stop spinning.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for run in runs.values():
        run(batch)  # whatever is done once is done before the clock starts
    start, rounds = time.perf_counter(), 0
    while rounds < MIN_ROUNDS or time.perf_counter() - start < seconds:
        for name in order:
            time.sleep(PAUSE_S)
            times[name] += _turn(runs[name], batch)
        order = order[1:] + order[:1]
        rounds += 1
    return times


def _turn(run: Run, batch: Batch) -> list[float]:
    for _ in range(WARM_CALLS):
        run(batch)
    milliseconds = []
    for _ in range(CALLS):
        start = time.perf_counter_ns()
        run(batch)
        milliseconds.append((time.perf_counter_ns() - start) / 1e6)
    return milliseconds


def _spread(times: list[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median_ms": middle, "min_ms": min(times), "iqr_ms": high - low, "calls": len(times)}


def _line(row: dict[str, Any]) -> str:
    return (
        f"  {row['runtime']:55s}{row['median_ms']:8.2f} ms median {row['min_ms']:8.2f} min {row['iqr_ms']:7.2f} iqr "
        f"{row['calls']:5d} calls  {row['sqnr_db']:6.1f} dB  {row['coverage']}"
    )


if __name__ == "__main__":
    main()
