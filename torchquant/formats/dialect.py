"""The ops of a converted graph that torchao has none for: codes with float scales by row or by tensor.

torchao's `quantize_per_tensor` rounds to integers first, also where the codes are float8, which loses most of their
values; its affine ops want the rank of a tensor, which an observer may not know; its per-token ops compute in float64.
"""

from __future__ import annotations

import torch

__all__ = ["EPS", "choose_affine", "choose_scale", "dequantize_scaled", "quantize_scaled"]

EPS = 2.0**-100  # the scale of zeros: their codes are zeros, and its inverse is finite
_LIBRARY = torch.library.Library("torchquant", "FRAGMENT")


def choose_scale(x: torch.Tensor, axis: int | None, quant_min: float, quant_max: float, eps: float) -> torch.Tensor:
    """float32 scale with which the largest magnitude along `axis` (of the whole tensor if None) is half the grid.

    Returns: x's shape with size 1 at `axis`, or (1,).
    """
    magnitude = x.abs().amax().reshape(1) if axis is None else x.abs().amax(axis, keepdim=True)
    return (magnitude.to(torch.float32) / ((quant_max - quant_min) / 2)).clamp(min=eps)


def choose_affine(
    x: torch.Tensor, axis: int | None, quant_min: float, quant_max: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 scale and int32 zero point with which the range along `axis`, zero included, fills the grid."""
    low, high = (x.amin().reshape(1), x.amax().reshape(1)) if axis is None else (x.amin(axis, True), x.amax(axis, True))
    low, high = low.to(torch.float32).clamp(max=0), high.to(torch.float32).clamp(min=0)
    scale = ((high - low) / (quant_max - quant_min)).clamp(min=eps)
    return scale, (quant_min - (low / scale).round()).clamp(quant_min, quant_max).to(torch.int32)


def quantize_scaled(
    x: torch.Tensor,
    scale: torch.Tensor,
    quant_min: float,
    quant_max: float,
    dtype: torch.dtype,
    zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    """Codes of x / scale: the nearest integers, or where `dtype` is a float the nearest of its values."""
    codes = x.to(torch.float32) * (1.0 / scale)
    if not dtype.is_floating_point:
        codes = codes.round()
    if zero_point is not None:
        codes = codes + zero_point
    return codes.clamp(quant_min, quant_max).to(dtype)


def dequantize_scaled(
    input: torch.Tensor,
    scale: torch.Tensor,
    quant_min: float,
    quant_max: float,
    dtype: torch.dtype,
    output_dtype: torch.dtype,
    zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    """The values that codes stand for, in `output_dtype`."""
    codes = input.to(torch.float32)
    return ((codes if zero_point is None else codes - zero_point) * scale).to(output_dtype)


_GRID = "float quant_min, float quant_max"
for _schema, _function in (
    (f"choose_scale(Tensor x, int? axis, {_GRID}, float eps) -> Tensor", choose_scale),
    (f"choose_affine(Tensor x, int? axis, {_GRID}, float eps) -> (Tensor, Tensor)", choose_affine),
    (
        f"quantize_scaled(Tensor x, Tensor scale, {_GRID}, ScalarType dtype, Tensor? zero_point=None) -> Tensor",
        quantize_scaled,
    ),
    (
        f"dequantize_scaled(Tensor input, Tensor scale, {_GRID}, ScalarType dtype, ScalarType output_dtype, "
        "Tensor? zero_point=None) -> Tensor",
        dequantize_scaled,
    ),
):
    # kept whole by torch.export, taken apart (and so fused) by Inductor, as torchao's affine ops are
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_schema.partition("(")[0], _function, "CompositeImplicitAutograd")
