"""Convolutions of codes by codes as an operator: schema, shapes, a reference on every device, Triton on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812

from torchquant.ops.gpu.linears import ACTIVATIONS, check_operands, epilogue, triton_launcher

__all__ = ["scaled_conv2d", "scaled_conv2d_reference"]


@torch.library.custom_op("torchquant::scaled_conv2d", mutates_args=())
def scaled_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """activation(conv2d(x - x_zero_point, weight) x_scale weight_scale + bias + residual), channels last.

    Args:
        x: (batch, H, W, C) codes of the weight's dtype; beyond the image lies the zero point.
        weight: codes (N, KH, KW, C), int8 or float8_e4m3fn, contiguous.
        weight_scale: (N,) or (1,) float32; x_scale: (1,) float32.
        x_zero_point: (1,) int32; None: 0. For int8 only.
        weight_sum: (N, KH * KW) int32, sums of `weight` over C; needed with x_zero_point.
        bias: (N,); residual: (batch, OH, OW, N).
        stride, padding, dilation: two numbers each.
        activation: a name of `ACTIVATIONS`.

    Returns:
        (batch, OH, OW, N) in out_dtype, contiguous.

    Raises:
        ValueError: an argument does not fit the others.
    """
    _check(x, weight, weight_scale, x_scale, x_zero_point, weight_sum, bias, residual, activation)
    out = _empty(x, weight, stride, padding, dilation, out_dtype)
    arguments = (x, weight, weight_scale, x_scale, x_zero_point, weight_sum, bias, residual)
    if x.is_cuda:
        with torch.cuda.device(x.device):
            return triton_launcher().convolution(*arguments, stride, padding, dilation, activation, out)
    return scaled_conv2d_reference(*arguments, stride, padding, dilation, activation, out_dtype)


@scaled_conv2d.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    _check(x, weight, weight_scale, x_scale, x_zero_point, weight_sum, bias, residual, activation)
    return _empty(x, weight, stride, padding, dilation, out_dtype)


def scaled_conv2d_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The same in plain PyTorch."""
    wide = torch.float64 if weight.dtype == torch.int8 else torch.float32  # integers: exact
    values = x.to(wide) if x_zero_point is None else x.to(wide) - x_zero_point.to(wide)
    product = F.conv2d(values.permute(0, 3, 1, 2), weight.to(wide).permute(0, 3, 1, 2), None, stride, padding, dilation)
    y = product.permute(0, 2, 3, 1).float() * x_scale * weight_scale
    return epilogue(y, bias, residual, activation).to(out_dtype).contiguous()


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"scaled_conv2d has no activation {activation!r}; it has {', '.join(ACTIVATIONS)}")
    if weight.dtype not in (torch.int8, torch.float8_e4m3fn) or x.dtype != weight.dtype:
        raise ValueError(f"scaled_conv2d takes codes in int8 or float8_e4m3fn, not {x.dtype} by {weight.dtype}")
    if x.dim() != 4 or weight.dim() != 4 or x.shape[3] != weight.shape[3]:
        raise ValueError(f"x is {tuple(x.shape)} and the weight {tuple(weight.shape)}: their last axis is the channels")
    if x_zero_point is not None and (weight_sum is None or weight.dtype != torch.int8):
        raise ValueError("a zero point needs weight_sum, and codes that are integers")
    n, kh, kw, _ = weight.shape
    of_weight = (weight_scale, 1 if weight_scale.numel() == 1 else n)
    of_input = {"x_scale": (x_scale, 1), "x_zero_point": (x_zero_point, 1)}
    check_operands(
        n, residual, weight_scale=of_weight, weight_sum=(weight_sum, n * kh * kw), bias=(bias, n), **of_input
    )


def _empty(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """What the result will be written to."""
    numbers = (*stride, *dilation, *(p + 1 for p in padding))
    if not len(stride) == len(padding) == len(dilation) == 2 or min(numbers) < 1:
        raise ValueError(f"a convolution has no stride {stride}, padding {padding} and dilation {dilation}")
    sizes = [
        (x.shape[i + 1] + 2 * padding[i] - dilation[i] * (weight.shape[i + 1] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    return x.new_empty(x.shape[0], *sizes, weight.shape[0], dtype=out_dtype)
