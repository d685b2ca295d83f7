"""What a product takes beside its activations, as values that operators, references and launches share.

Shapes: x (M, K), weight (N, K), y (M, N); rows of x are pixels where the product is a convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812

__all__ = ["ACTIVATIONS", "ConvolutionParams", "Epilogue", "Grid", "PackedWeight", "Scales"]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True, eq=False)
class Epilogue:
    """What a kernel does with a product before it stores it: activation(y + bias + residual), in float32.

    Args:
        bias: (N,) floats, or None.
        residual: floats of y's shape, or None.
        activation: a name of `ACTIVATIONS`.
    """

    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    activation: str = "none"

    def by_rows(self, n: int) -> Epilogue:
        """The same with the residual as a contiguous matrix (M, n)."""
        return self if self.residual is None else replace(self, residual=self.residual.reshape(-1, n).contiguous())

    def apply(self, y: torch.Tensor) -> torch.Tensor:
        """The same in plain PyTorch, in y's dtype."""
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        if self.residual is not None:
            y = y + self.residual.to(y.dtype)
        return ACTIVATIONS[self.activation](y)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight (N, K) = (codes - zero point) scale, for a product with float activations.

    Args:
        packed: int16 from `packing.pack_weight`: (ceil(K / 128), N, 32) for 4 bits, (ceil(K / 128), 2, N, 32) for 8.
        params: scales and zero points from `packing.pack_params`, (ceil(K / group_size), N, 2) floats.
        bits: 4 or 8.
        group_size: neighbours on K that share a scale.
        asymmetric: whether there are zero points other than 0.
    """

    packed: torch.Tensor
    params: torch.Tensor
    bits: int
    group_size: int
    asymmetric: bool

    @property
    def outputs(self) -> int:
        """N."""
        return self.packed.shape[-2]


@dataclass(frozen=True, eq=False)
class Scales:
    """Scales and zero points of a product of codes: x_scale weight_scale (x - x_zero_point) weight^T.

    Args:
        weight_scale: (N,) or (1,) float32.
        x_scale: (M,) or (1,) float32; None: from the largest magnitude of each row of x.
        x_zero_point: (M,) or (1,) int32; None: 0.
        weight_sum: int32, sums of the weight's codes: (N,) over K, or for a convolution (N, KH * KW) over its channels;
            needed with x_zero_point.
    """

    weight_scale: torch.Tensor
    x_scale: torch.Tensor | None = None
    x_zero_point: torch.Tensor | None = None
    weight_sum: torch.Tensor | None = None

    def by_rows(self) -> Scales:
        """The same with one axis for all rows of x."""
        x_scale, x_zero_point = (None if v is None else v.reshape(-1) for v in (self.x_scale, self.x_zero_point))
        return replace(self, x_scale=x_scale, x_zero_point=x_zero_point)

    def for_kernel(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """In the order in which kernels take them."""
        return self.x_scale, self.x_zero_point, self.weight_scale, self.weight_sum

    @property
    def strides(self) -> tuple[int, int, int]:
        """Of x_scale, x_zero_point and weight_scale: 1 where each row or output has a value, 0 where all share one."""
        x_scale, x_zero_point, weight_scale = (
            int(v is not None and v.numel() > 1) for v in (self.x_scale, self.x_zero_point, self.weight_scale)
        )
        return x_scale, x_zero_point, weight_scale


@dataclass(frozen=True)
class Grid:
    """The codes that activations are rounded to, from quant_min to quant_max; eps is the smallest scale of a row."""

    quant_min: float
    quant_max: float
    eps: float


@dataclass(frozen=True)
class ConvolutionParams:
    """Stride, padding and dilation of a convolution, each along height and width."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
