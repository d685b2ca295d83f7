"""LSQ: the step of each grid is a parameter.

Esser, McKinstry, Bablani, Appuswamy, Modha: "Learned Step Size Quantization", ICLR 2020, arXiv 1902.08153.

    v_hat = s clip(round(v / s), -Q_N, Q_P)
    dv_hat/ds = -v/s + round(v/s)  inside,   -Q_N or Q_P  where clipped          (eq. 3)
    g = 1 / sqrt(N Q_P)  scales the gradient of s                                (section 2.2)
    s starts at 2 mean|v| / sqrt(Q_P)                                            (section 2.1)

N are the weights that share a step, or the features of one sample. A step of activations starts where the calibrated
range has it, or at the least squared error (`learn_steps(..., batches=...)`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchquant.formats.groups import storable
from torchquant.fx.grids import Grid
from torchquant.observers.minmax import least_scale
from torchquant.training.fakes import Fake
from torchquant.training.rounding import Saved, as_computed, passed

__all__ = ["LSQ", "LearnedStep", "lsq", "mean_step", "step_gradient"]


def step_gradient(saved: Saved, dx: Tensor) -> Tensor:
    """Eq. 3 summed over each cell: what was not clipped gives (x_hat - x) / s, the rest x_hat / s."""
    cells = saved.cells
    return (cells.sums(saved.grad, saved.x_hat) - cells.sums(dx, saved.x)) / saved.scale


def lsq(saved: Saved, g: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Straight through for x, eq. 3 times g for s."""
    dx = passed(saved)
    return dx, step_gradient(saved, dx) * g if saved.learns[0] else None, None


def mean_step(v: Tensor, grid: Grid) -> Tensor:
    """2 mean|v| / sqrt(Q_P) of each cell of a weight, (cells,)."""
    cells = grid.cells(v.shape).expand(v.shape).reshape(-1)
    ones = torch.zeros(grid.scale.numel()).index_add(0, cells, torch.ones(cells.numel()))
    total = torch.zeros_like(ones).index_add(0, cells, v.detach().float().cpu().abs().reshape(-1))
    return (2 * total / ones / math.sqrt(max(grid.quant_max, 1))).to(v.device)


class LearnedStep(Fake):
    """A grid whose step is a parameter; the observer no longer moves it.

    Args:
        fake: the calibrated fake quantizer whose place it takes.
        scale: where the step starts (cells,).
    """

    least: Tensor

    def __init__(self, fake: Fake, scale: Tensor) -> None:
        super().__init__(fake.activation_post_process)
        self.is_weight, self.quant_min, self.quant_max = fake.is_weight, fake.quant_min, fake.quant_max
        self._block, self.rounds, self.observes, self.folding = fake._block, fake.rounds, False, fake.folding
        self.take_qparams(*fake.calculate_qparams())
        least = max(least_scale(fake.activation_post_process), 2.0**-100)
        self.register_buffer("least", torch.tensor(least, device=scale.device))
        del self._buffers["scale"]
        self.scale = nn.Parameter(torch.maximum(scale.detach().float(), self.least))

    def observe(self, x: Tensor) -> None:
        """Nothing: the step is learned."""

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """What must stay positive, by what it is called."""
        return {"step": self._parameters["scale"]}

    def gradient_scale(self, saved: Saved) -> float:
        """g: 1 / sqrt(N Q_P)."""
        share = saved.x.numel() // saved.scale.numel()
        n = share if self.is_weight else share // max(saved.x.shape[0], 1)
        return 1 / math.sqrt(max(n, 1) * max(int(self.quant_max), 1))

    def rule(self, saved: Saved) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The gradients of the paper."""
        return lsq(saved, self.gradient_scale(saved))

    def qparams(self) -> tuple[Tensor, Tensor]:
        """The step, not below what the target's integers take, and the zero point."""
        scale = torch.maximum(self.scale, self.least)
        stored_as = getattr(self.activation_post_process, "stored_as", None)
        if stored_as is not None:
            scale = as_computed(scale, storable(scale.detach(), stored_as))
        return scale, self.zero_point


@dataclass(frozen=True)
class LSQ:
    """Learned steps for weights, activations, or both.

    Args:
        start: of weights' steps: "mean" is the paper's, "grid" the scale that the graph has; a weight whose codes an
            algorithm chose keeps its scale.
    """

    start: str = "mean"

    def weight(self, fake: Fake, weight: Tensor) -> Fake:
        """Learn the steps of a weight."""
        grid = fake.grid_over(weight.shape)
        keeps = self.start == "grid" or isinstance(getattr(fake.activation_post_process, "grid", None), Grid)
        return LearnedStep(fake, fake.calculate_qparams()[0] if keeps else mean_step(weight, grid))

    def activation(self, fake: Fake) -> Fake:
        """Learn the step of an activation."""
        return LearnedStep(fake, fake.calculate_qparams()[0])
