"""Ops with which a graph says what ONNX writes for it: QuantizeLinear, DequantizeLinear, MatMulInteger, uneven pads.

They compute what ONNX says that they do, so a rewritten graph runs in PyTorch too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["OPS", "translations"]

_LIBRARY = torch.library.Library("torchquant_onnx", "DEF")
OPS = torch.ops.torchquant_onnx


def _quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int) -> torch.Tensor:
    """Codes of x, saturated to the range of the zero point's dtype; scales along `axis`, or one."""
    scale, zeros = _along(scale, x.ndim, axis), _along(zero_point, x.ndim, axis)
    if zero_point.dtype.is_floating_point:
        limit = torch.finfo(zero_point.dtype).max
        return (x / scale).clamp(-limit, limit).to(zero_point.dtype)
    limits = torch.iinfo(zero_point.dtype)
    return ((x / scale).round() + zeros.to(x.dtype)).clamp(limits.min, limits.max).to(zero_point.dtype)


def _dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, axis: int, block: int, bits: int
) -> torch.Tensor:
    """Values of codes; with `block`, a scale for each `block` neighbours along `axis`."""
    if block:
        scale = scale.repeat_interleave(block, axis)
        zero_point = None if zero_point is None else zero_point.repeat_interleave(block, axis)
    values = codes.to(scale.dtype)
    if zero_point is not None:
        values = values - _along(zero_point, codes.ndim, axis).to(scale.dtype)
    return values * _along(scale, codes.ndim, axis)


def _along(values: torch.Tensor, rank: int, axis: int) -> torch.Tensor:
    if values.ndim != 1:
        return values
    return values.reshape([-1 if i == axis else 1 for i in range(rank)])


def _dynamic_quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """uint8 codes, scale and zero point of the whole tensor."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = (-low / scale).round().clamp(0, 255)
    codes = ((x / scale).round() + zero_point).clamp(0, 255).to(torch.uint8)
    return codes, scale, zero_point.to(torch.uint8)


def _matmul_integer(a: torch.Tensor, b: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    return torch.matmul(a.to(torch.int32) - zero_point.to(torch.int32), b.to(torch.int32))


def _global_average_pool(x: torch.Tensor) -> torch.Tensor:
    return x.mean(list(range(2, x.ndim)), True)


def _conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    pads: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    """A convolution; `pads` in front on each axis, then behind."""
    rank = len(stride)
    sides = [side for i in reversed(range(rank)) for side in (pads[i], pads[i + rank])]
    padded = torch.nn.functional.pad(x, sides)
    function = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[rank - 1]
    return function(padded, weight, bias, stride, 0, dilation, groups)


_SCHEMAS: dict[str, tuple[str, Callable[..., Any]]] = {
    "quantize": ("(Tensor x, Tensor scale, Tensor zero_point, int axis) -> Tensor", _quantize),
    "dequantize": (
        "(Tensor codes, Tensor scale, Tensor? zero_point, int axis, int block, int bits) -> Tensor",
        _dequantize,
    ),
    "dynamic_quantize": ("(Tensor x) -> (Tensor, Tensor, Tensor)", _dynamic_quantize),
    "matmul_integer": ("(Tensor a, Tensor b, Tensor zero_point) -> Tensor", _matmul_integer),
    "global_average_pool": ("(Tensor x) -> Tensor", _global_average_pool),
    "conv": (
        "(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] pads, int[] dilation, int groups) -> Tensor",
        _conv,
    ),
}
for _name, (_schema, _function) in _SCHEMAS.items():
    _LIBRARY.define(f"{_name}{_schema}")
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"torchquant_onnx::{_name}", _function)


def translations(opset: Any) -> dict[Any, Callable[..., Any]]:
    """How the exporter writes each op, with the ops of an `onnxscript` opset."""

    def quantize(x: Any, scale: Any, zero_point: Any, axis: int) -> Any:
        return opset.QuantizeLinear(x, scale, zero_point, axis=axis)

    def dequantize(codes: Any, scale: Any, zero_point: Any, axis: int, block: int, bits: int) -> Any:
        return opset.DequantizeLinear(codes, scale, zero_point, axis=axis, block_size=block)

    def dynamic_quantize(x: Any) -> Any:
        return opset.DynamicQuantizeLinear(x)

    def matmul_integer(a: Any, b: Any, zero_point: Any) -> Any:
        return opset.MatMulInteger(a, b, zero_point)

    def global_average_pool(x: Any) -> Any:
        return opset.GlobalAveragePool(x)

    def conv(x: Any, weight: Any, bias: Any, stride: Any, pads: Any, dilation: Any, groups: int) -> Any:
        return opset.Conv(x, weight, bias, strides=stride, pads=pads, dilations=dilation, group=groups)

    written = (quantize, dequantize, dynamic_quantize, matmul_integer, global_average_pool, conv)
    return {getattr(OPS, function.__name__).default: function for function in written}
