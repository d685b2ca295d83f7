"""AdaRound: learn whether each weight is rounded up or down.

Nagel, Amjad, van Baalen, Louizos, Blankevoort: "Up or Down? Adaptive Rounding for Post-Training Quantization",
ICML 2020, sections 3 and 4.

    V = s (clamp(floor(T / s) + h(a) + z, n, p) - z)    the soft-quantized weight
    h(a) = clamp(1.2 sigmoid(a) - 0.1, 0, 1)            rectified sigmoid, eq. 23
    tr((V - T) A (V - T)T) + lam sum(1 - |2 h - 1|^b)   the objective, eq. 21 and 25, b annealed from 20 to 2

The objective of a layer depends on the data through A = E[x xT] alone, so an iteration costs a product with A
and not a pass over the data. Rows of up to nine weights (depthwise convolutions) are solved by trying all roundings.
What the relaxation finds is then improved by coordinate descent, in which a code may move by more than one.
"""

from __future__ import annotations

import math

import torch

from torchquant.algorithms.layers.layerwise import RowRounding
from torchquant.algorithms.layers.rounding import Problem, enumerate_rounding
from torchquant.solving.contract import Clock

__all__ = ["AdaRound", "relax"]

_LOW, _HIGH = -0.1, 1.1  # gamma and zeta of the rectified sigmoid
_CHUNK = 1 << 18  # weights whose gradient is computed at a time


class AdaRound(RowRounding):
    """Learned rounding of each layer's weight, in the order of the graph, for any Quantizer's grids.

    Args:
        iterations: of the relaxation.
        lr: Adam's step size.
        lam: weight of the rounding term against the data term, which is 1 for a weight at round-to-nearest.
        beta: first and last exponent b.
        warm_up: share of the iterations without the rounding term.
        search: choose each scale by the layer's output error first.
        sweeps: of coordinate descent.
        refits: how often scale and codes are improved in turn.
        correct_bias, compensate, damp, sensitive: see `Layerwise`; `sensitive` costs one pass backward per batch.
    """

    def __init__(
        self,
        iterations: int = 500,
        *,
        lr: float = 0.01,
        lam: float = 10.0,
        beta: tuple[float, float] = (20.0, 2.0),
        warm_up: float = 0.2,
        search: bool = True,
        sweeps: int = 8,
        refits: int = 2,
        correct_bias: bool = True,
        compensate: bool = True,
        damp: float | None = None,
        sensitive: bool = False,
    ) -> None:
        super().__init__(
            search=search,
            sweeps=sweeps,
            refits=refits,
            correct_bias=correct_bias,
            compensate=compensate,
            damp=damp,
            sensitive=sensitive,
        )
        self.iterations, self.lr, self.lam, self.beta, self.warm_up = iterations, lr, lam, beta, warm_up

    def round_rows(self, problem: Problem, clock: Clock) -> torch.Tensor:
        """The best of all roundings of short rows; of the others what the relaxation finds, or the nearest."""
        codes = enumerate_rounding(problem)
        if codes is not None:
            return codes
        codes = relax(problem, self.iterations, self.lr, self.lam, self.beta, self.warm_up, clock)
        return min(codes, problem.nearest(), key=problem.error)


def relax(
    problem: Problem,
    iterations: int,
    lr: float,
    lam: float,
    beta: tuple[float, float],
    warm_up: float,
    clock: Clock,
) -> torch.Tensor:
    """Codes (g, o, k) rounded up or down from the target by gradient descent on the relaxed objective.

    The data term is in units of what rounding to nearest costs for a weight, so that `lam` fits any network and bit
    width.
    """
    nearest = problem.error(problem.nearest())
    unit = problem.target.numel() / max(nearest, 1e-30)
    low = torch.floor(problem.target / problem.scale)
    a = torch.nn.Parameter(_inverse(problem.target / problem.scale - low))
    low += problem.zero_point
    a.grad = torch.zeros_like(a)
    optimizer = torch.optim.Adam([a], lr=lr, foreach=False)
    rows = max(1, _CHUNK // max(1, a.shape[0] * a.shape[2]))
    for step in range(iterations):
        if clock.is_over:
            break
        progress = step / max(1, iterations)
        b = _anneal(progress, warm_up, beta) if progress >= warm_up else None
        for start in range(0, a.shape[1], rows):
            part = slice(start, start + rows)
            a.grad[:, part] = _gradient(problem, part, low[:, part], a.detach()[:, part], unit, lam, b)
        optimizer.step()
    hard = torch.sigmoid(a.detach()) * (_HIGH - _LOW) + _LOW > 0.5
    return problem.clamp(low + hard)


def _gradient(
    problem: Problem, rows: slice, low: torch.Tensor, a: torch.Tensor, unit: float, lam: float, b: float | None
) -> torch.Tensor:
    """Of the relaxed objective by `a` (g, rows, k), for some rows; None leaves the rounding term out."""
    sigmoid = torch.sigmoid(a)
    stretched = sigmoid * (_HIGH - _LOW) + _LOW
    soft = stretched.clamp(0, 1)
    codes = low + soft
    inside = (stretched > 0) & (stretched < 1) & (codes > problem.low) & (codes < problem.high)
    scale = problem.scale[:, rows]
    off = (problem.clamp(codes) - problem.zero_point[:, rows]) * scale - problem.target[:, rows]
    gradient = (off @ problem.metric).mul_(2 * unit).mul_(scale)
    if b is not None:
        away = soft.mul_(2).sub_(1)
        gradient -= away.abs().pow_(b - 1).mul_(2 * lam * b).mul_(away.sign())
    return gradient.mul_(inside).mul_((_HIGH - _LOW) * sigmoid).mul_(1 - sigmoid)


def _inverse(fraction: torch.Tensor) -> torch.Tensor:
    """The a with h(a) = fraction."""
    return torch.logit((fraction.clamp(1e-4, 1 - 1e-4) - _LOW) / (_HIGH - _LOW))


def _anneal(progress: float, warm_up: float, beta: tuple[float, float]) -> float:
    share = (progress - warm_up) / (1 - warm_up)
    return beta[1] + 0.5 * (beta[0] - beta[1]) * (1 + math.cos(share * math.pi))
