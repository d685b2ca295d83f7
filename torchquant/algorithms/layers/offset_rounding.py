"""A weight rounded with an offset for each element, and its gradients straight through the rounding, in few passes.

    W, V (like W)    weight and offset        s, z (cells,)   scale and zero point        n, m   limits of the codes
    Wq = s (clip(round(W / s + V) + z, n, m) - z)           u = 1 where nothing was cut off, else 0
    dWq/dV = s u        dWq/ds = Wq / s - u W / s        dWq/dz = s (u - 1)

A part of the rows at a time, so that what is computed with stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from torchquant.errors import SchemeError
from torchquant.fx.grids import Grid

__all__ = ["fake_quantize"]

_AT_ONCE = 1 << 17  # weights


def fake_quantize(
    weight: torch.Tensor, offset: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """The quantized weight, with gradients by offset, scale and zero point.

    Args:
        weight, offset: of one shape, float32. scale, zero_point: (cells,) float32, of the cells of `grid`.

    Raises:
        SchemeError: the cells of the grid do not divide the weight evenly.
    """
    counts, sizes = _cut(weight.shape, grid)
    wide = [x for pair in zip(counts, sizes, strict=True) for x in pair]
    narrow = [x for count in counts for x in (count, 1)]
    parts: Any = _OffsetRounding.apply(
        weight.reshape(wide), offset.reshape(wide), scale.reshape(narrow), zero_point.reshape(narrow), grid
    )
    values: torch.Tensor = parts.reshape(weight.shape)
    return values


def _cut(shape: torch.Size, grid: Grid) -> tuple[list[int], list[int]]:
    """Along each axis, how many cells there are and how wide each is."""
    if grid.scale.numel() == 1:
        return [1] * len(shape), list(shape)
    sizes = [min(n, b) for n, b in zip(shape, grid.block, strict=True)]
    if any(n % b for n, b in zip(shape, sizes, strict=True)):
        raise SchemeError(f"cells of {grid.block} do not divide a weight of {tuple(shape)} evenly")
    return [n // b for n, b in zip(shape, sizes, strict=True)], sizes


class _OffsetRounding(torch.autograd.Function):
    """Tensors (cells, width of a cell) for each axis in turn; scale and zero point broadcast over the widths."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, offset: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, grid: Grid
    ) -> torch.Tensor:
        values, inside = torch.empty_like(weight), torch.empty_like(weight, dtype=torch.bool)
        for rows in _rows(weight):
            step, zeros = scale[rows], zero_point[rows]
            codes = (weight[rows] / step).add_(offset[rows]).round_().add_(zeros)
            torch.logical_and(codes >= grid.quant_min, codes <= grid.quant_max, out=inside[rows])
            values[rows] = codes.clamp_(grid.quant_min, grid.quant_max).sub_(zeros).mul_(step)
        ctx.save_for_backward(weight, scale, values, inside)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        weight, scale, values, inside = ctx.saved_tensors
        (gradient,) = gradients
        by_offset = torch.empty_like(weight)
        by_scale, by_zero = torch.zeros_like(scale), torch.zeros_like(scale)
        widths = tuple(range(1, weight.ndim, 2))
        for rows in _rows(weight):
            mask, step, felt = inside[rows], scale[rows], gradient[rows]
            torch.mul(felt * step, mask, out=by_offset[rows])
            by_scale[rows] = ((values[rows] - weight[rows] * mask) / step * felt).sum(widths, keepdim=True)
            by_zero[rows] = (by_offset[rows] - felt * step).sum(widths, keepdim=True)
        return None, by_offset, by_scale, by_zero, None


def _rows(weight: torch.Tensor) -> Iterator[slice]:
    """Parts along the first axis."""
    step = max(1, _AT_ONCE // max(1, weight[0].numel())) if len(weight) else 1
    for start in range(0, len(weight), step):
        yield slice(start, start + step)
