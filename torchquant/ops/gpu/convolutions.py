"""Convolutions of codes by codes as an operator: schema, shapes, a reference on every device, Triton on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812

from torchquant.ops.gpu.linears import check_activation, check_operands, check_zero_point, triton_launcher
from torchquant.ops.gpu.operands import ConvolutionParams, Epilogue, Scales

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
    scales, epilogue = Scales(weight_scale, x_scale, x_zero_point, weight_sum), Epilogue(bias, residual, activation)
    params = ConvolutionParams(stride, padding, dilation)
    _check(x, weight, scales, epilogue)
    out = _empty(x, weight, params, out_dtype)
    if x.is_cuda:
        with torch.cuda.device(x.device):
            return triton_launcher().convolution(x, weight, scales, epilogue, params, out)
    return scaled_conv2d_reference(x, weight, scales, epilogue, params, out_dtype)


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
    _check(x, weight, Scales(weight_scale, x_scale, x_zero_point, weight_sum), Epilogue(bias, residual, activation))
    return _empty(x, weight, ConvolutionParams(stride, padding, dilation), out_dtype)


def scaled_conv2d_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: Scales,
    epilogue: Epilogue,
    params: ConvolutionParams,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The same in plain PyTorch."""
    wide = torch.float64 if weight.dtype == torch.int8 else torch.float32  # sums of integers are exact in float64
    values = x.to(wide) if scales.x_zero_point is None else x.to(wide) - scales.x_zero_point.to(wide)
    image, window = (t.permute(0, 3, 1, 2) for t in (values, weight.to(wide)))
    product = F.conv2d(image, window, None, params.stride, params.padding, params.dilation)
    assert scales.x_scale is not None
    y = product.permute(0, 2, 3, 1).float() * scales.x_scale * scales.weight_scale
    return epilogue.apply(y).to(out_dtype).contiguous()


def _check(x: torch.Tensor, weight: torch.Tensor, scales: Scales, epilogue: Epilogue) -> None:
    check_activation("scaled_conv2d", epilogue)
    if weight.dtype not in (torch.int8, torch.float8_e4m3fn) or x.dtype != weight.dtype:
        raise ValueError(f"scaled_conv2d takes codes in int8 or float8_e4m3fn, not {x.dtype} by {weight.dtype}")
    if x.dim() != 4 or weight.dim() != 4 or x.shape[3] != weight.shape[3]:
        raise ValueError(f"x is {tuple(x.shape)} and the weight {tuple(weight.shape)}: their last axis is the channels")
    check_zero_point(weight, scales)
    n, kh, kw, _ = weight.shape
    check_operands(
        n,
        epilogue.residual,
        weight_scale=(scales.weight_scale, 1 if scales.weight_scale.numel() == 1 else n),
        weight_sum=(scales.weight_sum, n * kh * kw),
        bias=(epilogue.bias, n),
        x_scale=(scales.x_scale, 1),
        x_zero_point=(scales.x_zero_point, 1),
    )


def _empty(x: torch.Tensor, weight: torch.Tensor, params: ConvolutionParams, out_dtype: torch.dtype) -> torch.Tensor:
    """What the result (batch, OH, OW, N) will be written to."""
    stride, padding, dilation = params.stride, params.padding, params.dilation
    numbers = (*stride, *dilation, *(p + 1 for p in padding))
    if not len(stride) == len(padding) == len(dilation) == 2 or min(numbers) < 1:
        raise ValueError(f"a convolution has no stride {stride}, padding {padding} and dilation {dilation}")
    sizes = [
        (x.shape[i + 1] + 2 * padding[i] - dilation[i] * (weight.shape[i + 1] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    return x.new_empty(x.shape[0], *sizes, weight.shape[0], dtype=out_dtype)
