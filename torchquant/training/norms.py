"""BatchNorm and dropout in training: modules that switch with `train()` and `eval()` and keep what export knows.

torchao rewrites aten ops to change the mode, and loses the dropout's p and BatchNorm's momentum and eps on the way.

A BatchNorm behind a convolution or linear whose weight has a scale for each output channel needs no folding while it is
trained: with f = |gamma| / sqrt(var + eps), codes and scale of a weight, round(w / s) and s, become round(w f / (s f))
and s f, which are the same codes. Once the statistics stand still, weight and bias are folded in the forward already in
convert's own order of operations, so that not a bit differs: one would flip codes, and a deep network multiplies flips.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from torchquant.fx.grids import Grid
from torchquant.training.rounding import as_computed

__all__ = ["FoldedBias", "Folding", "TrainedDropout", "TrainedNorm", "norms", "scale_channels", "turn_signs"]


class TrainedNorm(nn.Module):
    """BatchNorm: by the batch's statistics in training, by the running ones in evaluation and once `frozen`.

    Args:
        weight, bias: gamma and beta (channels,), or None. mean, var: running statistics (channels,).
        momentum, eps: as `torch.nn.BatchNorm2d` has them.
        folded: the factor of each channel goes into a weight at convert, so that it may have no sign.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
        mean: Tensor,
        var: Tensor,
        *,
        momentum: float,
        eps: float,
        folded: bool,
    ) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.register_buffer("running_mean", mean)
        self.register_buffer("running_var", var)
        self.momentum, self.eps, self.folded, self.frozen = momentum, eps, folded, False

    @property
    def moves(self) -> bool:
        """Whether it normalizes by the batch, and its statistics follow."""
        return self.training and not self.frozen

    def _gamma(self) -> Tensor | None:
        if not self.folded or self.weight is None:
            return self.weight
        return torch.where(self.weight < 0, -self.weight, self.weight)  # abs has no gradient at 0, and would stay there

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (samples, channels, ...); nothing is left to do where that is in the weight in front."""
        if self.folded and not self.moves:
            return x
        running = self.running_mean, self.running_var
        return nn.functional.batch_norm(x, *running, self._gamma(), self.bias, self.moves, self.momentum, self.eps)

    def factors(self) -> tuple[Tensor, Tensor]:
        """f and b (channels,): by running statistics the output is f x + b."""
        gamma = self._gamma()
        factor = torch.rsqrt(self.running_var + self.eps) * (1.0 if gamma is None else gamma)
        return factor, -self.running_mean * factor + (0.0 if self.bias is None else self.bias)

    def get_extra_state(self) -> dict[str, Any]:
        """Whether it is frozen."""
        return {"frozen": self.frozen}

    def set_extra_state(self, state: Any) -> None:
        """Freeze it, or not."""
        self.frozen = bool(state["frozen"])


class FoldedBias(nn.Module):
    """The bias of an op in front of a folded norm: as it is while the norm moves, with the norm's in it afterwards.

    Args:
        norm: kept in a list, since its parameters are not this module's.
    """

    def __init__(self, norm: TrainedNorm) -> None:
        super().__init__()
        self._norm = [norm]

    def forward(self, bias: Tensor | None) -> Tensor | None:
        """The bias (channels,), or None."""
        norm = self._norm[0]
        if norm.moves:
            return bias
        factor, offset = norm.factors()
        return offset if bias is None else bias * factor + offset


@dataclass(frozen=True)
class Folding:
    """How the factors of a norm go into a quantized weight.

    Args:
        norm: of the op that reads the weight. axis: of the weight that are its output channels.
    """

    norm: TrainedNorm
    axis: int

    def weight(self, x_hat: Tensor, grid: Grid | None) -> Tensor:
        """A rounded weight as the op reads it; `grid` is what it was rounded to, None if it was not."""
        if self.norm.moves:
            return x_hat
        factor, _ = self.norm.factors()
        folded = x_hat * factor.reshape([-1 if i == self.axis else 1 for i in range(x_hat.ndim)])
        if grid is None:
            return folded
        with torch.no_grad():
            codes, scaled = scale_channels(grid.encode(x_hat.float()), grid, factor, self.axis)
            values = scaled.decode(codes).to(x_hat.dtype)
        return as_computed(folded, values)


def scale_channels(codes: Tensor, grid: Grid, factor: Tensor, axis: int) -> tuple[Tensor, Grid]:
    """The same codes with a factor (channels,) in their scales; those of channels that vanish become zeros."""
    counts = [n // b for n, b in zip(codes.shape, grid.block, strict=True)]
    spread = factor.reshape([-1 if i == axis else 1 for i in range(len(counts))]).expand(counts).reshape(-1)
    scale = grid.scale * spread
    least = scale.max() * 2.0**-16
    scaled = grid.with_scale(torch.where(scale > 0, scale, torch.where(least > 0, least, 1.0)))
    vanished = (scale <= 0)[grid.cells(codes.shape)]
    return torch.where(vanished, scaled.expand(codes.shape)[1].to(codes.dtype), codes), scaled


class TrainedDropout(nn.Module):
    """A dropout of aten's, with the p that the model has."""

    is_transparent = True  # in evaluation

    def __init__(self, function: Any, p: float) -> None:
        super().__init__()
        self.function, self.p = function, p

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements in training."""
        values: Tensor = self.function(x, self.p, True) if self.training else x
        return values


def norms(model: GraphModule) -> list[tuple[Node, TrainedNorm]]:
    """Each BatchNorm in training and its node."""
    called = [(n, model.get_submodule(str(n.target))) for n in model.graph.nodes if n.op == "call_module"]
    return [(n, module) for n, module in called if isinstance(module, TrainedNorm)]


def turn_signs(weight: Tensor, bias: Tensor | None, norm: TrainedNorm, axis: int) -> None:
    """Make gamma positive, and the channels of a weight the other way round: the function stays the same."""
    if norm.weight is None:
        return
    with torch.no_grad():
        sign = torch.where(norm.weight < 0, -1.0, 1.0).to(norm.weight.dtype)
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
        weight.mul_(sign.to(weight.dtype).reshape(shape))
        if bias is not None:
            bias.mul_(sign.to(bias.dtype))
        norm.weight.mul_(sign)
        norm.running_mean.mul_(sign)
