"""Rounding as a quadratic problem in codes, and ways to solve it; where its matrices come from does not matter here.

T, V (g, o, k)   what a layer's weight should be, and what it is rounded to: g groups, o outputs and k inputs each
A (g, k, k)      second moments of the input columns (see `gram`)
G (g, o, o)      how an error in one output counts with one in another; without it, all alike and each for itself

tr(G (V - T) A (V - T)T) is to be small.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch

from torchquant.algorithms.layers.layout import Layout
from torchquant.fx.grids import Grid

__all__ = ["Problem", "enumerate_rounding", "fit_scale"]

_EXHAUSTIVE = 9  # inputs of a group up to which every rounding is tried


@dataclass(frozen=True)
class Problem:
    """Round `target` to a grid such that tr(outputs (V - target) metric (V - target)T) is small.

    Args:
        target: (g, o, k). metric: (g, k, k), symmetric, positive definite.
        scale, zero_point: of each weight, (g, o, k). cells: which of the grid's cells it is in, int64.
        count: cells of the grid. low, high: limits of the codes.
        outputs: (g, o, o), symmetric, positive definite, or None for the unit matrix.
        symmetric: zero points have to stay where they are.
    """

    target: torch.Tensor
    metric: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    cells: torch.Tensor
    count: int
    low: int
    high: int
    outputs: torch.Tensor | None = None
    symmetric: bool = True

    @staticmethod
    def of(weight: torch.Tensor, layout: Layout, grid: Grid, target: torch.Tensor, metric: torch.Tensor) -> Problem:
        """The problem of a site with a float weight in its own shape."""
        scale, zero_point = (layout.matrix(t.expand(weight.shape)) for t in grid.expand(weight.shape))
        cells = layout.matrix(grid.cells(weight.shape).expand(weight.shape))
        count, low, high = grid.scale.numel(), grid.quant_min, grid.quant_max
        return Problem(target, metric, scale, zero_point.float(), cells, count, low, high, symmetric=grid.symmetric)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What the codes (g, o, k) stand for."""
        return (codes - self.zero_point) * self.scale

    def nearest(self) -> torch.Tensor:
        """Codes by rounding each weight of the target."""
        return self.clamp(torch.round(self.target / self.scale) + self.zero_point)

    def clamp(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes within the limits."""
        return codes.clamp(self.low, self.high)

    def contributions(self, codes: torch.Tensor) -> torch.Tensor:
        """(g, o, k), whose sum is the error."""
        off = self.values(codes) - self.target
        return self.slope(off) * off

    def slope(self, off: torch.Tensor) -> torch.Tensor:
        """Half the derivative of the error by each value, (g, o, k), where the values are `off` the target."""
        by_rows = off @ self.metric
        return by_rows if self.outputs is None else self.outputs @ by_rows

    def by_rows(self) -> Problem:
        """The same with all outputs alike and each for itself."""
        return self if self.outputs is None else replace(self, outputs=None)

    def error(self, codes: torch.Tensor) -> float:
        """tr(outputs (V - target) metric (V - target)T)."""
        return float(self.contributions(codes).sum(dtype=torch.float64))

    def scaled(self, factor: torch.Tensor, zero_point: torch.Tensor | None = None) -> Problem:
        """The same with the scale of each cell (count,) multiplied, and its zero point (count,) another."""
        zeros = self.zero_point if zero_point is None else zero_point.float()[self.cells]
        return replace(self, scale=self.scale * factor[self.cells], zero_point=zeros)

    def own_slope(self, off: torch.Tensor) -> torch.Tensor:
        """`slope` (g, o, k) as far as it comes from weights of the same cell; `outputs` are left out."""
        width = self.cell_width()
        if width is None:
            same = self.cells[:, :1, :, None] == self.cells[:, :1, None, :]
            return off @ (self.metric * same[:, 0])
        groups, rows, inputs = off.shape
        blocks = self.metric.reshape(groups, inputs // width, width, inputs // width, width)
        blocks = blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)  # (g, cells, width, width)
        parts = off.reshape(groups, rows, inputs // width, width).transpose(1, 2)
        return (parts @ blocks).transpose(1, 2).reshape(off.shape)

    def cell_width(self) -> int | None:
        """How many neighbours in a row are one cell, if all cells of the first row are as wide; else None."""
        row = self.cells[0, 0]
        _, widths = torch.unique_consecutive(row, return_counts=True)
        width = int(widths[0])
        return width if bool((widths == width).all()) and len(widths) == len(row.unique()) else None


def fit_scale(problem: Problem, codes: torch.Tensor) -> torch.Tensor:
    """Least-squares factor (count,) on the scale of each cell, the codes as they are.

    Where a weight's row has several cells they are fitted one by one, which never raises the error but for couplings.
    """
    values = problem.values(codes)
    rest = problem.target - values
    own = problem.own_slope(values) * values
    top = values * (rest @ problem.metric) + own
    sums = torch.zeros(2, problem.count)
    sums[0].index_add_(0, problem.cells.reshape(-1), top.reshape(-1))
    sums[1].index_add_(0, problem.cells.reshape(-1), own.reshape(-1))
    factor = torch.where(sums[1] > 0, sums[0] / sums[1].clamp(min=1e-30), torch.ones(problem.count))
    return factor.clamp(0.5, 2.0)


def enumerate_rounding(problem: Problem) -> torch.Tensor | None:
    """The best of all 2^k roundings up or down of each row, for k up to 9 (depthwise convolutions); else None."""
    k, problem = problem.target.shape[-1], problem.by_rows()
    if k > _EXHAUSTIVE:
        return None
    floor = torch.floor(problem.target / problem.scale) + problem.zero_point
    choices = torch.tensor(list(itertools.product((0.0, 1.0), repeat=k)))
    best = torch.full(floor.shape[:2], torch.inf)
    codes = problem.nearest()
    for choice in choices:
        trial = problem.clamp(floor + choice)
        error = problem.contributions(trial).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        codes = torch.where(better[..., None], trial, codes)
    return codes
