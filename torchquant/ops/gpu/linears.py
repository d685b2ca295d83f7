"""Linears with quantized weights as operators: schema, shapes, a reference on every device, Triton on NVIDIA GPUs.

The operators are opaque to torch.compile: it neither folds packed weights back to floats nor needs a GPU to trace them.
All compute y = activation(product + bias + residual), the part after the product in float32.
"""

from __future__ import annotations

from typing import Any

import torch

from torchquant.ops.gpu import packing
from torchquant.ops.gpu.operands import ACTIVATIONS, Epilogue, Grid, PackedWeight, Scales

__all__ = [
    "ACTIVATIONS",
    "check_activation",
    "check_operands",
    "check_zero_point",
    "quantize_rows",
    "quantize_rows_reference",
    "scaled_linear",
    "scaled_reference",
    "triton_launcher",
    "weight_only_linear",
    "weight_only_reference",
]


@torch.library.custom_op("torchquant::weight_only_linear", mutates_args=())
def weight_only_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    params: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    bits: int,
    group_size: int,
    asymmetric: bool,
    activation: str,
) -> torch.Tensor:
    """activation(x W^T + bias + residual) with W = (codes - zero point) scale, unpacked as it is multiplied.

    Args:
        x: (..., K) bfloat16, float16 or float32.
        packed: codes (N, K) of `bits` 4 or 8, from `packing.pack_weight`.
        params: scales and zero points from `packing.pack_params`, in x's dtype.
        bias: (N,); residual: (..., N).
        group_size: neighbours on K that share a scale: a multiple of 32 that divides K, or K itself.
        asymmetric: whether there are zero points other than 0.
        activation: a name of `ACTIVATIONS`.

    Returns:
        (..., N) in x's dtype.

    Raises:
        ValueError: an argument does not fit the others.
    """
    weight, epilogue = PackedWeight(packed, params, bits, group_size, asymmetric), Epilogue(bias, residual, activation)
    _check_weight_only(x, weight, epilogue)
    rows, epilogue = x.reshape(-1, x.shape[-1]), epilogue.by_rows(weight.outputs)
    if x.is_cuda and x.dtype != torch.float32:
        with torch.cuda.device(x.device):
            y = triton_launcher().weight_only(rows, weight, epilogue)
    else:
        y = weight_only_reference(rows, weight, epilogue)
    return y.reshape(*x.shape[:-1], weight.outputs)


@weight_only_linear.register_fake
def _(
    x: torch.Tensor,
    packed: torch.Tensor,
    params: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    bits: int,
    group_size: int,
    asymmetric: bool,
    activation: str,
) -> torch.Tensor:
    weight = PackedWeight(packed, params, bits, group_size, asymmetric)
    _check_weight_only(x, weight, Epilogue(bias, residual, activation))
    return x.new_empty(*x.shape[:-1], weight.outputs)


def weight_only_reference(
    x: torch.Tensor, weight: PackedWeight, epilogue: Epilogue, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The same in plain PyTorch, in `dtype`; x (M, K), residual (M, N); returns (M, N) in x's dtype."""
    scale, zero_point = (
        v.to(dtype).repeat_interleave(weight.group_size, 1) for v in packing.unpack_params(weight.params)
    )
    codes = packing.unpack_weight(weight.packed, weight.bits, x.shape[-1])
    floats = (codes.to(dtype) - zero_point) * scale
    return epilogue.apply(x.to(dtype) @ floats.t()).to(x.dtype)


def _check_weight_only(x: torch.Tensor, weight: PackedWeight, epilogue: Epilogue) -> None:
    packed, params, bits, k = weight.packed, weight.params, weight.bits, x.shape[-1]
    check_activation("weight_only_linear", epilogue)
    if params.dtype != x.dtype:
        raise ValueError(
            f"the scales are {params.dtype} and the activations {x.dtype}: cast the lowered model as a whole"
        )
    if bits not in (4, 8) or packed.dim() != (3 if bits == 4 else 4):
        raise ValueError(f"packed has {packed.dim()} axes, which are not those of {bits} bits")
    if packed.shape[0] != -(-k // packing.BLOCK) or params.shape[0] != -(-k // weight.group_size):
        raise ValueError(
            f"x has {k} features, but the weight {packed.shape[0]} blocks of 128 and {params.shape[0]} groups of "
            f"{weight.group_size}"
        )
    n = weight.outputs
    if packed.dtype != torch.int16 or params.shape[1:] != (n, 2):
        raise ValueError(f"packed is {packed.dtype} of {n} outputs, and the scales are {tuple(params.shape)}")
    check_operands(n, epilogue.residual, bias=(epilogue.bias, n))


@torch.library.custom_op("torchquant::quantize_rows", mutates_args=())
def quantize_rows(
    x: torch.Tensor, dtype: torch.dtype, quant_min: float, quant_max: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row of x (..., K) symmetrically, with a scale from its largest magnitude.

    Returns:
        Codes (..., K) of `dtype` (int8 or float8_e4m3fn), and scales (..., 1) float32 of `eps` at least.
    """
    rows = x.reshape(-1, x.shape[-1])
    if x.is_cuda:
        with torch.cuda.device(x.device):
            codes, scale = triton_launcher().quantize_rows(rows, dtype, Grid(quant_min, quant_max, eps))
    else:
        codes, scale = quantize_rows_reference(rows, dtype, quant_min, quant_max, eps)
    return codes.reshape(x.shape), scale.reshape(*x.shape[:-1], 1)


@quantize_rows.register_fake
def _(
    x: torch.Tensor, dtype: torch.dtype, quant_min: float, quant_max: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


def quantize_rows_reference(
    x: torch.Tensor, dtype: torch.dtype, quant_min: float, quant_max: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain PyTorch; x (M, K)."""
    scale = (x.float().abs().amax(-1, keepdim=True) / ((quant_max - quant_min) / 2)).clamp(min=eps)
    return _quantize(x, scale, None, dtype, quant_min, quant_max), scale


def _quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    dtype: torch.dtype,
    quant_min: float,
    quant_max: float,
) -> torch.Tensor:
    values = x.float() * (1.0 / scale)
    if dtype == torch.int8:
        values = values.round() + (0 if zero_point is None else zero_point)
    return values.clamp(quant_min, quant_max).to(dtype)


@torch.library.custom_op("torchquant::scaled_linear", mutates_args=())
def scaled_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor | None,
    x_zero_point: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    quant_min: float,
    quant_max: float,
    eps: float,
    activation: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """activation((codes(x) - x_zero_point) weight^T x_scale weight_scale + bias + residual).

    Args:
        x: (..., K) floats, quantized here; or codes of the weight's dtype.
        weight: codes (N, K), int8 or float8_e4m3fn, contiguous.
        weight_scale: (N,) or (1,) float32.
        x_scale: (1,) float32, or for codes also (..., 1); None: from each row's largest magnitude (`quantize_rows`).
        x_zero_point: like x_scale, int32; None: 0. For int8 only.
        weight_sum: (N,) int32, the sums of the rows of `weight`; needed with x_zero_point.
        bias: (N,); residual: (..., N).
        quant_min, quant_max: the grid of x's codes; eps: the smallest scale of a row.
        activation: a name of `ACTIVATIONS`.

    Returns:
        (..., N) in out_dtype.

    Raises:
        ValueError: an argument does not fit the others.
    """
    scales, epilogue = Scales(weight_scale, x_scale, x_zero_point, weight_sum), Epilogue(bias, residual, activation)
    _check_scaled(x, weight, scales, epilogue)
    n, rows = weight.shape[0], x.reshape(-1, x.shape[-1])
    arguments = (rows, weight, scales.by_rows(), Grid(quant_min, quant_max, eps), epilogue.by_rows(n), out_dtype)
    if x.is_cuda:
        with torch.cuda.device(x.device):
            y = triton_launcher().scaled(*arguments)
    else:
        y = scaled_reference(*arguments)
    return y.reshape(*x.shape[:-1], n)


@scaled_linear.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor | None,
    x_zero_point: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    quant_min: float,
    quant_max: float,
    eps: float,
    activation: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    scales = Scales(weight_scale, x_scale, x_zero_point, weight_sum)
    _check_scaled(x, weight, scales, Epilogue(bias, residual, activation))
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=out_dtype)


def scaled_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: Scales,
    grid: Grid,
    epilogue: Epilogue,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The same in plain PyTorch; x (M, K), x_scale and x_zero_point (M,) or (1,), residual (M, N)."""
    x_scale, x_zero_point = scales.x_scale, scales.x_zero_point
    if x_scale is None:
        x, x_scale = quantize_rows_reference(x, weight.dtype, grid.quant_min, grid.quant_max, grid.eps)
    elif x.dtype != weight.dtype:
        x = _quantize(x, x_scale, x_zero_point, weight.dtype, grid.quant_min, grid.quant_max)
    wide = torch.float64 if weight.dtype == torch.int8 else torch.float32  # sums of integers are exact in float64
    product = x.to(wide) @ weight.to(wide).t()
    if x_zero_point is not None:
        assert scales.weight_sum is not None
        product = product - x_zero_point.reshape(-1, 1).to(product.dtype) * scales.weight_sum.to(product.dtype)
    y = product.float() * x_scale.reshape(-1, 1) * scales.weight_scale
    return epilogue.apply(y).to(out_dtype)


def _check_scaled(x: torch.Tensor, weight: torch.Tensor, scales: Scales, epilogue: Epilogue) -> None:
    check_activation("scaled_linear", epilogue)
    if weight.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"scaled_linear takes weights in int8 or float8_e4m3fn, not {weight.dtype}")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} features and the weight {weight.shape[1]}")
    if scales.x_scale is None and (x.dtype == weight.dtype or scales.x_zero_point is not None):
        raise ValueError("x holds codes or has a zero point, so it needs x_scale")
    check_zero_point(weight, scales)
    n = weight.shape[0]
    weight_scale = (scales.weight_scale, 1 if scales.weight_scale.numel() == 1 else n)
    check_operands(
        n,
        epilogue.residual,
        weight_scale=weight_scale,
        weight_sum=(scales.weight_sum, n),
        bias=(epilogue.bias, n),
    )


def check_activation(operator: str, epilogue: Epilogue) -> None:
    """Raise ValueError unless the kernels have the activation."""
    if epilogue.activation not in ACTIVATIONS:
        raise ValueError(f"{operator} has no activation {epilogue.activation!r}; it has {', '.join(ACTIVATIONS)}")


def check_zero_point(weight: torch.Tensor, scales: Scales) -> None:
    """Raise ValueError if there is a zero point that the kernels cannot take off."""
    if scales.x_zero_point is not None and (scales.weight_sum is None or weight.dtype != torch.int8):
        raise ValueError("a zero point needs weight_sum, and codes that are integers")


def check_operands(n: int, residual: torch.Tensor | None, **operands: tuple[torch.Tensor | None, int]) -> None:
    """Raise ValueError unless each operand has as many elements as a kernel reads, which checks none of them itself.

    Args:
        n: outputs. residual: (..., n). operands: by name, each with that number.
    """
    for name, (operand, count) in operands.items():
        if operand is not None and operand.numel() != count:
            raise ValueError(f"{name} has {operand.numel()} elements, and {count} are needed for {n} outputs")
    if residual is not None and (residual.dim() == 0 or residual.shape[-1] != n):
        raise ValueError(f"the residual is {tuple(residual.shape)}, and its last axis is not the {n} outputs")


def triton_launcher() -> Any:
    """The launcher of the Triton kernels: Triton comes with torch for CUDA only."""
    from torchquant.ops.gpu import launch  # noqa: PLC0415

    return launch
