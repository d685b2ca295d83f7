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

__all__ = ["Problem", "descend", "enumerate_rounding", "fit_scale", "search_scale"]

Array = NDArray[np.float32]
_EXHAUSTIVE = 9  # inputs of a group up to which every rounding is tried


@dataclass(frozen=True)
class Problem:
    """Round `target` to a grid such that tr(outputs (V - target) metric (V - target)T) is small.

    Args:
        target: (g, o, k). metric: (g, k, k), symmetric, positive definite.
        scale, zero_point: of each weight, (g, o, k). cells: which of the grid's cells it is in, int64.
        count: cells of the grid. low, high: limits of the codes.
        outputs: (g, o, o), symmetric, positive definite, or None for the unit matrix.
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

    @staticmethod
    def of(weight: torch.Tensor, layout: Layout, grid: Grid, target: torch.Tensor, metric: torch.Tensor) -> Problem:
        """The problem of a site with a float weight in its own shape."""
        scale, zero_point = (layout.matrix(t.expand(weight.shape)) for t in grid.expand(weight.shape))
        cells = layout.matrix(grid.cells(weight.shape).expand(weight.shape))
        return Problem(
            target, metric, scale, zero_point.float(), cells, grid.scale.numel(), grid.quant_min, grid.quant_max
        )

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
        found = off @ self.metric
        return found if self.outputs is None else self.outputs @ found

    def by_rows(self) -> Problem:
        """The same with all outputs alike and each for itself."""
        return self if self.outputs is None else replace(self, outputs=None)

    def error(self, codes: torch.Tensor) -> float:
        """tr(outputs (V - target) metric (V - target)T)."""
        return float(self.contributions(codes).sum(dtype=torch.float64))

    def scaled(self, factor: torch.Tensor) -> Problem:
        """The same with the scale of each cell (count,) multiplied."""
        return replace(self, scale=self.scale * factor[self.cells])


def search_scale(problem: Problem, factors: torch.Tensor) -> torch.Tensor:
    """For each cell, the factor (of `factors`) on its scale with the least error of rounding to nearest.

    Returns (count,). The error of a cell counts products of its own weights only, which is exact per channel and
    per tensor.
    """
    same = problem.cells[:, :1, :, None] == problem.cells[:, :1, None, :]
    local = replace(problem, metric=problem.metric * same[:, 0], outputs=None)
    best = torch.full((problem.count,), torch.inf)
    chosen = torch.ones(problem.count)
    for factor in factors.tolist():
        trial = local.scaled(torch.full((problem.count,), factor))
        found = trial.contributions(trial.nearest())
        errors = torch.zeros(problem.count).index_add_(0, problem.cells.reshape(-1), found.reshape(-1))
        better = errors < best
        best, chosen = torch.where(better, errors, best), torch.where(better, factor, chosen)
    return chosen


def fit_scale(problem: Problem, codes: torch.Tensor) -> torch.Tensor:
    """Least-squares factor (count,) on the scale of each cell, the codes as they are.

    Where a weight's row has several cells they are fitted one by one, which never raises the error but for couplings.
    """
    values = problem.values(codes)
    same = problem.cells[:, :1, :, None] == problem.cells[:, :1, None, :]
    local = problem.metric * same[:, 0]
    rest = problem.target - values
    top = values * (rest @ problem.metric) + (values @ local) * values
    sums = torch.zeros(2, problem.count)
    sums[0].index_add_(0, problem.cells.reshape(-1), top.reshape(-1))
    sums[1].index_add_(0, problem.cells.reshape(-1), ((values @ local) * values).reshape(-1))
    factor = torch.where(sums[1] > 0, sums[0] / sums[1].clamp(min=1e-30), torch.ones(problem.count))
    return factor.clamp(0.5, 2.0)


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
