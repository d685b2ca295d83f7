"""Programs called from many threads while others are loaded and lowered beside: are the answers right, is memory flat?

python benchmarks/threads.py [--calls 100000] [--threads 8] [--loads 100] [--lowerings 4]

Every answer is held against that of the first call of the same program on the same input, bit for bit, and those
against the converted graph's. Resident memory is read after a tenth of the calls and at their end. A loaded program's
libraries stay mapped as long as the process lives, so the loads are few. A row goes into `results/threads.json`.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import records
import torch
from memory import resident_bytes
from torch import nn

import torchquant as tq
from torchquant.backends import inductor_x86
from torchquant.quantizers import X86Quantizer

KEY = ("threads", "calls")
INPUTS = 16  # of each program
FLAT = 0.1  # of the calls, after which memory is to stay what it is


class Convolutions(nn.Module):
    """An image network whose batch varies."""

    example = torch.randn(2, 3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 5)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Linears(nn.Module):
    """A residual network of linears."""

    example = torch.randn(2, 24)

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 64), nn.Linear(64, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


@dataclass
class Called:
    """A program, its inputs, and what it made of them first."""

    program: Any
    inputs: list[torch.Tensor]
    expected: list[torch.Tensor]

    def is_right(self, number: int) -> bool:
        """Whether a call gives the answer that it gave first."""
        i = number % INPUTS
        return torch.equal(self.program(self.inputs[i]), self.expected[i])


@dataclass
class Beside:
    """Work that goes on while programs are called: how often it was done, and what went wrong."""

    done: int = 0
    errors: list[str] = field(default_factory=list)

    def start(
        self, work: Callable[[int], object], count: int, pause_s: float, ended: threading.Event
    ) -> threading.Thread:
        """Do it in a thread of its own, at most `count` times."""

        def run() -> None:
            while self.done < count and not ended.wait(pause_s):
                try:
                    work(self.done)
                except Exception as error:
                    self.errors.append(f"{type(error).__name__}: {error}")
                self.done += 1

        thread = threading.Thread(target=run)
        thread.start()
        return thread


def graph_of(kind: type[Any], seed: int = 0) -> Any:
    """A converted graph with a dynamic batch."""
    torch.manual_seed(seed)
    model, shapes = kind().eval(), ({0: torch.export.Dim.DYNAMIC},)
    batches = [(torch.randn_like(kind.example),) for _ in range(4)]
    return tq.quantize(model, batches[0], batches, quantizer=X86Quantizer(), dynamic_shapes=shapes, progress=False)


def called(kind: type[Any]) -> Called:
    """A program of a network, with answers that were held against the converted graph's."""
    graph = graph_of(kind)
    program = inductor_x86.lower(graph, (kind.example,), progress=False)
    inputs = [torch.randn(1 + i % 5, *kind.example.shape[1:]) for i in range(INPUTS)]
    expected = [program(x) for x in inputs]
    for x, y in zip(inputs, expected, strict=True):
        torch.testing.assert_close(y, graph(x), rtol=0.05, atol=0.05 * float(y.abs().max()))
    return Called(program, inputs, expected)


@dataclass
class Counts:
    """Of all threads."""

    calls: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    flat_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, calls: int, wrong: int, flat_at: int) -> None:
        """Add those of one thread since it last did."""
        with self.lock:
            self.calls, self.wrong = self.calls + calls, self.wrong + wrong
            if not self.flat_bytes and self.calls >= flat_at:
                self.flat_bytes = resident_bytes()


def call_often(programs: list[Called], count: int, flat_at: int, pause_s: float, first: int, counts: Counts) -> None:
    """One thread: `count` calls of all programs in turn."""
    for start in range(0, count, 100):
        calls = range(start, min(count, start + 100))
        try:
            wrong = sum(not programs[(first + i) % len(programs)].is_right(first + 3 * i) for i in calls)
        except Exception as error:
            counts.errors.append(f"{type(error).__name__}: {error}")
            wrong = len(calls)
        counts.add(len(calls), wrong, flat_at)
        time.sleep(pause_s)


def measured(folder: Path, calls: int, threads: int, loads: int, lowerings: int, minutes: float) -> dict[str, Any]:
    """A row: all of it at once."""
    programs = [called(Convolutions), called(Linears)]
    paths = [p.program.save(folder / f"{i}.pt2") for i, p in enumerate(programs)]

    def load(number: int) -> None:
        which = programs[number % 2]
        again = Called(inductor_x86.load(paths[number % 2]), which.inputs, which.expected)
        if not all(again.is_right(i) for i in range(INPUTS)):
            raise ValueError("a loaded program gives other answers")

    def lower(number: int) -> None:
        graph = graph_of(Linears, 1 + number)
        program = inductor_x86.lower(graph, (Linears.example,), progress=False)
        torch.testing.assert_close(program(Linears.example), graph(Linears.example), rtol=0.05, atol=0.05)

    ended, beside, counts = threading.Event(), {"loads": Beside(), "lowerings": Beside()}, Counts()
    pause_s = 60 * minutes / (calls / threads / 100)
    start = time.perf_counter()
    others = [
        beside["loads"].start(load, loads, 60 * minutes / loads, ended),
        beside["lowerings"].start(lower, lowerings, 0, ended),
    ]
    share = calls // threads
    arguments = [(programs, share, calls * FLAT, pause_s, i, counts) for i in range(threads)]
    callers = [threading.Thread(target=call_often, args=a) for a in arguments]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    ended.set()
    for thread in others:
        thread.join()
    gc.collect()
    end_bytes = resident_bytes()
    errors = counts.errors + [e for b in beside.values() for e in b.errors]
    print("\n".join(errors))
    return {
        "threads": threads,
        "calls": counts.calls,
        "wrong": counts.wrong,
        "errors": len(errors),
        **{name: b.done for name, b in beside.items()},
        "rss_at_tenth_bytes": counts.flat_bytes,
        "rss_at_end_bytes": end_bytes,
        "growth": end_bytes / counts.flat_bytes - 1,
        "seconds": round(time.perf_counter() - start),
    }


def main() -> None:
    """Call, print and keep a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--loads", type=int, default=100)
    parser.add_argument("--lowerings", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=2, help="over which the calls are spread, at least")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        row = measured(Path(folder), options.calls, options.threads, options.loads, options.lowerings, options.minutes)
    records.write("threads", [row], KEY)
    print("  ".join(f"{k}: {v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
