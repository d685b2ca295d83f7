"""Rounding as a quadratic problem in codes, and ways to solve it; where its matrices come from does not matter here.

T, V (g, o, k)   what a layer's weight should be, and what it is rounded to: g groups, o outputs and k inputs each
A (g, k, k)      second moments of the input columns (see `gram`)
G (g, o, o)      how an error in one output counts with one in another; without it, all alike and each for itself

tr(G (V - T) A (V - T)T) is to be small.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from torchquant.algorithms.layers.layout import Layout
from torchquant.fx.grids import Grid

__all__ = ["Problem", "by_cell", "descend", "enumerate_rounding", "fit_scale", "refit", "search_grid", "search_scale"]

Array = NDArray[np.float32]
_SHARES = 13  # factors on each end of an affine grid's range that are tried with each other
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
        width = self._cell_width()
        if width is None:
            same = self.cells[:, :1, :, None] == self.cells[:, :1, None, :]
            return off @ (self.metric * same[:, 0])
        groups, rows, inputs = off.shape
        blocks = self.metric.reshape(groups, inputs // width, width, inputs // width, width)
        blocks = blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)  # (g, cells, width, width)
        parts = off.reshape(groups, rows, inputs // width, width).transpose(1, 2)
        return (parts @ blocks).transpose(1, 2).reshape(off.shape)

    def _cell_width(self) -> int | None:
        """How many neighbours in a row are one cell, if all cells of the first row are as wide; else None."""
        row = self.cells[0, 0]
        _, widths = torch.unique_consecutive(row, return_counts=True)
        width = int(widths[0])
        return width if bool((widths == width).all()) and len(widths) == len(row.unique()) else None


def search_grid(problem: Problem, factors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Factors (count,) on the scales of cells, and for affine grids zero points (count,), that round at least error.

    Of a symmetric grid the scale is tried times each of `factors`; of an affine one, each end of its range for itself
    times some of them (13 at most, evenly chosen). The grid as it stands is among what is tried.
    """
    if problem.symmetric:
        return search_scale(problem, factors), None
    shares = factors[torch.linspace(0, len(factors) - 1, min(len(factors), _SHARES)).round().long()].tolist()
    scale, zero_point = (by_cell(problem, t) for t in (problem.scale, problem.zero_point))
    low, high = (problem.low - zero_point) * scale, (problem.high - zero_point) * scale
    best = _Best(problem, torch.ones(problem.count), zero_point)
    for low_share, high_share in itertools.product(shares, shares):
        step = ((high * high_share - low * low_share) / (problem.high - problem.low)).clamp(min=1e-30)
        best.offer(step / scale, (problem.low - torch.round(low * low_share / step)).clamp(problem.low, problem.high))
    return best.factor, best.zero_point


def by_cell(problem: Problem, values: torch.Tensor) -> torch.Tensor:
    """(count,) of what all weights (g, o, k) of a cell have in common."""
    common = torch.zeros(problem.count)
    common[problem.cells.reshape(-1)] = values.expand(problem.cells.shape).reshape(-1)
    return common


class _Best:
    """For each cell, the grid with the least error of rounding to nearest.

    The error of a cell is that of its own weights, which is exact per channel and per tensor.
    """

    def __init__(self, problem: Problem, factor: torch.Tensor, zero_point: torch.Tensor | None) -> None:
        self._problem, self.factor, self.zero_point = problem, factor, zero_point
        self._errors = self._of(factor, zero_point)

    def _of(self, factor: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
        trial = self._problem.scaled(factor, zero_point)
        off = trial.values(trial.nearest()) - trial.target
        errors = (trial.own_slope(off) * off).reshape(-1)
        return torch.zeros(trial.count).index_add_(0, trial.cells.reshape(-1), errors)

    def offer(self, factor: torch.Tensor, zero_point: torch.Tensor | None = None) -> None:
        """Take what is better than the best so far, cell by cell."""
        errors = self._of(factor, zero_point)
        better = errors < self._errors
        self._errors = torch.where(better, errors, self._errors)
        self.factor = torch.where(better, factor, self.factor)
        if zero_point is not None and self.zero_point is not None:
            self.zero_point = torch.where(better, zero_point, self.zero_point)


def search_scale(problem: Problem, factors: torch.Tensor) -> torch.Tensor:
    """For each cell, the factor (of `factors`) on its scale with the least error of rounding to nearest.

    Returns (count,). The error of a cell counts products of its own weights only, which is exact per channel and
    per tensor.
    """
    best = _Best(problem, torch.ones(problem.count), None)
    for factor in factors.tolist():
        best.offer(torch.full((problem.count,), factor))
    return best.factor


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


def refit(
    problem: Problem,
    factor: torch.Tensor,
    zero_point: torch.Tensor | None,
    codes: torch.Tensor,
    refits: int,
    sweeps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Improve the scale factors (count,) and the codes (g, o, k) in turn, while that helps; `refits` times at most."""
    scaled = problem.scaled(factor, zero_point)
    for _ in range(refits):
        refitted = factor * fit_scale(scaled, codes)
        trial = problem.scaled(refitted, zero_point)
        moved = descend(trial, codes, sweeps)
        if trial.error(moved) >= scaled.error(codes):
            break
        factor, scaled, codes = refitted, trial, moved
    return factor, codes


def descend(
    problem: Problem, codes: torch.Tensor, sweeps: int = 8, block: int = 64, *, slope: torch.Tensor | None = None
) -> torch.Tensor:
    """Cyclic coordinate descent from `codes`: each code in turn takes its best value, the others fixed.

    The error never rises. A sweep costs as much as one product with the metric; with `outputs` also a few vector
    operations for each code that moves.

    Args:
        problem: what to make small. codes: (g, o, k), where to start. sweeps: over all codes, at most.
        block: columns after which the slope of the others is brought up to date.
        slope: half the derivative at `codes`, (g, o, k), of an error whose curvature the problem's is; None: its own.
    """
    codes = codes.clone()
    slope = problem.slope(problem.values(codes) - problem.target) if slope is None else slope.clone()
    step = _rows_step if problem.outputs is None or codes.shape[1] == 1 else _coupled_step
    for _ in range(sweeps):
        before = codes.clone()
        for start in range(0, codes.shape[-1], block):
            part = slice(start, start + block)
            moved = _descend_block(problem, codes, slope[..., part].clone(), part, step)
            moved = moved @ problem.metric[:, part, :]
            slope += moved if problem.outputs is None else problem.outputs @ moved
        if torch.equal(before, codes):
            break
    return codes


def _descend_block(
    problem: Problem, codes: torch.Tensor, slope: torch.Tensor, part: slice, step: _Step
) -> torch.Tensor:
    """Let the codes of some columns move, and say by how much their values did."""
    metric = problem.metric[:, part, part]
    moved = torch.zeros_like(slope)
    for j in range(slope.shape[-1]):
        column = part.start + j
        old, scale = codes[..., column], problem.scale[..., column]
        new = step(problem, old, scale, slope[..., j], metric[:, j, j].clamp(min=1e-30)[:, None])
        delta = (new - old) * scale
        codes[..., column] = new
        moved[..., j] = delta
        if problem.outputs is not None:
            delta = (problem.outputs @ delta[..., None])[..., 0]
        slope += delta[..., None] * metric[:, None, j, :]
    return moved


_Step = Callable[[Problem, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _rows_step(
    problem: Problem, old: torch.Tensor, scale: torch.Tensor, slope: torch.Tensor, curvature: torch.Tensor
) -> torch.Tensor:
    """The best codes (g, o) of a column whose rows are independent."""
    if problem.outputs is not None:
        curvature = curvature * problem.outputs[:, :, 0]
    return problem.clamp(torch.round(old - slope / (curvature * scale)))


def _coupled_step(
    problem: Problem, old: torch.Tensor, scale: torch.Tensor, slope: torch.Tensor, curvature: torch.Tensor
) -> torch.Tensor:
    """Better codes (g, o) of a column whose rows are coupled: each in turn takes its best value."""
    assert problem.outputs is not None
    new, slope = old.clone(), slope.clone()
    for group, factor in enumerate(curvature[:, 0].tolist()):
        codes, steps, slopes, outputs = (t[group].numpy() for t in (new, scale, slope, problem.outputs))
        _settle(codes, steps, slopes, outputs, factor, problem.low, problem.high)
    return new


def _settle(codes: Array, scale: Array, slope: Array, outputs: Array, factor: float, low: int, high: int) -> None:
    """Let the codes (o,) of one column move, the largest gains first, until none helps; changes codes and slope."""
    own = np.maximum(outputs.diagonal() * factor, 1e-30)
    inverse = 1 / (own * scale)
    for _ in range(len(codes)):
        delta = (np.clip(np.rint(codes - slope * inverse), low, high) - codes) * scale
        gain = -delta * (2 * slope + own * delta)
        rows = np.flatnonzero(gain > 0)
        if not len(rows):
            return
        for row in rows[np.argsort(-gain[rows])].tolist():
            best = min(max(round(float(codes[row] - slope[row] * inverse[row])), low), high)
            if best != codes[row]:
                slope += outputs[row] * ((best - codes[row]) * scale[row] * factor)
                codes[row] = best


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
