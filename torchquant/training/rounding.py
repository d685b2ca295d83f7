"""Rounding to an affine grid with gradients: the values are those of convert's ops, the gradients are a paper's.

    q = clamp(round(x / s) + z, low, high)        x_hat = s (q - z)

A cell is the part of a tensor that shares a scale: all of it, a channel, or a block. `inside` says of each element
whether its code was not clipped. What a rule returns for s and z is summed over each cell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Cells", "Rule", "Saved", "as_computed", "passed", "rounded", "straight_everywhere", "straight_through"]


@dataclass(frozen=True)
class Cells:
    """How a tensor is cut: `axis` has a scale for each index, or each `block` (sizes along the axes) has one.

    With neither the whole tensor is one cell.
    """

    axis: int | None = None
    block: tuple[int, ...] | None = None

    def rows(self, x: Tensor) -> Tensor:
        """The elements (cells, size of a cell), in the order of the scales."""
        if self.block is not None:
            counts = [n // b for n, b in zip(x.shape, self.block, strict=True)]
            apart = x.reshape([size for pair in zip(counts, self.block, strict=True) for size in pair])
            axes = [*range(0, apart.ndim, 2), *range(1, apart.ndim, 2)]
            return apart.permute(axes).reshape(torch.Size(counts).numel(), -1)
        return x.reshape(1, -1) if self.axis is None else x.transpose(0, self.axis).flatten(1)

    def tensor(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `rows` for blocks."""
        assert self.block is not None
        counts = [n // b for n, b in zip(shape, self.block, strict=True)]
        apart = rows.reshape(*counts, *self.block)
        axes = [axis for i in range(len(counts)) for axis in (i, len(counts) + i)]
        return apart.permute(axes).reshape(tuple(shape))

    def sums(self, a: Tensor, b: Tensor) -> Tensor:
        """The sum of a b over each cell, (cells,)."""
        if self.axis is None and self.block is None:
            return torch.dot(a.reshape(-1), b.reshape(-1)).reshape(1)
        return (self.rows(a) * self.rows(b)).sum(1)

    def spread(self, values: Tensor, ndim: int) -> Tensor:
        """Values (cells,) to be broadcast over a tensor of one cell or with one for each index of the axis."""
        return values if self.axis is None else values.reshape([-1 if i == self.axis else 1 for i in range(ndim)])


@dataclass(frozen=True)
class Saved:
    """What a rule sees: the gradient by x_hat, x, x_hat, what was not clipped, s (cells,), and how x is cut."""

    grad: Tensor
    x: Tensor
    x_hat: Tensor
    inside: Tensor
    scale: Tensor
    cells: Cells
    learns: tuple[bool, bool]  # the scale, the zero point


Rule = Callable[[Saved], tuple[Tensor, Tensor | None, Tensor | None]]  # gradients by x, s and z


def passed(saved: Saved) -> Tensor:
    """The gradient where nothing was clipped, and zero elsewhere."""
    return torch.where(saved.inside, saved.grad, 0.0)


def straight_through(saved: Saved) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradient passes where nothing was clipped (Bengio et al. 2013); the grid stays."""
    return passed(saved), None, None


def straight_everywhere(saved: Saved) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradient passes, clipped or not; the grid stays."""
    return saved.grad, None, None


def rounded(
    x: Tensor, scale: Tensor, zero_point: Tensor, cells: Cells, low: int, high: int, rule: Rule = straight_through
) -> Tensor:
    """x_hat in the dtype of `x`, computed in float32.

    Args:
        x: any shape. scale, zero_point: (cells,) float32, the zero points whole numbers.
        low, high: the least and the largest code. rule: the gradients.
    """
    values: Tensor = _Rounding.apply(x.float(), scale, zero_point, cells, low, high, rule)
    return values.to(x.dtype)


class _Rounding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, cells: Cells, low: int, high: int, rule: Rule
    ) -> Tensor:
        if cells.block is not None:
            shape, rows = x.shape, Cells(axis=0)
            values, inside = _quantized(cells.rows(x), scale, zero_point, rows, low, high)
            values, inside = cells.tensor(values, shape), cells.tensor(inside, shape)
        else:
            values, inside = _quantized(x, scale, zero_point, cells, low, high)
        ctx.save_for_backward(x, values, inside, scale)
        ctx.cells, ctx.rule = cells, rule
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, values, inside, scale = ctx.saved_tensors
        learns = (ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        return *ctx.rule(Saved(grad.contiguous(), x, values, inside, scale, ctx.cells, learns)), None, None, None, None


def _quantized(
    x: Tensor, scale: Tensor, zero_point: Tensor, cells: Cells, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """The values, and where codes were not clipped; in few passes over the tensor."""
    inverse, points = 1.0 / scale, zero_point.to(torch.float32)
    if cells.axis is None and x.device.type == "cpu" and not torch.compiler.is_compiling():
        point = float(points)
        steps = (x * inverse).round_()
        kept = steps.clamp(low - point, high - point)
    else:
        steps = (x * cells.spread(inverse, x.ndim)).round_()
        by_cell = cells.spread(points, x.ndim)
        kept = torch.minimum(torch.maximum(steps, low - by_cell), high - by_cell)
    inside = kept == steps
    return kept.mul_(cells.spread(scale, x.ndim)), inside


class _AsComputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


def as_computed(x: Tensor, values: Tensor) -> Tensor:
    """`values`, with the gradient of `x`: for formats that are no affine grid, and scales chosen at run time."""
    result: Tensor = _AsComputed.apply(x, values)
    return result
