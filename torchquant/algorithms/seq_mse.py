"""SeqMSE: for each weight scale the candidate with the least error of the layer's output, layer after layer.

"Sequential MSE" as in AIMET and Qualcomm's ExecuTorch passes: candidates are shares of the min-max range, each judged
by `|W x - Q(W) x|^2` on inputs from the quantized prefix. That error is a quadratic form in E[x xT] (see `gram`), so
the candidates cost no pass over the data.
"""

from __future__ import annotations

import torch

from torchquant.algorithms.layers.grid_search import search_grid
from torchquant.algorithms.layers.layerwise import Answer, Layerwise
from torchquant.algorithms.layers.rounding import Problem
from torchquant.solving.contract import Clock

__all__ = ["SeqMSE"]


class SeqMSE(Layerwise):
    """Searched weight scales, codes by rounding to nearest.

    Args:
        candidates: shares of the observer's scale to try, from `largest` to `smallest`.
        correct_bias: choose the bias too.
    """

    def __init__(
        self, candidates: int = 46, *, largest: float = 1.2, smallest: float = 0.3, correct_bias: bool = False
    ) -> None:
        super().__init__(correct_bias=correct_bias, compensate=False, damp=1e-6)
        self.candidates, self.largest, self.smallest = candidates, largest, smallest

    def choose(self, problem: Problem, clock: Clock) -> Answer:
        """The best scale of each cell (and zero point, of an affine grid), and the nearest codes."""
        factors = torch.cat([torch.ones(1), torch.linspace(self.largest, self.smallest, self.candidates)])
        factor, zero_point = search_grid(problem, factors)
        return Answer(problem.scaled(factor, zero_point).nearest(), factor, zero_point)
