"""What the parts of `gpu.py` share: the device, the clock, the time that is left, and rows of results."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from torchquant.ops.gpu import timing

__all__ = ["KEY", "Call", "Row", "Setup", "Weight", "reason", "report", "spread"]

KEY = ("section", "case", "format", "m", "runtime")
Row = dict[str, Any]
Call = Callable[[], object]
Weight = tuple[torch.Tensor, torch.Tensor]  # codes and factors, see `products.Product.weight`


@dataclass
class Setup:
    """Where and how to measure.

    Args:
        device: `cuda`, or `cpu` for a trial of the script with small sizes (`tiny`).
        seconds: how long all sections together may take; those that come later are skipped, and said to be.
        tune: search for the fastest cuts before measuring them.
    """

    device: str
    tiny: bool
    seconds: float
    tune: bool
    layers: int = 32
    start: float = field(default_factory=time.perf_counter)

    @property
    def left_s(self) -> float:
        """Seconds left."""
        return self.seconds - (time.perf_counter() - self.start)

    @property
    def gpu(self) -> bool:
        """Whether this measures a GPU."""
        return self.device == "cuda"

    def capture(self, calls: Sequence[Call]) -> timing.Sampler:
        """See `timing.captured`; by the wall clock on a CPU."""
        return timing.captured(calls) if self.gpu else timing.wall_clock(calls)

    def copies(self, weight_bytes: int) -> int:
        """How many copies of a weight to rotate."""
        if not self.gpu:
            return 2
        return timing.copies(weight_bytes, torch.cuda.get_device_properties(0).L2_cache_size)


def spread(samples: Sequence[float]) -> tuple[float, float]:
    """Median and distance between the quartiles."""
    low, middle, high = statistics.quantiles(samples, n=4)
    return middle, high - low


def reason(error: Exception) -> str:
    """An error on one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"


def report(row: Mapping[str, Any]) -> None:
    """Print a row."""
    hidden = {"section", "kernels", "others"}
    cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items() if k not in hidden and v != ""]
    print("  " + "  ".join(cells), flush=True)
