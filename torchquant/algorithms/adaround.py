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
from dataclasses import replace

import torch

from torchquant.algorithms.layers.layerwise import Answer, Layerwise
from torchquant.algorithms.layers.rounding import Problem, descend, enumerate_rounding, fit_scale, search_scale
from torchquant.solving.contract import Clock

__all__ = ["AdaRound", "relax"]

_LOW, _HIGH = -0.1, 1.1  # gamma and zeta of the rectified sigmoid


class AdaRound(Layerwise):
    """Learned rounding of each layer's weight, in the order of the graph, for any Quantizer's grids.

    Args:
        iterations: of the relaxation. lr: Adam's step size. lam: weight of the rounding term
            against the data term, which is 1 for a weight at round-to-nearest.
        beta: first and last exponent b. warm_up: share of the iterations without the rounding term.
        search: choose each scale by the layer's output error first.
        sweeps: of coordinate descent. refits: how often scale and codes are improved in turn.
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
        super().__init__(correct_bias=correct_bias, compensate=compensate, damp=damp, sensitive=sensitive)
        self.iterations, self.lr, self.lam, self.beta, self.warm_up = iterations, lr, lam, beta, warm_up
        self.search, self.sweeps, self.refits = search, sweeps, refits

    def choose(self, problem: Problem, clock: Clock) -> Answer:
        """Codes and scale factors for one site."""
        factor, codes = self._by_rows(problem.by_rows(), clock)
        if problem.outputs is not None:
            codes = descend(problem.scaled(factor), codes, self.sweeps)
        return Answer(codes, factor)

    def _by_rows(self, problem: Problem, clock: Clock) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale factors and codes, each row for itself."""
        factor = torch.ones(problem.count)
        if self.search:
            factor = search_scale(problem, torch.linspace(1.2, 0.3, 37))
        scaled = problem.scaled(factor)
        codes = enumerate_rounding(scaled)
        if codes is None:
            codes = relax(scaled, self.iterations, self.lr, self.lam, self.beta, self.warm_up, clock)
            codes = min(codes, scaled.nearest(), key=scaled.error)
        codes = descend(scaled, codes, self.sweeps)
        for _ in range(self.refits):
            refitted = factor * fit_scale(scaled, codes)
            trial = problem.scaled(refitted)
            moved = descend(trial, codes, self.sweeps)
            if trial.error(moved) >= scaled.error(codes):
                break
            factor, scaled, codes = refitted, trial, moved
        return factor, codes


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
    problem = replace(problem, metric=problem.metric * (problem.target.numel() / max(nearest, 1e-30)))
    low = torch.floor(problem.target / problem.scale)
    fraction = (problem.target / problem.scale - low).clamp(1e-4, 1 - 1e-4)
    low = low + problem.zero_point
    a = torch.nn.Parameter(torch.logit((fraction - _LOW) / (_HIGH - _LOW)))
    optimizer = torch.optim.Adam([a], lr=lr)
    for step in range(iterations):
        if clock.is_over:
            break
        sigmoid = torch.sigmoid(a.detach())
        stretched = sigmoid * (_HIGH - _LOW) + _LOW
        soft = stretched.clamp(0, 1)
        inside = (stretched > 0) & (stretched < 1)
        codes = low + soft
        inside &= (codes > problem.low) & (codes < problem.high)
        off = problem.values(problem.clamp(codes)) - problem.target
        gradient = 2 * (off @ problem.metric) * problem.scale
        progress = step / max(1, iterations)
        if progress >= warm_up:
            b = _anneal(progress, warm_up, beta)
            away = 2 * soft - 1
            gradient -= lam * 2 * b * away.abs().pow(b - 1) * away.sign()
        a.grad = gradient * inside * (_HIGH - _LOW) * sigmoid * (1 - sigmoid)
        optimizer.step()
    hard = torch.sigmoid(a.detach()) * (_HIGH - _LOW) + _LOW > 0.5
    return problem.clamp(low + hard)


def _anneal(progress: float, warm_up: float, beta: tuple[float, float]) -> float:
    share = (progress - warm_up) / (1 - warm_up)
    return beta[1] + 0.5 * (beta[0] - beta[1]) * (1 + math.cos(share * math.pi))
