"""Layer objectives that depend on the data only through second moments of a site's input.

    W (g, o, k)     weight of a conv or linear as matrices: g groups, o outputs and k inputs each
    x, xq (g, k)    an input column of the float function, and of the quantized prefix
    A = E[xq xqT]   (g, k, k), or the covariance where a bias takes up the mean error
    B = E[x xqT]    (g, k, k), likewise

    E |Wq xq - W x|^2 = tr((Wq - T) A (Wq - T)T) + const,   T = W B A^-1

The data are read once, whatever the number of iterations, and the cost of one iteration is that of a product with A.
T is what the layer should be, given what the quantized prefix makes of the data; with x = xq it is W itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch.fx import Node

from torchquant.algorithms.layout import Layout
from torchquant.fx.grids import Grid
from torchquant.fx.stream import Flow
from torchquant.parallel import total_

__all__ = [
    "Moments",
    "Problem",
    "choose_damp",
    "compensated",
    "damped",
    "descend",
    "enumerate_rounding",
    "fit_scale",
    "moments",
    "search_scale",
]

_CHUNK = 1 << 25  # elements of unfolded input at once
_EXHAUSTIVE = 9  # inputs of a group up to which every rounding is tried


# moments ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Second moments of a site's input.

    Args:
        a: E[xq xqT] (g, k, k). b: E[x xqT] (g, k, k). mean_q, mean: E[xq], E[x] (g, k). float32.
        count: columns they were taken over.
    """

    a: torch.Tensor
    b: torch.Tensor
    mean_q: torch.Tensor
    mean: torch.Tensor
    count: int

    @staticmethod
    def joined(folds: Sequence[Moments]) -> Moments:
        """Moments over the data of all folds."""
        count = max(1, sum(f.count for f in folds))
        a, b, mean_q, mean = (
            sum((getattr(f, name) * (f.count / count) for f in folds), torch.zeros(()))
            for name in ("a", "b", "mean_q", "mean")
        )
        return Moments(a, b, mean_q, mean, count)

    def centred(self) -> Moments:
        """The same with covariances in the place of second moments: what is left to a layer with a free bias."""
        a = self.a - self.mean_q[:, :, None] * self.mean_q[:, None, :]
        b = self.b - self.mean[:, :, None] * self.mean_q[:, None, :]
        return replace(self, a=a, b=b)


def moments(task: Data, site: Node, layout: Layout) -> tuple[Moments, Moments]:
    """Read the data of a one-site task once (over all processes): moments of every other sample, and of the rest."""
    source = site.args[0]
    assert isinstance(source, Node)
    size = layout.matrix(torch.empty(layout.shape, device="meta")).shape
    sums = [_Sums(size[0], size[2]) for _ in range(2)]
    for batch in range(task.count):
        quantized, exact = (task.inputs(batch, flow)[source] for flow in ("quantized", "float"))
        for fold in range(2):
            sums[(fold + batch) % 2].add(quantized[fold::2], exact[fold::2], layout)
    return sums[0].moments(), sums[1].moments()


class Data(Protocol):
    """Where a site's inputs come from."""

    count: int

    def inputs(self, batch: int, flow: Flow) -> dict[Node, Any]:
        """The values that the site reads, for one batch."""


class _Sums:
    """Moments on the way."""

    def __init__(self, groups: int, inputs: int) -> None:
        self._products = torch.zeros(2, groups, inputs, inputs, dtype=torch.float64)
        self._sums = torch.zeros(2, groups, inputs, dtype=torch.float64)
        self._count = torch.zeros((), dtype=torch.float64)

    def add(self, quantized: torch.Tensor, exact: torch.Tensor, layout: Layout) -> None:
        for q, x in zip(_chunks(quantized, layout), _chunks(exact, layout), strict=True):
            columns = layout.columns(q), layout.columns(x)
            for i, side in enumerate(columns):
                self._products[i] += side @ columns[0].transpose(1, 2)
                self._sums[i] += side.sum(-1, dtype=torch.float64)
            self._count += columns[0].shape[-1]

    def moments(self) -> Moments:
        for tensor in (self._products, self._sums, self._count):
            total_(tensor)
        count = self._count.clamp(min=1)
        products, sums = (self._products / count).float(), (self._sums / count).float()
        return Moments(products[0], products[1], sums[0], sums[1], int(self._count))


def _chunks(x: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, ...]:
    if not layout.stride or not len(x):
        return (x.float(),)
    unfolded = x[0].numel() * layout.shape[2:].numel()
    return x.float().split(max(1, _CHUNK // max(1, unfolded)))


# the problem ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Round `target` to a grid such that tr((V - target) metric (V - target)T) is small.

    Args:
        target: (g, o, k). metric: (g, k, k), symmetric, positive definite.
        scale, zero_point: of each weight, (g, o, k). cells: which of the grid's cells it is in, int64.
        count: cells of the grid. low, high: limits of the codes.
    """

    target: torch.Tensor
    metric: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    cells: torch.Tensor
    count: int
    low: int
    high: int

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
        return (off @ self.metric) * off

    def error(self, codes: torch.Tensor) -> float:
        """tr((V - target) metric (V - target)T)."""
        return float(self.contributions(codes).sum(dtype=torch.float64))

    def scaled(self, factor: torch.Tensor) -> Problem:
        """The same with the scale of each cell (count,) multiplied."""
        return replace(self, scale=self.scale * factor[self.cells])


def damped(a: torch.Tensor, damp: float) -> torch.Tensor:
    """A matrix to add to `a` (g, k, k): `damp` times its mean diagonal, on the diagonal."""
    ridge = damp * a.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=1e-12)
    return torch.eye(a.shape[-1]).expand_as(a) * ridge[:, None, None]


def compensated(matrix: torch.Tensor, found: Moments, damp: float) -> torch.Tensor:
    """T = W (B + D) (A + D)^-1, D = damped(A): the matrix (g, o, k) that best gives W x from xq."""
    ridge = damped(found.a, damp)
    factor, failed = torch.linalg.cholesky_ex((found.a + ridge).double())
    if bool(failed.any()):
        return matrix
    moved = (matrix @ (found.b + ridge)).double()
    return torch.cholesky_solve(moved.transpose(1, 2), factor).transpose(1, 2).float()


def choose_damp(matrix: torch.Tensor, folds: Sequence[Moments], candidates: Sequence[float]) -> float:
    """The damping whose T, found on one half of the data, does best on the other half."""
    if min(f.count for f in folds) == 0:
        return max(candidates)
    errors = [0.0] * len(candidates)
    for fit, judge in (folds, reversed(folds)):
        for i, damp in enumerate(candidates):
            target = compensated(matrix, fit, damp)
            off = ((target @ judge.a) * target).sum(dtype=torch.float64)
            off -= 2 * ((matrix @ judge.b) * target).sum(dtype=torch.float64)
            errors[i] += float(off)
    return candidates[errors.index(min(errors))]


def search_scale(problem: Problem, factors: torch.Tensor) -> torch.Tensor:
    """For each cell, the factor (of `factors`) on its scale with the least error of rounding to nearest.

    Returns (count,). The error of a cell counts products of its own weights only, which is exact per channel and
    per tensor.
    """
    same = problem.cells[:, :1, :, None] == problem.cells[:, :1, None, :]
    local = replace(problem, metric=problem.metric * same[:, 0])
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


def descend(problem: Problem, codes: torch.Tensor, sweeps: int = 8, block: int = 64) -> torch.Tensor:
    """Cyclic coordinate descent from `codes`: each code in turn takes its best value, the others fixed.

    The error never rises. A sweep costs as much as one product with the metric.
    """
    codes = codes.clone()
    diagonal = problem.metric.diagonal(dim1=1, dim2=2).clamp(min=1e-30)
    for _ in range(sweeps):
        slope = (problem.values(codes) - problem.target) @ problem.metric
        before = codes.clone()
        for start in range(0, codes.shape[-1], block):
            part = slice(start, start + block)
            moved = _descend_block(problem, codes, slope[..., part].clone(), diagonal, part)
            slope += moved @ problem.metric[:, part, :]
        if torch.equal(before, codes):
            break
    return codes


def _descend_block(
    problem: Problem, codes: torch.Tensor, slope: torch.Tensor, diagonal: torch.Tensor, part: slice
) -> torch.Tensor:
    metric = problem.metric[:, part, part]
    scale = problem.scale[..., part]
    moved = torch.zeros_like(slope)
    for j in range(slope.shape[-1]):
        old = codes[..., part.start + j]
        step = slope[..., j] / (diagonal[:, None, part.start + j] * scale[..., j])
        new = problem.clamp(torch.round(old - step))
        delta = (new - old) * scale[..., j]
        codes[..., part.start + j] = new
        moved[..., j] = delta
        slope += delta[..., None] * metric[:, None, j, :]
    return moved


def enumerate_rounding(problem: Problem) -> torch.Tensor | None:
    """The best of all 2^k roundings up or down of each row, for k up to 9 (depthwise convolutions); else None."""
    k = problem.target.shape[-1]
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
