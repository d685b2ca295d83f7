"""EWGS: the gradient of an element grows or shrinks with its distance from the code that it is rounded to.

Lee, Kim, Ham: "Network Quantization with Element-wise Gradient Scaling", CVPR 2021, arXiv 2104.00903.

    g_xn = g_xq (1 + delta sign(g_xq) (x_n - x_q))                               (eq. 5)

x_n and x_q in units of the grid's whole range, as the paper has them. The paper finds delta from the Hessian's trace;
here it is a constant. Steps are learned as in LSQ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchquant.errors import InputError
from torchquant.training.fakes import Fake
from torchquant.training.lsq import LSQ, LearnedStep, step_gradient
from torchquant.training.rounding import Cells, Saved, passed

__all__ = ["EWGS", "ewgs"]


def ewgs(saved: Saved, delta: float, codes: int, g: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Eq. 5 for x, inside the grid; LSQ's gradient for s.

    Args:
        codes: the largest code less the least.
    """
    straight = passed(saved)
    extent = _spread(saved.scale, saved) * codes
    dx = straight * (1 + delta * saved.grad.sign() * (saved.x - saved.x_hat) / extent)
    return dx, step_gradient(saved, straight) * g if saved.learns[0] else None, None


def _spread(scale: Tensor, saved: Saved) -> Tensor:
    """A value for each cell at each of its elements."""
    block = saved.cells.block
    if block is None:
        return saved.cells.spread(scale, saved.x.ndim)
    size = saved.x.numel() // scale.numel()
    return Cells(block=block).tensor(scale[:, None].expand(-1, size), saved.x.shape)


class _Scaled(LearnedStep):
    def __init__(self, fake: Fake, scale: Tensor, delta: float) -> None:
        super().__init__(fake, scale)
        self.delta = delta

    def rule(self, saved: Saved) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return ewgs(saved, self.delta, int(self.quant_max) - int(self.quant_min), self.gradient_scale(saved))

    def describe(self) -> dict[str, str]:
        return {**super().describe(), "method": "EWGS"}


@dataclass(frozen=True)
class EWGS:
    """Learned steps, and gradients scaled element by element.

    Args:
        delta: how much; 0 is LSQ.
    """

    delta: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.delta < float("inf"):
            raise InputError(f"delta {self.delta} must be 0 or more")

    def weight(self, fake: Fake, weight: Tensor) -> Fake:
        """Learn the steps of a weight."""
        with torch.no_grad():
            return _Scaled(fake, LSQ().weight(fake, weight).scale, self.delta)

    def activation(self, fake: Fake) -> Fake:
        """Learn the step of an activation."""
        return _Scaled(fake, fake.calculate_qparams()[0], self.delta)
