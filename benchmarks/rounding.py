"""What the Gram form of AdaRound saves: the same iterations on one layer, from second moments and from sampled data.

python benchmarks/rounding.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import records
import torch
from candidates import LowBitQuantizer
from torch import nn

import torchquant as tq
from torchquant.algorithms.spans.reconstruction import Reconstruction, SoftRounding
from torchquant.calibration.stream import Stream, Task
from torchquant.fx.blocks import layers
from torchquant.solving.contract import Clock

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "3x3, 64 to 64, 8x8": (lambda: nn.Conv2d(64, 64, 3, padding=1), (64, 8, 8)),
    "1x1, 240 to 40, 28x28": (lambda: nn.Conv2d(240, 40, 1), (240, 28, 28)),
    "linear, 384 to 1536, 128 tokens": (lambda: nn.Linear(384, 1536), (128, 384)),
}
ROUNDS = 5
BATCH = 32


def main() -> None:
    """Time both forms in turns; rows are written as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=100)
    iterations = parser.parse_args().iterations
    for name, (make, shape) in LAYERS.items():
        for samples in (64, 256):
            row = {
                "layer": name,
                "samples": samples,
                "iterations": iterations,
                **_times(make, shape, samples, iterations),
            }
            records.write("rounding", [row], ("layer", "samples", "iterations"))
            print(
                f"{name:34s}{samples:5d} samples  {row['ratio']:.1f}x ({row['gram_s']:.2f} s, {row['sampled_s']:.2f} s)"
            )


def _times(make: Callable[[], nn.Module], shape: tuple[int, ...], samples: int, iterations: int) -> dict[str, Any]:
    torch.manual_seed(0)
    batches = [torch.rand(BATCH, *shape) for _ in range(samples // BATCH)]
    model = nn.Sequential(make()).eval()
    prepared = tq.prepare(tq.export(model, batches[0]), LowBitQuantizer(4, 8))
    tq.calibrate(prepared, batches, progress=False)
    walk = Stream(prepared, batches).walk(layers(prepared))  # holds the data while it stands
    task = next(walk)
    seconds: dict[str, list[float]] = {"gram_s": [], "sampled_s": []}
    for turn in range(ROUNDS + 1):
        for form, run in (("gram_s", _gram), ("sampled_s", _sampled)):
            start = time.perf_counter()
            run(task, iterations)
            if turn:
                seconds[form].append(time.perf_counter() - start)
    ratios = [s / g for g, s in zip(seconds["gram_s"], seconds["sampled_s"], strict=True)]
    return {
        **{form: statistics.median(times) for form, times in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def _gram(task: Task, iterations: int) -> None:
    """Moments from all samples, then the relaxation."""
    options: dict[str, Any] = {"search": False, "sweeps": 0, "refits": 0, "correct_bias": False, "compensate": False}
    tq.AdaRound(iterations, **options).solve(task, Clock())


def _sampled(task: Task, iterations: int) -> None:
    """The relaxation on batches of samples."""
    learned = Reconstruction(
        task, Clock(), SoftRounding, drop=0.0, sensitive=False, learn_steps=False, learn_biases=False
    )
    learned.run(iterations, lr=1e-2, step_lr=0.0, bias_lr=0.0, lam=10.0, beta=(20.0, 2.0), warm_up=0.2)


if __name__ == "__main__":
    main()
