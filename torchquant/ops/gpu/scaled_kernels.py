"""Triton kernels of products of codes by codes: y = s_x s_w (Q_x - z) Q_w^T; see kernels.py."""

from __future__ import annotations

import triton
import triton.language as tl

from torchquant.ops.gpu.kernel_parts import LINES, fetch, finish, finish_or_store_part, follow
from torchquant.ops.gpu.quantizing_kernels import codes_by_row, codes_on_grid, largest_magnitude, row_scale

__all__ = ["scale_products", "scaled", "scaled_copied", "scaled_skinny", "scaled_tiled", "sum_dtype"]


@triton.jit
def _fetch_rows(weight, n, k, N, K: tl.constexpr, BN: tl.constexpr, EARLY: tl.constexpr):
    """Fetch what BN rows of weight (N, K), from n, hold from column k on."""
    if EARLY:
        i = tl.arange(0, LINES)
        row, column = tl.minimum(n + i // (LINES // BN), N - 1), tl.minimum(k + i % (LINES // BN) * 128, K - 1)
        fetch(weight + row.to(tl.int64) * K + column, EARLY)


@triton.constexpr_function
def sum_dtype(dtype):
    """In which tensor cores add up products of codes of `dtype`."""
    return tl.int32 if dtype == tl.int8 else tl.float32


@triton.jit
def _row_factor(values, m, M, stride):
    """The values of rows m of x, (BM,); `stride` is 1 where each row has one, 0 where all share one."""
    return tl.load(values + m * stride, mask=m < M, other=0)


@triton.jit
def scaled(acc, m, n, M, N, scales, strides):
    """x_scale weight_scale (acc - x_zero_point weight_sum) in float32.

    acc (BN, BM): products of codes for outputs n and rows m; scales: the four tensors, those of zero points or None;
    strides: of x_scale, x_zero_point and weight_scale, see `operands.Scales`.
    """
    x_scale, x_zero_point, weight_scale, weight_sum = scales
    scale_rows, zero_rows, weight_rows = strides
    if x_zero_point is not None:
        zero = _row_factor(x_zero_point, m, M, zero_rows).to(tl.int32)
        acc -= tl.load(weight_sum + n, mask=n < N, other=0)[:, None] * zero[None, :]
    by_output = tl.load(weight_scale + n * weight_rows, mask=n < N, other=0.0)
    return acc.to(tl.float32) * _row_factor(x_scale, m, M, scale_rows)[None, :] * by_output[:, None]


@triton.jit
def _row_scales(
    x,
    M,
    K: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    EPS: tl.constexpr,
    BM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The scales (BM,) float32 of this program's rows of x, from their largest magnitudes; EPS beyond the last row."""
    by_row = tl.full((BM,), EPS, tl.float32)
    for i in range(0, BM):  # one row at a time: often there is only one
        row = tl.program_id(1) * BM + i
        if row < M:
            most = row_scale(largest_magnitude(x + row.to(tl.int64) * K, K, WIDE), LOW, HIGH, EPS)
            by_row = tl.where(tl.arange(0, BM) == i, most, by_row)
    return by_row


@triton.jit
def _skinny_products(
    x,
    weight,
    scales,
    strides,
    m,
    n,
    M,
    N,
    K: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    EPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    S: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Scaled sums of products (BN, BM) float32 of codes over all of K, in S slices of it.

    x: codes, or floats that are quantized here, by rows if their scale is None; scales, strides: see `scaled`.
    """
    x_scale, x_zero_point, weight_scale, _ = scales
    D: tl.constexpr = weight.dtype.element_ty
    k = tl.arange(0, S)[:, None, None] * BK + tl.arange(0, BK)[None, None, :]
    kt = tl.arange(0, S)[:, None, None] * BK + tl.arange(0, BK)[None, :, None]
    rows = m.to(tl.int64) * K
    if x_scale is None:
        by_row = _row_scales(x, M, K, LOW, HIGH, EPS, BM, WIDE)
        inverse = (1.0 / by_row)[None, None, :]
    acc = tl.zeros((S, BN, BM), sum_dtype(D))
    at = n[None, :, None].to(tl.int64) * K
    for first in range(0, K, S * BK):
        w = tl.load(weight + at + (first + k), mask=(first + k < K) & (n < N)[None, :, None], other=0.0)
        inside = (first + kt < K) & (m < M)[None, None, :]
        values = tl.load(x + rows[None, None, :] + (first + kt), mask=inside, other=0.0)
        if x_scale is None:
            values = codes_by_row(values, inverse, D, LOW, HIGH)
        elif x.dtype.element_ty != D:
            values = codes_on_grid(values, x_scale, x_zero_point, D, LOW, HIGH)
        acc = tl.dot(w, values, acc, out_dtype=acc.dtype)
    total = tl.sum(acc, 0)
    if x_scale is None:
        by_output = tl.load(weight_scale + n * strides[2], mask=n < N, other=0.0)
        return total.to(tl.float32) * by_row[None, :] * by_output[:, None]
    else:
        return scaled(total, m, n, M, N, scales, strides)


@triton.jit(do_not_specialize=["M"])
def scaled_skinny(
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
    K: tl.constexpr,
    scale_rows: tl.constexpr,
    zero_rows: tl.constexpr,
    weight_rows: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    S: tl.constexpr,
    WIDE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """y (M, N) for few rows. x (M, K) codes, or floats that each program quantizes for itself.

    x_scale None: by row, from its largest magnitude, found WIDE values at a time. weight (N, K) int8 or float8_e4m3fn.
    Grid (ceil(N / BN), ceil(M / BM)).
    """
    _fetch_rows(weight, tl.program_id(0) * BN, 0, N, K, BN, EARLY)
    follow(EARLY)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    scales, strides = (x_scale, x_zero_point, weight_scale, weight_sum), (scale_rows, zero_rows, weight_rows)
    y = _skinny_products(x, weight, scales, strides, m, n, M, N, K, LOW, HIGH, EPS, BM, BN, BK, S, WIDE)
    finish(y, m, n, (n < N)[:, None] & (m < M)[None, :], bias, residual, out, N, ACTIVATION)


@triton.jit
def _band(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Where this program's tile is: the first tile of outputs of its band, how many there are in the band, its place.

    Places in a band, of up to GROUP tiles of outputs by all tiles of rows, count along the outputs first.
    """
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    band = tl.program_id(0) // (GROUP * tiles_m)
    width = tl.minimum(tiles_n - band * GROUP, GROUP)
    place = tl.program_id(0) % (GROUP * tiles_m)
    return band * GROUP, width, place


@triton.jit
def _end(acc, m, n, M, N, scales, strides, bias, residual, out, ACTIVATION: tl.constexpr, SPLIT: tl.constexpr):
    """Store a tile acc (BN, BM) of products, finished; or where K is split into this program's part (SPLIT, M, N)."""
    mask = (n < N)[:, None] & (m < M)[None, :]
    y = scaled(acc, m, n, M, N, scales, strides) if SPLIT == 1 else acc
    finish_or_store_part(y, m, n, mask, bias, residual, out, M, N, ACTIVATION, SPLIT)


@triton.jit(do_not_specialize=["M"])
def scaled_tiled(
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
    K: tl.constexpr,
    scale_rows: tl.constexpr,
    zero_rows: tl.constexpr,
    weight_rows: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    EARLY: tl.constexpr,
):
    """y (M, N) by tiles, for many rows; x (M, K) codes. GROUP tiles of N are walked at a time, so that x stays in L2.

    Grid (ceil(N / BN) * ceil(M / BM), SPLIT). With SPLIT > 1 out (SPLIT, M, N) in `sum_dtype` is for `scale_products`.
    """
    STRETCH: tl.constexpr = (K + SPLIT * BK - 1) // (SPLIT * BK) * BK
    first_tile, width, place = _band(M, N, BM, BN, GROUP)
    begin = tl.program_id(1) * STRETCH
    n0 = (first_tile + place % width) * BN
    _fetch_rows(weight, n0, begin, N, K, BN, EARLY)
    follow(EARLY)
    n, m, k = n0 + tl.arange(0, BN), place // width * BM + tl.arange(0, BM), tl.arange(0, BK)
    # indices beyond the matrices become 0, which needs no mask: their sums are never stored
    wp = weight + tl.where(n < N, n, 0)[:, None].to(tl.int64) * K + k[None, :]
    xp = x + tl.where(m < M, m, 0)[None, :].to(tl.int64) * K + k[:, None]
    acc = tl.zeros((BN, BM), sum_dtype(weight.dtype.element_ty))
    for step in range(0, STRETCH, BK):
        first = begin + step
        if K % (SPLIT * BK) == 0:
            w, values = tl.load(wp + first), tl.load(xp + first)
        else:
            w = tl.load(wp + first, mask=(first + k < K)[None, :], other=0.0)
            values = tl.load(xp + first, mask=(first + k < K)[:, None], other=0.0)
        acc = tl.dot(w, values, acc, out_dtype=acc.dtype)
    scales, strides = (x_scale, x_zero_point, weight_scale, weight_sum), (scale_rows, zero_rows, weight_rows)
    _end(acc, m, n, M, N, scales, strides, bias, residual, out, ACTIVATION, SPLIT)


@triton.jit(do_not_specialize=["M"])
def scaled_copied(
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
    K: tl.constexpr,
    scale_rows: tl.constexpr,
    zero_rows: tl.constexpr,
    weight_rows: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    EARLY: tl.constexpr,
):
    """As `scaled_tiled`, with tiles copied by the engine that Hopper has for it: x and weight are descriptors."""
    first_tile, width, place = _band(M, N, BM, BN, GROUP)
    n0, m0 = (first_tile + place % width) * BN, place // width * BM
    follow(EARLY)
    D: tl.constexpr = weight.dtype
    STRETCH: tl.constexpr = (K + SPLIT * BK - 1) // (SPLIT * BK) * BK
    acc = tl.zeros((BN, BM), sum_dtype(D))
    for step in range(0, STRETCH, BK):
        first = tl.program_id(1) * STRETCH + step
        w, values = weight.load([n0, first]), x.load([m0, first])
        acc = tl.dot(w, values.T, acc, out_dtype=acc.dtype)
    n, m = n0 + tl.arange(0, BN), m0 + tl.arange(0, BM)
    scales, strides = (x_scale, x_zero_point, weight_scale, weight_sum), (scale_rows, zero_rows, weight_rows)
    _end(acc, m, n, M, N, scales, strides, bias, residual, out, ACTIVATION, SPLIT)


@triton.jit(do_not_specialize=["M"])
def scale_products(
    products,
    x_scale,
    x_zero_point,
    weight_scale,
    weight_sum,
    bias,
    residual,
    out,
    M,
    N,
    scale_rows: tl.constexpr,
    zero_rows: tl.constexpr,
    weight_rows: tl.constexpr,
    SPLIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """y (M, N) from the sum of products (SPLIT, M, N) of codes, int32 or float32. Grid (ceil(N / BN), ceil(M / BM))."""
    follow(EARLY)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    mask = (n < N)[:, None] & (m < M)[None, :]
    at = m[None, :].to(tl.int64) * N + n[:, None]
    acc = tl.load(products + at, mask=mask, other=0)
    for i in tl.static_range(1, SPLIT):
        acc += tl.load(products + i * (M.to(tl.int64) * N) + at, mask=mask, other=0)
    scales, strides = (x_scale, x_zero_point, weight_scale, weight_sum), (scale_rows, zero_rows, weight_rows)
    y = scaled(acc, m, n, M, N, scales, strides)
    finish(y, m, n, mask, bias, residual, out, N, ACTIVATION)
