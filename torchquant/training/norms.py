"""BatchNorm and dropout in training: modules that switch with `train()` and `eval()` and keep what export knows.

torchao rewrites aten ops to change the mode, and loses the dropout's p and BatchNorm's momentum and eps on the way.

A BatchNorm behind a convolution or linear whose weight has a scale for each output channel needs no folding while it is
trained: with f = |gamma| / sqrt(var + eps), codes and scale of a weight, round(w / s) and s, become round(w f / (s f))
and s f, which are the same codes. `fold` writes that down at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

__all__ = ["TrainedDropout", "TrainedNorm", "norms", "turn_signs"]


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

    def _gamma(self) -> Tensor | None:
        return self.weight.abs() if self.folded and self.weight is not None else self.weight

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (samples, channels, ...)."""
        moves = self.training and not self.frozen
        running = self.running_mean, self.running_var
        return nn.functional.batch_norm(x, *running, self._gamma(), self.bias, moves, self.momentum, self.eps)

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """f and b (channels,): in evaluation the output is f x + b."""
        gamma = self._gamma()
        mean, var = self.running_mean, self.running_var
        factor = torch.rsqrt(var + self.eps) * (1.0 if gamma is None else gamma)
        return factor, -mean * factor + (0.0 if self.bias is None else self.bias)

    def get_extra_state(self) -> dict[str, Any]:
        """Whether it is frozen."""
        return {"frozen": self.frozen}

    def set_extra_state(self, state: Any) -> None:
        """Freeze it, or not."""
        self.frozen = bool(state["frozen"])


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
