"""PACT: where an activation is clipped is a parameter.

Choi, Wang, Venkataramani, Chuang, Srinivasan, Gopalakrishnan: "PACT: Parameterized Clipping Activation for Quantized
Neural Networks", 2018, arXiv 1805.06085.

    y = 0 for x < 0,  x,  alpha for x >= alpha                                   (eq. 1)
    y_q = round(y (2^k - 1) / alpha) alpha / (2^k - 1)                           (eq. 2)
    dy_q/dalpha = 0 for x < alpha,  1 for x >= alpha                             (eq. 3)

alpha starts where the calibrated range ends; the paper regularizes it by L2, as weights are: give it weight decay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchquant.errors import SchemeError
from torchquant.training.fakes import Fake
from torchquant.training.lsq import LSQ, LearnedStep
from torchquant.training.rounding import Saved, passed

__all__ = ["PACT", "LearnedClip", "pact"]


def pact(saved: Saved) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Straight through for x; eq. 3 by s = alpha / (2^k - 1): what was clipped gives its code, which is 0 below."""
    dx = passed(saved)
    if not saved.learns[0]:
        return dx, None, None
    cells = saved.cells
    return dx, (cells.sums(saved.grad, saved.x_hat) - cells.sums(dx, saved.x_hat)) / saved.scale, None


class LearnedClip(LearnedStep):
    """A grid from 0 to a parameter alpha."""

    def __init__(self, fake: Fake, scale: Tensor) -> None:
        super().__init__(fake, scale)
        self.steps = int(self.quant_max) - int(self.zero_point)
        start = self.scale.detach() * self.steps
        del self._parameters["scale"]
        self.alpha = nn.Parameter(start)
        self.register_buffer("scale", start / self.steps)

    def qparams(self) -> tuple[Tensor, Tensor]:
        """alpha over the number of steps, and the zero point."""
        return torch.maximum(self.alpha / self.steps, self.least), self.zero_point

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """What must stay positive."""
        return {"clip": self.alpha}

    def rule(self, saved: Saved) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The gradients of the paper."""
        return pact(saved)


@dataclass(frozen=True)
class PACT:
    """Learned clips for activations that are never negative (behind a ReLU); others learn their step (LSQ)."""

    def weight(self, fake: Fake, weight: Tensor) -> Fake:
        """Raise SchemeError: the method is for activations."""
        raise SchemeError("PACT clips activations; take another method for weights, e.g. weights=LSQ() or DoReFa()")

    def activation(self, fake: Fake) -> Fake:
        """Learn the clip of an activation."""
        scale, zero_point = fake.calculate_qparams()
        one = scale.numel() == 1 and int(zero_point) == int(fake.quant_min)
        return LearnedClip(fake, scale) if one else LSQ().activation(fake)
