"""Launches of products of codes by codes. Shapes: x (M, K), weight (N, K), y (M, N)."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from torchquant.ops.gpu import configs, kernels
from torchquant.ops.gpu.configs import Config
from torchquant.ops.gpu.launch_options import ceil_div, launch_options
from torchquant.ops.gpu.launch_weight_only import add_splits
from torchquant.ops.gpu.operands import Epilogue, Grid, Scales

__all__ = ["quantize_rows", "scaled"]

_SPAN = 4096  # values that one program quantizes
_WIDEST_ROW = 8192  # values of a row held in registers
_TILES_IN_BAND = 8  # tiles of outputs that `scaled_tiled` walks at a time
_FORMAT = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


def quantize_rows(x: torch.Tensor, dtype: torch.dtype, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """See `linears.quantize_rows`; returns codes (M, K) of `dtype` and scales (M,) float32."""
    x = x.contiguous()
    m, k = x.shape
    codes, scale = x.new_empty(m, k, dtype=dtype), x.new_empty(m, dtype=torch.float32)
    if m and k:
        width = min(triton.next_power_of_2(k), _WIDEST_ROW)
        warps = max(1, min(16, width // 512))
        kernels.quantize_rows[(m,)](
            x,
            codes,
            scale,
            k,
            grid.quant_min,
            grid.quant_max,
            grid.eps,
            width,
            num_warps=warps,
            **launch_options(x),
        )
    return codes, scale


def _quantize_tensor(x: torch.Tensor, dtype: torch.dtype, scales: Scales, grid: Grid) -> torch.Tensor:
    """Codes (M, K) of x with one scale and one zero point."""
    codes, count = torch.empty_like(x, dtype=dtype), x.numel()
    kernels.quantize_tensor[(ceil_div(count, _SPAN),)](
        x,
        codes,
        scales.x_scale,
        scales.x_zero_point,
        count,
        grid.quant_min,
        grid.quant_max,
        _SPAN,
        num_warps=8,
        **launch_options(x),
    )
    return codes


def _quantized(x: torch.Tensor, dtype: torch.dtype, scales: Scales, grid: Grid) -> tuple[torch.Tensor, Scales]:
    """Codes of x, and the scales with those of x's rows if they came from the rows."""
    if scales.x_scale is not None:
        return _quantize_tensor(x, dtype, scales, grid), scales
    codes, x_scale = quantize_rows(x, dtype, grid)
    return codes, replace(scales, x_scale=x_scale)


def scaled(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: Scales,
    grid: Grid,
    epilogue: Epilogue,
    out_dtype: torch.dtype,
    config: Config | None = None,
) -> torch.Tensor:
    """See `linears.scaled_linear`; returns (M, N) in out_dtype. `config` overrides the choice by size."""
    x, weight = x.contiguous(), weight.contiguous()
    (m, k), n = x.shape, weight.shape[0]
    out = x.new_empty(m, n, dtype=out_dtype)
    if m == 0:
        return out
    if config is None:
        config = configs.choose(_FORMAT[weight.dtype], m, n, k, x.device, library=_library_takes(m, n, k, weight))
    quantizes_inside = config.kernel == "skinny" and config.quantizes
    if x.dtype != weight.dtype and not quantizes_inside:
        x, scales = _quantized(x, weight.dtype, scales, grid)
    epilogue = epilogue.by_rows(n)
    if config.kernel == "library":
        return _by_library(x, weight, scales, epilogue, out)
    if config.kernel == "skinny":
        _skinny(x, weight, scales, grid, epilogue, out, config)
    else:
        _by_tiles(x, weight, scales, epilogue, out, config)
    return out


def _skinny(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: Scales,
    grid: Grid,
    epilogue: Epilogue,
    out: torch.Tensor,
    config: Config,
) -> None:
    """Fill `out` by the kernel for few rows, which also takes floats."""
    (m, k), n = x.shape, weight.shape[0]
    kernels.scaled_skinny[(ceil_div(n, config.n), ceil_div(m, config.m))](
        x,
        weight,
        *scales.for_kernel(),
        epilogue.bias,
        epilogue.residual,
        out,
        m,
        n,
        k,
        *scales.strides,
        grid.quant_min,
        grid.quant_max,
        grid.eps,
        epilogue.activation,
        config.m,
        config.n,
        config.k,
        config.slices,
        min(triton.next_power_of_2(k), 2 * _WIDEST_ROW),
        num_warps=config.warps,
        num_stages=config.stages,
        **launch_options(x),
    )


def _by_tiles(
    x: torch.Tensor, weight: torch.Tensor, scales: Scales, epilogue: Epilogue, out: torch.Tensor, config: Config
) -> None:
    """Fill `out` by a kernel for many rows; with K split, by partial sums (split, M, N) that are added afterwards."""
    m, n = out.shape
    split = min(config.slices, ceil_div(x.shape[1], config.k))
    if split == 1:
        _tiled(x, weight, scales, epilogue, out, split, config)
        return
    products = out.new_empty(split, m, n, dtype=torch.int32 if weight.dtype == torch.int8 else torch.float32)
    _tiled(x, weight, scales, epilogue, products, split, config)
    _scale_products(products, scales, epilogue, out)


def _tiled(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: Scales,
    epilogue: Epilogue,
    out: torch.Tensor,
    split: int,
    config: Config,
) -> None:
    """Fill `out`: (M, N) finished, or (split, M, N) partial sums; tiles come by Hopper's copy engine where it can."""
    (m, k), n = x.shape, weight.shape[0]
    kernel, operands = kernels.scaled_tiled, (x, weight)
    if config.kernel == "copied" and _has_aligned_rows(x) and _has_aligned_rows(weight):
        kernel = kernels.scaled_copied
        operands = (
            TensorDescriptor.from_tensor(x, [config.m, config.k]),
            TensorDescriptor.from_tensor(weight, [config.n, config.k]),
        )
    kernel[(ceil_div(n, config.n) * ceil_div(m, config.m), split)](
        *operands,
        *scales.for_kernel(),
        epilogue.bias,
        epilogue.residual,
        out,
        m,
        n,
        k,
        *scales.strides,
        epilogue.activation,
        config.m,
        config.n,
        config.k,
        split,
        _TILES_IN_BAND,
        num_warps=config.warps,
        num_stages=config.stages,
        **launch_options(x),
    )


def _has_aligned_rows(matrix: torch.Tensor) -> bool:
    """Whether all rows of codes begin at multiples of 16 bytes, as Hopper's copy engine needs them."""
    return matrix.shape[1] % 16 == 0 and matrix.data_ptr() % 16 == 0


def _scale_products(products: torch.Tensor, scales: Scales, epilogue: Epilogue, out: torch.Tensor) -> None:
    """Fill `out` (M, N) from sums of products of codes, (M, N) or over parts of K (split, M, N)."""
    (m, n), (rows, columns) = out.shape, (4, 256)
    kernels.scale_products[(ceil_div(n, columns), ceil_div(m, rows))](
        products,
        *scales.for_kernel(),
        epilogue.bias,
        epilogue.residual,
        out,
        m,
        n,
        *scales.strides,
        products.shape[0] if products.ndim == 3 else 1,
        epilogue.activation,
        rows,
        columns,
        num_warps=4,
        **launch_options(out),
    )


def _library_takes(m: int, n: int, k: int, weight: torch.Tensor) -> bool:
    """Whether cuBLAS multiplies codes of these sizes: `_int_mm` needs more than 16 rows, both need multiples."""
    multiple = 8 if weight.dtype == torch.int8 else 16
    return n % multiple == 0 and k % multiple == 0 and (m > 16 or weight.dtype != torch.int8)


def _by_library(
    x: torch.Tensor, weight: torch.Tensor, scales: Scales, epilogue: Epilogue, out: torch.Tensor
) -> torch.Tensor:
    """The product (M, N) of codes by cuBLAS."""
    if weight.dtype == torch.int8:
        _scale_products(torch._int_mm(x, weight.t()), scales, epilogue, out)
        return out
    return _float8_by_library(x, weight, scales, epilogue, out)


def _float8_by_library(
    x: torch.Tensor, weight: torch.Tensor, scales: Scales, epilogue: Epilogue, out: torch.Tensor
) -> torch.Tensor:
    """The scaled product by cuBLAS; the epilogue by it too if it is a bias only and the result bfloat16."""
    m, n = out.shape
    x_scale, weight_scale, bias = scales.x_scale, scales.weight_scale, epilogue.bias
    assert x_scale is not None
    if scales.strides[0] or scales.strides[2]:  # `_scaled_mm` takes a scale for each row of both, or one for all
        x_scale = x_scale.expand(m).contiguous().view(m, 1)
        weight_scale = weight_scale.expand(n).contiguous().view(1, n)
    complete = out.dtype == torch.bfloat16 and epilogue.residual is None and epilogue.activation == "none"
    product = torch._scaled_mm(
        x,
        weight.t(),
        x_scale,
        weight_scale,
        bias=bias.to(torch.bfloat16) if complete and bias is not None else None,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    if complete:
        return product
    add_splits(product, epilogue, out, 1)
    return out
