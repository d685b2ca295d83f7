"""Launches of products of float activations by packed weights. Shapes: x (M, K), weight (N, K), y (M, N)."""

from __future__ import annotations

from dataclasses import replace

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from torchquant.ops.gpu import configs, kernels
from torchquant.ops.gpu.configs import Config
from torchquant.ops.gpu.launch_options import INTERPRETED, ceil_div, launch_options, multiprocessors
from torchquant.ops.gpu.operands import Epilogue, PackedWeight
from torchquant.ops.gpu.packing import BLOCK, CHUNK

__all__ = ["add_splits", "dequantize", "weight_only"]


def weight_only(
    x: torch.Tensor, weight: PackedWeight, epilogue: Epilogue, config: Config | None = None
) -> torch.Tensor:
    """See `linears.weight_only_linear`; returns (M, N) in x's dtype. `config` overrides the choice by size."""
    x = x.contiguous()
    (m, k), n = x.shape, weight.outputs
    out = x.new_empty(m, n)
    if m == 0:
        return out
    if config is None:
        config = configs.choose(f"w{weight.bits}a16", m, n, k, x.device)
    epilogue = epilogue.by_rows(n)
    if config.kernel == "pipelined" and (k % 8 or x.data_ptr() % 16):  # Hopper's copy engine needs rows of 16 n bytes
        config = replace(config, kernel="tiled", m=min(config.m, 128), n=128, warps=8, stages=3)
    if config.kernel == "dequantize":
        return _by_float_weight(x, weight, epilogue, out)
    if config.kernel == "direct":
        _direct(x, weight, epilogue, out, config)
    elif config.kernel == "skinny":
        _skinny(x, weight, epilogue, out, config)
    else:
        _by_tiles(x, weight, epilogue, out, config)
    return out


def _direct(x: torch.Tensor, weight: PackedWeight, epilogue: Epilogue, out: torch.Tensor, config: Config) -> None:
    """Fill `out` by the kernel that loads codes into registers, past shared memory."""
    (m, n), k = out.shape, x.shape[1]
    kernels.weight_only_direct[(ceil_div(n, config.n), ceil_div(m, config.m))](
        x,
        weight.packed,
        _words(weight.params),
        epilogue.bias,
        epilogue.residual,
        out,
        m,
        *_format(weight, k),
        epilogue.activation,
        config.m,
        config.n,
        config.slices,
        config.stages,
        num_warps=config.slices,
        **launch_options(x),
    )


def _skinny(x: torch.Tensor, weight: PackedWeight, epilogue: Epilogue, out: torch.Tensor, config: Config) -> None:
    """Fill `out` by the kernel for few rows."""
    (m, n), k = out.shape, x.shape[1]
    kernels.weight_only_skinny[(ceil_div(n, config.n), ceil_div(m, config.m))](
        x,
        weight.packed,
        _words(weight.params),
        epilogue.bias,
        epilogue.residual,
        out,
        m,
        *_format(weight, k),
        epilogue.activation,
        config.m,
        config.n,
        config.slices,
        not INTERPRETED,
        num_warps=config.warps,
        num_stages=config.stages,
        **launch_options(x),
    )


def _by_tiles(x: torch.Tensor, weight: PackedWeight, epilogue: Epilogue, out: torch.Tensor, config: Config) -> None:
    """Fill `out` by a kernel for many rows; with K split, by float32 sums (split, M, N) that are added afterwards."""
    split = min(config.slices, ceil_div(x.shape[1], BLOCK))
    launch = _pipelined if config.kernel == "pipelined" else _tiled
    if split == 1:
        launch(x, weight, epilogue, out, split, config)
        return
    partial_sums = x.new_empty(split, *out.shape, dtype=torch.float32)
    launch(x, weight, replace(epilogue, bias=None, residual=None), partial_sums, split, config)
    add_splits(partial_sums, epilogue, out, split)


def _tiled(
    x: torch.Tensor, weight: PackedWeight, epilogue: Epilogue, out: torch.Tensor, split: int, config: Config
) -> None:
    """Fill `out`, (M, N) or (split, M, N)."""
    (m, k), n = x.shape, weight.outputs
    kernels.weight_only_tiled[(ceil_div(n, config.n) * ceil_div(m, config.m), split)](
        x,
        weight.packed,
        _words(weight.params),
        epilogue.bias,
        epilogue.residual,
        out,
        m,
        *_format(weight, k),
        epilogue.activation,
        config.m,
        config.n,
        split,
        not INTERPRETED,
        num_warps=config.warps,
        num_stages=config.stages,
        **launch_options(x),
    )


def _pipelined(
    x: torch.Tensor, weight: PackedWeight, epilogue: Epilogue, out: torch.Tensor, split: int, config: Config
) -> None:
    """Fill `out`, (M, N) or (split, M, N), by as many programs as the GPU runs at once."""
    (m, k), n = x.shape, weight.outputs
    tiles = ceil_div(n, config.n) * ceil_div(m, config.m) * split
    programs = min(tiles, multiprocessors(x.device) * (8 // config.warps))
    kernels.weight_only_pipelined[(programs,)](
        *_descriptors(x, weight, config),
        epilogue.bias,
        epilogue.residual,
        out,
        m,
        *_format(weight, k),
        epilogue.activation,
        split,
        configs.pipelined_stages(config, weight.bits, weight.group_size),
        num_warps=config.warps,
        **launch_options(x),
    )


def _descriptors(
    x: torch.Tensor, weight: PackedWeight, config: Config
) -> tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor]:
    """How Hopper's copy engine reads the operands of `weight_only_pipelined`; see there."""
    layout = gl.NVMMASharedLayout
    return (
        TensorDescriptor.from_tensor(x, [config.m, BLOCK], layout(128, 16)),
        TensorDescriptor.from_tensor(weight.packed.view(-1, CHUNK), [config.n, CHUNK], layout(64, 16)),
        TensorDescriptor.from_tensor(_words(weight.params).view(-1), [config.n], layout(0, 32, rank=1)),
    )


def _by_float_weight(x: torch.Tensor, weight: PackedWeight, epilogue: Epilogue, out: torch.Tensor) -> torch.Tensor:
    """The product by cuBLAS, with the weight in floats; the epilogue by it too if it is a bias only."""
    floats, bias = dequantize(weight, x.shape[1]), epilogue.bias
    if epilogue.residual is None and epilogue.activation == "none":
        return torch.nn.functional.linear(x, floats, None if bias is None else bias.to(x.dtype))
    add_splits(torch.mm(x, floats.t()), epilogue, out, 1)
    return out


def dequantize(weight: PackedWeight, k: int) -> torch.Tensor:
    """The weight (N, k) in the dtype of its scales."""
    n, rows = weight.outputs, 32
    floats = weight.params.new_empty(n, k)
    kernels.dequantize_weight[(ceil_div(n, rows), ceil_div(k, BLOCK))](
        weight.packed,
        _words(weight.params),
        floats,
        *_format(weight, k),
        rows,
        not INTERPRETED,
        num_warps=4,
        **launch_options(weight.packed),
    )
    return floats


def add_splits(partial_sums: torch.Tensor, epilogue: Epilogue, out: torch.Tensor, split: int) -> None:
    """Fill `out` (M, N) from sums over parts of K, (split, M, N) or for one part (M, N)."""
    (m, n), (rows, columns) = out.shape, (4, 256)
    kernels.add_splits[(ceil_div(n, columns), ceil_div(m, rows))](
        partial_sums,
        epilogue.bias,
        epilogue.residual,
        out,
        m,
        n,
        split,
        epilogue.activation,
        rows,
        columns,
        num_warps=4,
        **launch_options(out),
    )


def _format(weight: PackedWeight, k: int) -> tuple[int, int, int, bool, int]:
    """N, K, G, ZERO and BITS of the kernels."""
    return weight.outputs, k, weight.group_size, weight.asymmetric, weight.bits


def _words(params: torch.Tensor) -> torch.Tensor:
    """Each pair of scale and zero point as one int32."""
    return params.view(torch.int32)
