"""HQQ: scales and zero points that fit the float weight in an l_p norm of p < 1, which forgives outliers. No data.

Badri, Shaji: "Half-Quadratic Quantization of Large Machine Learning Models", Mobius Labs, 2023; the constants are those
of the authors' code.

    W (cells, k)   weights of a cell (a group, a channel)      s, z (cells,)   scale and zero point      Q   codes
    minimize |W - s (Q - z)|_p^p  by half-quadratic splitting, E standing for the error, beta growing by kappa:
    Q = clamp(round(W / s + z))
    E = sign(R) max(|R| - |R|^(p - 1) / beta, 0),  R = W - s (Q - z)
    z = mean(Q - (W - E) / s)

It differs from the paper in three things. There a zero point is a float, which is what the method gains by; the grids
of PT2E have integers. So the iteration runs with float zero points, each is rounded, and each cell keeps what has the
least error with an integer one, the observer's grid among them. The scale makes good for the rounding; the paper leaves
it as it is: s = sum((W - E)(Q - z)) / sum((Q - z)^2). And E is measured in units of the observer's scale: a beta of 10
makes every E below 0.17 zero, and in their own units the weights of most layers are smaller than that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import GraphModule

from torchquant.algorithms.layers.grid_search import by_cell
from torchquant.algorithms.layers.layerwise import Answer, Inside, float_weight, floored
from torchquant.algorithms.layers.layout import Layout
from torchquant.algorithms.layers.rounding import Problem
from torchquant.calibration.stream import Task
from torchquant.errors import InputError
from torchquant.fx.blocks import Span, layers, weight_grid
from torchquant.solving.contract import Clock
from torchquant.solving.solved import Solution

__all__ = ["HQQ", "iterates", "shrink"]

_LEAST = 1e-30


class HQQ:
    """Scales and zero points from the weights alone, codes by rounding to nearest, for any Quantizer's integer grids.

    The calibration data serve the guard only, which keeps an answer where the layer's output is no worse for it.
    Zero points of symmetric grids stay where they are.

    Args:
        p: of the norm, above 0 and at most 1. beta, kappa: weight of the splitting's penalty, and its growth with
            each iteration. iterations: how many.
        scales: fit scales too; if not, only zero points move (and nothing of a symmetric grid).

    Raises:
        InputError: an argument out of its range.
    """

    def __init__(
        self, *, p: float = 0.7, beta: float = 10.0, kappa: float = 1.01, iterations: int = 20, scales: bool = True
    ) -> None:
        if not 0 < p <= 1:
            raise InputError(f"p is {p}; it must be above 0 and at most 1")
        if beta <= 0 or kappa < 1:
            raise InputError(f"beta is {beta} and kappa {kappa}; beta must be above 0, kappa at least 1")
        if iterations < 1:
            raise InputError(f"iterations is {iterations}; it must be at least 1")
        self.p, self.beta, self.kappa, self.iterations, self.scales = p, beta, kappa, iterations, scales

    def spans(self, prepared: GraphModule, excluded: frozenset[str]) -> list[Span]:
        """The spans to solve: each site for itself."""
        return layers(prepared, excluded)

    def solve(self, task: Task | Inside, clock: Clock) -> Solution:
        """The answer for a span of one site."""
        (site,) = task.span.sites
        weight, grid = float_weight(task.prepared, site), weight_grid(task.prepared, site)
        layout = Layout.of(site, weight.shape)
        matrix = layout.matrix(weight.float())
        problem = Problem.of(weight, layout, grid, matrix, torch.empty(0))
        answer = self.choose(problem)
        return Solution(weights={site.name: (layout.tensor(answer.codes), floored(grid, answer))})

    def choose(self, problem: Problem) -> Answer:
        """For each cell the iterate of least `|W - s (Q - z)|_p^p` with an integer z; the grid as it is among them."""
        factor, zero_point = torch.ones(problem.count), by_cell(problem, problem.zero_point)
        least = _error(problem, self.p)
        for trial, zero in iterates(problem, self.p, self.beta, self.kappa, self.iterations, scales=self.scales):
            zero = zero.round().clamp(problem.low, problem.high)
            error = _error(problem.scaled(trial, zero), self.p)
            better = error < least
            least = torch.where(better, error, least)
            factor, zero_point = torch.where(better, trial, factor), torch.where(better, zero, zero_point)
        zeros = None if problem.symmetric else zero_point
        return Answer(problem.scaled(factor, zeros).nearest(), factor, zeros)


def shrink(x: torch.Tensor, beta: float, p: float) -> torch.Tensor:
    """sign(x) max(|x| - |x|^(p - 1) / beta, 0): the paper's generalized soft-thresholding for l_p, p <= 1."""
    size = x.abs().clamp(min=_LEAST)
    return x.sign() * (size - size.pow(p - 1) / beta).clamp(min=0)


def iterates(
    problem: Problem, p: float, beta: float, kappa: float, iterations: int, *, scales: bool = True
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Factors on the scales (count,) and float zero points (count,) after each iteration.

    With `scales`, each iteration is followed by one more pair: the rounded zero points and the scales that fit them.
    """
    target = problem.target / problem.scale  # in units of the observer's scale
    factor, zero = torch.ones(problem.count), by_cell(problem, problem.zero_point)
    for _ in range(iterations):
        step, zeros = factor[problem.cells], zero[problem.cells]
        codes = problem.clamp(torch.round(target / step + zeros))
        near = target - shrink(target - (codes - zeros) * step, beta, p)
        if not problem.symmetric:
            zero = _sums(problem, codes - near / step) / _sums(problem, torch.ones_like(codes))
        yield factor, zero
        if scales:
            whole = zero.round().clamp(problem.low, problem.high)
            yield _fitted(problem, near, codes, whole, factor), whole
            factor = _fitted(problem, near, codes, zero, factor)
        beta *= kappa


def _fitted(
    problem: Problem, near: torch.Tensor, codes: torch.Tensor, zero: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """The least-squares factor (count,) of codes (g, o, k); the old one where it would not be positive."""
    off = codes - zero[problem.cells]
    top, bottom = _sums(problem, near * off), _sums(problem, off.square())
    return torch.where((top > 0) & (bottom > 0), top / bottom.clamp(min=_LEAST), factor)


def _error(problem: Problem, p: float) -> torch.Tensor:
    """sum |W - s (Q - z)|^p of each cell (count,), codes to nearest."""
    return _sums(problem, (problem.target - problem.values(problem.nearest())).abs().pow(p))


def _sums(problem: Problem, values: torch.Tensor) -> torch.Tensor:
    """(count,): sums of (g, o, k) over each cell."""
    return torch.zeros(problem.count).index_add_(0, problem.cells.reshape(-1), values.reshape(-1))
