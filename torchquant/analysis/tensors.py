"""One quantized tensor over all batches: how much of it the grid keeps, and what about it is unusual."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from torchquant.fx.grids import Grid

__all__ = ["TensorAnalysis", "TensorStatistics"]

_BINS = 64


@dataclass(frozen=True)
class TensorAnalysis:
    """What quantization does to one tensor.

    Args:
        name: of the node whose value it is.
        grid: how it is quantized, in words.
        sqnr_db: 10 log10(sum x^2 / sum (x - q)^2), over the finite elements.
        lost: share of the elements, zeros left out, that are off by half of themselves or more.
        clipped: share of the elements that lie outside of what a static grid can hold, by more than half a step.
        low, high: least and largest finite element.
        grid_low, grid_high: what a static grid can hold, over all of its scales; None of others.
        channels, dead_channels: how many, and in how many of them all elements are zero; 0 and 0 without channels.
        outlier: largest absolute element of the largest channel, over that of the median one; 1 without channels.
        counts: elements in each of 64 equal bins from `bins_low` to `bins_high`; what lies outside is in the end bins.
    """

    name: str
    grid: str
    sqnr_db: float
    lost: float
    clipped: float
    low: float
    high: float
    grid_low: float | None
    grid_high: float | None
    channels: int
    dead_channels: int
    outlier: float
    counts: tuple[int, ...]
    bins_low: float
    bins_high: float

    @property
    def used(self) -> float:
        """Share of a static grid's range that the elements reach over; 1 of others."""
        if self.grid_low is None or self.grid_high is None or self.grid_high <= self.grid_low:
            return 1.0
        reached = min(self.high, self.grid_high) - max(self.low, self.grid_low)
        return max(0.0, reached) / (self.grid_high - self.grid_low)


class TensorStatistics:
    """What `TensorAnalysis` says, on the way.

    Args:
        name, grid: as there.
        static: the grid, where it is known before run time.
        axis: of the channels, or None.
    """

    def __init__(self, name: str, grid: str, static: Grid | None, axis: int | None) -> None:
        self._name, self._grid, self._static, self._axis = name, grid, static, axis
        self._signal = self._noise = 0.0
        self._count = self._lost = self._clipped = self._nonzero = 0
        self._low, self._high = math.inf, -math.inf
        self._largest: torch.Tensor | None = None
        self._counts: torch.Tensor | None = None
        self._bins = (0.0, 0.0)

    def add(self, exact: torch.Tensor, quantized: torch.Tensor) -> None:
        """A tensor and what is left of it, alike in shape."""
        finite = exact.isfinite()
        x, q = exact.float().masked_fill(~finite, 0.0), quantized.float().masked_fill(~finite, 0.0)
        off = (x - q).abs()
        self._signal += float(x.double().square().sum())
        self._noise += float(off.double().square().sum())
        self._lost += int(((off >= x.abs() / 2) & (x != 0)).sum())
        self._nonzero += int((x != 0).sum())
        self._count += int(finite.sum())
        if x.numel():
            self._low, self._high = min(self._low, float(x.min())), max(self._high, float(x.max()))
            self._clipped += int(self._is_clipped(x).sum()) if self._static is not None else 0
            self._add_channels(x)
            self._add_counts(x[finite])

    def _limits(self, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Least and largest value of the grid, and its step, broadcastable to `shape`."""
        assert self._static is not None
        scale, zero_point = self._static.expand(shape)
        low, high = ((end - zero_point) * scale for end in (self._static.quant_min, self._static.quant_max))
        return low, high, scale

    def _is_clipped(self, x: torch.Tensor) -> torch.Tensor:
        low, high, step = self._limits(x.shape)
        return (x < low - step / 2) | (x > high + step / 2)

    def _add_channels(self, x: torch.Tensor) -> None:
        if self._axis is None or not -x.ndim <= self._axis < x.ndim or x.ndim < 2:
            return
        largest = x.abs().movedim(self._axis, 0).flatten(1).amax(1)
        if self._largest is None:
            self._largest = largest
        elif self._largest.shape == largest.shape:
            self._largest = torch.maximum(self._largest, largest)

    def _add_counts(self, x: torch.Tensor) -> None:
        if self._counts is None:
            low, high = float(x.min()), float(x.max())
            if self._static is not None:
                ends = [self._static.quant_min, self._static.quant_max]
                held = torch.cat([(end - self._static.zero_point) * self._static.scale for end in ends])
                low, high = min(low, float(held.min())), max(high, float(held.max()))
            self._bins, self._counts = (low, high if high > low else low + 1.0), torch.zeros(_BINS, dtype=torch.int64)
        low, high = self._bins
        places = ((x - low) * (_BINS / (high - low))).long().clamp_(0, _BINS - 1)
        self._counts += torch.bincount(places, minlength=_BINS)

    def result(self) -> TensorAnalysis:
        """What was seen."""
        largest, held = self._largest, None
        if self._static is not None:
            ends = [self._static.quant_min, self._static.quant_max]
            held = torch.cat([(end - self._static.zero_point) * self._static.scale for end in ends])
        alive = None if largest is None else largest[largest > 0]
        return TensorAnalysis(
            name=self._name,
            grid=self._grid,
            sqnr_db=decibels(self._signal, self._noise),
            lost=self._lost / max(self._nonzero, 1),
            clipped=self._clipped / max(self._count, 1),
            low=self._low,
            high=self._high,
            grid_low=None if held is None else float(held.min()),
            grid_high=None if held is None else float(held.max()),
            channels=0 if largest is None else len(largest),
            dead_channels=0 if largest is None else int((largest == 0).sum()),
            outlier=1.0 if alive is None or not len(alive) else float(alive.max() / alive.median()),
            counts=() if self._counts is None else tuple(self._counts.tolist()),
            bins_low=self._bins[0],
            bins_high=self._bins[1],
        )


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise): infinite without noise, minus infinity without signal."""
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
