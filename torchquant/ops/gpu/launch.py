"""Which kernel runs a product, and its launch. Shapes: x (M, K), weight (N, K), residual and y (M, N).

No call waits for the GPU: everything that decides about a launch is known on the host.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from torchquant.ops.gpu import configs, kernels
from torchquant.ops.gpu.configs import Config
from torchquant.ops.gpu.packing import BLOCK, CHUNK

__all__ = ["convolution", "dequantize", "quantize_rows", "scaled", "weight_only"]

_INTERPRETED = triton.knobs.runtime.interpret  # Triton's interpreter knows no inline assembly
_EARLY = "early" in configs.TRIAL and not _INTERPRETED
_SPAN = 4096  # values that one program quantizes
_WIDEST_ROW = 8192  # values of a row held in registers


def _cut(n: int, size: int) -> int:
    return -(-n // size)


def _options(x: torch.Tensor) -> dict[str, bool]:
    """Options of every launch: where tried, a kernel begins on Hopper while the one in front ends, see `follow`."""
    if not _EARLY:
        return {"EARLY": False}
    early = _follows(x.device.index) if x.is_cuda else driver.active.get_current_target().arch >= 90
    return {"EARLY": early, "launch_pdl": early}


@functools.cache
def _follows(device: int) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 9


# weight only ----------------------------------------------------------------------------------------------------------


def weight_only(
    x: torch.Tensor,
    packed: torch.Tensor,
    params: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    bits: int,
    group_size: int,
    asymmetric: bool,
    activation: str,
    config: Config | None = None,
) -> torch.Tensor:
    """See `linears.weight_only_linear`; `config` overrides the choice by size."""
    x = x.contiguous()
    (m, k), n = x.shape, packed.shape[-2]
    out = x.new_empty(m, n)
    if m == 0:
        return out
    if config is None:
        config = configs.choose(f"w{bits}a16", m, n, k, x.device)
    epilogue = (bias, residual if residual is None else residual.contiguous())
    if config.kernel == "pipelined" and (k % 8 or x.data_ptr() % 16):  # the copy engine wants multiples of 16 bytes
        config = replace(config, kernel="tiled", m=min(config.m, 128), n=128, warps=8, stages=3)
    format = (n, k, group_size, asymmetric, bits)
    if config.kernel == "dequantize":
        weight = dequantize(packed, params, k, bits, group_size, asymmetric)
        if residual is None and activation == "none":
            return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        _add_splits(torch.mm(x, weight.t()), *epilogue, out, 1, activation)
    elif config.kernel == "direct":
        kernels.weight_only_direct[(_cut(n, config.n), _cut(m, config.m))](
            x,
            packed,
            _words(params),
            *epilogue,
            out,
            m,
            *format,
            activation,
            config.m,
            config.n,
            config.slices,
            config.stages,
            num_warps=config.slices,
            **_options(x),
        )
    elif config.kernel == "skinny":
        kernels.weight_only_skinny[(_cut(n, config.n), _cut(m, config.m))](
            x,
            packed,
            _words(params),
            *epilogue,
            out,
            m,
            *format,
            activation,
            config.m,
            config.n,
            config.slices,
            not _INTERPRETED,
            num_warps=config.warps,
            num_stages=config.stages,
            **_options(x),
        )
    else:
        _weight_only_by_tiles(x, packed, params, epilogue, out, format, activation, config)
    return out


def _weight_only_by_tiles(
    x: torch.Tensor,
    packed: torch.Tensor,
    params: torch.Tensor,
    epilogue: tuple[torch.Tensor | None, torch.Tensor | None],
    out: torch.Tensor,
    format: tuple[int, int, int, bool, int],
    activation: str,
    config: Config,
) -> None:
    """Fill `out`; `format`: outputs, inputs, group size, whether there are zero points, bits."""
    m, (n, k, group_size, _, bits) = x.shape[0], format
    split = min(config.slices, _cut(k, BLOCK))
    parts = out if split == 1 else x.new_empty(split, m, n, dtype=torch.float32)
    inside = epilogue if split == 1 else (None, None)
    tiles = _cut(n, config.n) * _cut(m, config.m)
    if config.kernel == "pipelined":
        programs = min(tiles * split, _multiprocessors(x.device) * (8 // config.warps))
        kernels.weight_only_pipelined[(programs,)](
            *_tiles(x, packed, params, config),
            *inside,
            parts,
            m,
            *format,
            activation,
            split,
            configs.pipelined_stages(config, bits, group_size),
            num_warps=config.warps,
            **_options(x),
        )
    else:
        kernels.weight_only_tiled[(tiles, split)](
            x,
            packed,
            _words(params),
            *inside,
            parts,
            m,
            *format,
            activation,
            config.m,
            config.n,
            split,
            not _INTERPRETED,
            num_warps=config.warps,
            num_stages=config.stages,
            **_options(x),
        )
    if split > 1:
        _add_splits(parts, *epilogue, out, split, activation)


def _tiles(
    x: torch.Tensor, packed: torch.Tensor, params: torch.Tensor, config: Config
) -> tuple[GluonDescriptor, GluonDescriptor, GluonDescriptor]:
    """What the copy engine has to know about the operands of `weight_only_pipelined`; see there."""
    layout = gl.NVMMASharedLayout
    return (
        GluonDescriptor.from_tensor(x, [config.m, BLOCK], layout(128, 16)),
        GluonDescriptor.from_tensor(packed.view(-1, CHUNK), [config.n, CHUNK], layout(64, 16)),
        GluonDescriptor.from_tensor(_words(params).view(-1), [config.n], layout(0, 32, rank=1)),
    )


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def dequantize(
    packed: torch.Tensor, params: torch.Tensor, k: int, bits: int, group_size: int, asymmetric: bool
) -> torch.Tensor:
    """The weight (N, k) in the dtype of its scales."""
    n = packed.shape[-2]
    weight = params.new_empty(n, k)
    rows = 32
    kernels.dequantize_weight[(_cut(n, rows), _cut(k, BLOCK))](
        packed,
        _words(params),
        weight,
        n,
        k,
        group_size,
        asymmetric,
        bits,
        rows,
        not _INTERPRETED,
        num_warps=4,
        **_options(packed),
    )
    return weight


def _words(params: torch.Tensor) -> torch.Tensor:
    """Each pair of scale and zero point as one int32."""
    return params.view(torch.int32)


def _add_splits(
    parts: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    split: int,
    activation: str,
) -> None:
    (m, n), (rows, columns) = out.shape, (4, 256)
    kernels.add_splits[(_cut(n, columns), _cut(m, rows))](
        parts, bias, residual, out, m, n, split, activation, rows, columns, num_warps=4, **_options(out)
    )


# codes by codes -------------------------------------------------------------------------------------------------------


def quantize_rows(
    x: torch.Tensor, dtype: torch.dtype, quant_min: float, quant_max: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `linears.quantize_rows`; x (M, K), scales (M,)."""
    x = x.contiguous()
    m, k = x.shape
    codes, scale = x.new_empty(m, k, dtype=dtype), x.new_empty(m, dtype=torch.float32)
    if m and k:
        width = min(triton.next_power_of_2(k), _WIDEST_ROW)
        warps = max(1, min(16, width // 512))
        kernels.quantize_rows[(m,)](
            x, codes, scale, k, quant_min, quant_max, eps, width, num_warps=warps, **_options(x)
        )
    return codes, scale


def _quantize_tensor(
    x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor, zero_point: torch.Tensor | None, low: float, high: float
) -> torch.Tensor:
    codes = torch.empty_like(x, dtype=dtype)
    grid = (_cut(x.numel(), _SPAN),)
    kernels.quantize_tensor[grid](x, codes, scale, zero_point, x.numel(), low, high, _SPAN, num_warps=8, **_options(x))
    return codes


def scaled(
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
    config: Config | None = None,
) -> torch.Tensor:
    """See `linears.scaled_linear`; x_scale and x_zero_point (M,) or (1,). `config` overrides the choice by size."""
    x, weight = x.contiguous(), weight.contiguous()
    (m, k), n = x.shape, weight.shape[0]
    out = x.new_empty(m, n, dtype=out_dtype)
    if m == 0:
        return out
    if config is None:
        config = configs.choose(_FORMAT[weight.dtype], m, n, k, x.device, library=_library_takes(m, n, k, weight))
    inside = config.kernel == "skinny" and config.quantizes
    if x.dtype != weight.dtype and not inside:
        if x_scale is None:
            x, x_scale = quantize_rows(x, weight.dtype, quant_min, quant_max, eps)
        else:
            x = _quantize_tensor(x, weight.dtype, x_scale, x_zero_point, quant_min, quant_max)
    residual = residual if residual is None else residual.contiguous()
    epilogue = (x_scale, x_zero_point, weight_scale, weight_sum, bias, residual)
    by_row = tuple(int(v is not None and v.numel() > 1) for v in (x_scale, x_zero_point, weight_scale))
    if config.kernel == "library":
        return _by_library(x, weight, *epilogue, out, by_row, activation)
    if config.kernel == "skinny":
        wide = min(triton.next_power_of_2(k), 2 * _WIDEST_ROW)
        kernels.scaled_skinny[(_cut(n, config.n), _cut(m, config.m))](
            x,
            weight,
            *epilogue,
            out,
            m,
            n,
            k,
            *by_row,
            quant_min,
            quant_max,
            eps,
            activation,
            config.m,
            config.n,
            config.k,
            config.slices,
            wide,
            num_warps=config.warps,
            num_stages=config.stages,
            **_options(x),
        )
    else:
        _scaled_by_tiles(x, weight, epilogue, out, by_row, activation, config)
    return out


def _scaled_by_tiles(
    x: torch.Tensor,
    weight: torch.Tensor,
    epilogue: tuple[torch.Tensor | None, ...],
    out: torch.Tensor,
    by_row: tuple[int, ...],
    activation: str,
    config: Config,
) -> None:
    """Fill `out` from codes x and weight."""
    (m, k), n = x.shape, weight.shape[0]
    kernel, x_tiles, tiles = kernels.scaled_tiled, x, weight
    split = min(config.slices, _cut(k, config.k))
    parts = out
    if split > 1:
        parts = out.new_empty(split, m, n, dtype=torch.int32 if weight.dtype == torch.int8 else torch.float32)
    if config.kernel == "copied" and _copied(x, weight):
        kernel = kernels.scaled_copied
        x_tiles = TensorDescriptor.from_tensor(x, [config.m, config.k])
        tiles = TensorDescriptor.from_tensor(weight, [config.n, config.k])
    kernel[(_cut(n, config.n) * _cut(m, config.m), split)](
        x_tiles,
        tiles,
        *epilogue,
        parts,
        m,
        n,
        k,
        *by_row,
        activation,
        config.m,
        config.n,
        config.k,
        split,
        8,
        num_warps=config.warps,
        num_stages=config.stages,
        **_options(x),
    )
    if split > 1:
        _scale_products(parts, epilogue, out, by_row, activation)


def _scale_products(
    products: torch.Tensor,
    epilogue: tuple[torch.Tensor | None, ...],
    out: torch.Tensor,
    by_row: tuple[int, ...],
    activation: str,
) -> None:
    """Finish a product of codes, (M, N) or in parts (split, M, N)."""
    (m, n), (rows, columns) = out.shape, (4, 256)
    kernels.scale_products[(_cut(n, columns), _cut(m, rows))](
        products,
        *epilogue,
        out,
        m,
        n,
        *by_row,
        products.shape[0] if products.ndim == 3 else 1,
        activation,
        rows,
        columns,
        num_warps=4,
        **_options(out),
    )


def _copied(*matrices: torch.Tensor) -> bool:
    """Whether Hopper's engine copies tiles of these codes: rows that begin on 16 bytes."""
    return all(t.shape[1] % 16 == 0 and t.data_ptr() % 16 == 0 for t in matrices)


_FORMAT = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


def _library_takes(m: int, n: int, k: int, weight: torch.Tensor) -> bool:
    """Whether cuBLAS multiplies codes of these sizes: `_int_mm` wants more than 16 rows, both want multiples."""
    multiple = 8 if weight.dtype == torch.int8 else 16
    return n % multiple == 0 and k % multiple == 0 and (m > 16 or weight.dtype != torch.int8)


def _by_library(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: Any,
    x_zero_point: torch.Tensor | None,
    weight_scale: torch.Tensor,
    weight_sum: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    by_row: tuple[int, ...],
    activation: str,
) -> torch.Tensor:
    """The product by cuBLAS, the rest by one kernel of ours where cuBLAS does not do it."""
    m, n = out.shape
    if weight.dtype == torch.int8:
        products = torch._int_mm(x, weight.t())
        epilogue = (x_scale, x_zero_point, weight_scale, weight_sum, bias, residual)
        _scale_products(products, epilogue, out, by_row, activation)
        return out
    if by_row[0] or by_row[2]:  # one factor a row for both, or one for all
        x_scale = x_scale.expand(m).contiguous().view(m, 1)
        weight_scale = weight_scale.expand(n).contiguous().view(1, n)
    plain = out.dtype == torch.bfloat16 and residual is None and activation == "none"
    product = torch._scaled_mm(
        x,
        weight.t(),
        x_scale,
        weight_scale,
        bias=bias.to(torch.bfloat16) if plain and bias is not None else None,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    if plain:
        return product
    _add_splits(product, bias, residual, out, 1, activation)
    return out


def convolution(
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
    out: torch.Tensor,
    config: Config | None = None,
) -> torch.Tensor:
    """See `convolutions.scaled_conv2d`; fills `out` (batch, OH, OW, N), contiguous."""
    x, weight = x.contiguous(), weight.contiguous()
    n, *kernel, c = weight.shape
    m = out.numel() // n
    if m == 0:
        return out
    if config is None:
        config = configs.convolution_by_rule(m, n)
    kernels.scaled_convolution[(_cut(n, config.n) * _cut(m, config.m),)](
        x,
        weight,
        x_scale,
        x_zero_point,
        weight_scale,
        weight_sum,
        bias,
        residual if residual is None else residual.contiguous(),
        out,
        m,
        n,
        *x.shape[1:3],
        *out.shape[1:3],
        c,
        *kernel,
        *stride,
        *padding,
        *dilation,
        int(weight_scale.numel() > 1),
        activation,
        config.m,
        config.n,
        config.k,
        num_warps=config.warps,
        num_stages=config.stages,
        **_options(x),
    )
    return out
