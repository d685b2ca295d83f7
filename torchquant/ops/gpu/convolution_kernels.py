"""Triton kernel of convolutions of codes by codes; see kernels.py."""

from __future__ import annotations

import triton
import triton.language as tl

from torchquant.ops.gpu.kernel_parts import finish, follow
from torchquant.ops.gpu.scaled_kernels import scaled, sum_dtype

__all__ = ["scaled_convolution"]


@triton.jit
def _window_products(
    x,
    weight,
    corners,
    dilation,
    m,
    n,
    M,
    N,
    H,
    W,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Sums of products (BN, BM) of the weight's outputs n and the windows of pixels m; zeros lie around the image.

    corners: of each window (BM,) the first pixel of its image, and the row and column in it where the window begins.
    """
    D: tl.constexpr = weight.dtype.element_ty
    K: tl.constexpr = KH * KW * C
    pixels, top, left = corners
    dilation_h, dilation_w = dilation
    k = tl.arange(0, BK)
    wp = weight + tl.where(n < N, n, 0)[:, None].to(tl.int64) * K + k[None, :]
    acc = tl.zeros((BN, BM), sum_dtype(D))
    for first in range(0, K, BK):
        c, tap = (first + k) % C, (first + k) // C
        y = top[None, :] + (tap // KW * dilation_h)[:, None]
        z = left[None, :] + (tap % KW * dilation_w)[:, None]
        inside = (y >= 0) & (y < H) & (z >= 0) & (z < W) & (m < M)[None, :]
        at = (pixels[None, :] + y * W + z) * C + c[:, None]
        if K % BK == 0:
            w, values = tl.load(wp + first), tl.load(x + at, mask=inside, other=0.0)
        else:
            w = tl.load(wp + first, mask=(first + k < K)[None, :], other=0.0)
            values = tl.load(x + at, mask=inside & (first + k < K)[:, None], other=0.0)
        acc = tl.dot(w, values, acc, out_dtype=acc.dtype)
    return acc


@triton.jit
def _without_zero_point(
    acc, x_zero_point, weight_sum, top, left, dilation, n, N, H, W, KH: tl.constexpr, KW: tl.constexpr
):
    """acc (BN, BM) less the zero point's products, which only the taps on the image have."""
    dilation_h, dilation_w = dilation
    zero = tl.load(x_zero_point)
    for tap in range(KH * KW):  # not unrolled: patch embeddings have large windows
        y, z = top + tap // KW * dilation_h, left + tap % KW * dilation_w
        inside = (y >= 0) & (y < H) & (z >= 0) & (z < W)
        sums = tl.load(weight_sum + n * (KH * KW) + tap, mask=n < N, other=0) * zero
        acc -= tl.where(inside[None, :], sums[:, None], 0)
    return acc


@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW"])
def scaled_convolution(
    x,
    weight,
    x_scale,
    x_zero_point,
    weight_scale,
    weight_sum,
    bias,
    residual,
    out,
    M,
    N,
    H,
    W,
    OH,
    OW,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    stride_h: tl.constexpr,
    stride_w: tl.constexpr,
    padding_h: tl.constexpr,
    padding_w: tl.constexpr,
    dilation_h: tl.constexpr,
    dilation_w: tl.constexpr,
    weight_rows: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A convolution as the product of its weight (N, KH * KW * C) and windows that are never written out.

    x (batch, H, W, C) codes; out (M, N) with M = batch * OH * OW; weight_sum (N, KH * KW) goes with x_zero_point, which
    is taken off where the window lies on the image. Grid (ceil(N / BN) * ceil(M / BM),).
    """
    follow(EARLY)
    tiles_n = tl.cdiv(N, BN)  # programs that follow each other read the same pixels
    n = tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)
    m = tl.program_id(0) // tiles_n * BM + tl.arange(0, BM)
    image, top, left = m // (OH * OW), m // OW % OH * stride_h - padding_h, m % OW * stride_w - padding_w
    corners, dilation = (image.to(tl.int64) * H * W, top, left), (dilation_h, dilation_w)
    acc = _window_products(x, weight, corners, dilation, m, n, M, N, H, W, C, KH, KW, BM, BN, BK)
    if x_zero_point is not None:
        acc = _without_zero_point(acc, x_zero_point, weight_sum, top, left, dilation, n, N, H, W, KH, KW)
    y = scaled(acc, m, n, M, N, (x_scale, None, weight_scale, None), (0, 0, weight_rows))
    finish(y, m, n, (n < N)[:, None] & (m < M)[None, :], bias, residual, out, N, ACTIVATION)
