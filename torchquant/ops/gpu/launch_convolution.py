"""The launch of convolutions of codes by codes."""

from __future__ import annotations

import torch

from torchquant.ops.gpu import configs, kernels
from torchquant.ops.gpu.configs import Config
from torchquant.ops.gpu.launch_options import ceil_div, launch_options
from torchquant.ops.gpu.operands import ConvolutionParams, Epilogue, Scales

__all__ = ["convolution"]


def convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: Scales,
    epilogue: Epilogue,
    params: ConvolutionParams,
    out: torch.Tensor,
    config: Config | None = None,
) -> torch.Tensor:
    """See `convolutions.scaled_conv2d`; fills `out` (batch, OH, OW, N), contiguous."""
    x, weight = x.contiguous(), weight.contiguous()
    n, *kernel_size, channels = weight.shape
    m = out.numel() // n
    if m == 0:
        return out
    if config is None:
        config = configs.convolution_by_rule(m, n)
    epilogue = epilogue.by_rows(n)
    kernels.scaled_convolution[(ceil_div(n, config.n) * ceil_div(m, config.m),)](
        x,
        weight,
        *scales.for_kernel(),
        epilogue.bias,
        epilogue.residual,
        out,
        m,
        n,
        *x.shape[1:3],
        *out.shape[1:3],
        channels,
        *kernel_size,
        *params.stride,
        *params.padding,
        *params.dilation,
        scales.strides[2],
        epilogue.activation,
        config.m,
        config.n,
        config.k,
        num_warps=config.warps,
        num_stages=config.stages,
        **launch_options(x),
    )
    return out
