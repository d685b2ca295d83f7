"""LSQ+: the offset of an activation's grid is learned beside its step, and weights start from their spread.

Bhalgat, Lee, Nagel, Blankevoort, Kwak: "LSQ+: Improving low-bit quantization through learnable offsets and better
initialization", CVPR Workshops 2020, arXiv 2004.09576.

    x_bar = round(clip((x - beta) / s, n, p)),  x_hat = s x_bar + beta           (eq. 5, 6)
    dx_hat/dbeta = 0  inside,  1  where clipped                                  (eq. 8)
    weights: s starts at max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(b-1)           (eq. 10)

beta is the least value of the grid. Targets' zero points are whole numbers, so z = n - beta / s is rounded, and its
gradient passes straight through.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchquant.formats.packed import bits_of
from torchquant.fx.grids import Grid
from torchquant.training.fakes import Fake
from torchquant.training.lsq import LearnedStep, lsq
from torchquant.training.rounding import Saved, as_computed

__all__ = ["LSQPlus", "LearnedOffset", "spread_step"]


def spread_step(v: Tensor, grid: Grid) -> Tensor:
    """Eq. 10 for each cell of a weight, (cells,)."""
    cells = grid.cells(v.shape).expand(v.shape).reshape(-1)
    values, zeros = v.detach().float().cpu().reshape(-1), torch.zeros(grid.scale.numel())
    count = zeros.index_add(0, cells, torch.ones_like(values))
    mean = zeros.index_add(0, cells, values) / count
    deviation = (zeros.index_add(0, cells, (values - mean[cells]).square()) / count).sqrt()
    widest = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs())
    return (widest / 2 ** (bits_of(grid.quant_min, grid.quant_max) - 1)).to(v.device)


class LearnedOffset(LearnedStep):
    """A grid whose step and offset are parameters."""

    def __init__(self, fake: Fake, scale: Tensor) -> None:
        super().__init__(fake, scale)
        points = self.zero_point.float()
        self.offset = nn.Parameter((int(self.quant_min) - points) * self.scale.detach())

    def qparams(self) -> tuple[Tensor, Tensor]:
        """The step, and the zero point as a whole number."""
        scale, _ = super().qparams()
        low, high = int(self.quant_min), int(self.quant_max)
        exact = (low - self.offset / scale.detach()).clamp(low, high)
        return scale, as_computed(exact, exact.detach().round())

    def rule(self, saved: Saved) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Eq. 8, as a gradient by z = n - beta / s; scaled as that of s."""
        g = self.gradient_scale(saved)
        dx, ds, _ = lsq(saved, g)
        dz = -saved.scale * (saved.grad.sum() - dx.sum()) * g if saved.learns[1] else None
        return dx, ds, dz


@dataclass(frozen=True)
class LSQPlus:
    """LSQ with learned offsets of activations whose grid has a zero point; others learn their step alone."""

    def weight(self, fake: Fake, weight: Tensor) -> Fake:
        """Learn the steps of a weight; one whose codes an algorithm chose keeps its scale to start from."""
        grid = fake.grid_over(weight.shape)
        solved = isinstance(getattr(fake.activation_post_process, "grid", None), Grid)
        return LearnedStep(fake, fake.calculate_qparams()[0] if solved else spread_step(weight, grid))

    def activation(self, fake: Fake) -> Fake:
        """Learn step and offset of an activation."""
        symmetric = getattr(fake, "qscheme", None) in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
        scale, _ = fake.calculate_qparams()
        plain = symmetric or scale.numel() > 1
        return LearnedStep(fake, scale) if plain else LearnedOffset(fake, scale)
