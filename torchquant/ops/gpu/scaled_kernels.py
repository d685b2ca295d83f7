"""Triton kernels of products of codes by codes: y = s_x s_w (Q_x - z) Q_w^T; see kernels.py."""

from __future__ import annotations

import triton
import triton.language as tl

from torchquant.ops.gpu.kernel_parts import LINES, clamp, fetch, finish, follow

__all__ = [
    "quantize_rows",
    "quantize_tensor",
    "scale_products",
    "scaled_convolution",
    "scaled_copied",
    "scaled_skinny",
    "scaled_tiled",
]


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """Float32 that lie on the grid's range, to its nearest codes, ties to even.

    Adding 1.5 * 2**23 leaves the integer in the lowest bits: a byte of it is the code. NaN is 0, as torch converts it.
    """
    if DTYPE == tl.int8:
        return tl.where(x == x, (x + 12582912.0).to(tl.int32, bitcast=True), 0).to(tl.int8)
    else:
        return x.to(DTYPE)


@triton.jit
def _by_row(x, inverse, DTYPE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Codes of x, times the inverse scales of its rows: only on an uneven grid can they leave it."""
    x = x.to(tl.float32) * inverse
    return _rounded(x if LOW + HIGH == 0 else tl.minimum(x, HIGH, tl.PropagateNan.ALL), DTYPE)


@triton.jit
def _on_grid(x, scale, zero_point, DTYPE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The codes of x for one scale and one zero point."""
    x = x.to(tl.float32) * (1.0 / tl.load(scale))
    if zero_point is None:
        return _rounded(clamp(x, LOW, HIGH), DTYPE)
    else:
        zero = tl.load(zero_point)
        x = clamp(x, LOW - zero.to(tl.float32), HIGH - zero.to(tl.float32))
        return tl.where(x == x, (x + 12582912.0).to(tl.int32, bitcast=True) + zero, 0).to(tl.int8)


@triton.jit
def _row_scale(largest, LOW: tl.constexpr, HIGH: tl.constexpr, EPS: tl.constexpr):
    """The scale of a row whose largest magnitude is given; EPS at least."""
    return tl.maximum(largest / ((HIGH - LOW) / 2), EPS, tl.PropagateNan.ALL)


@triton.jit
def _magnitude(x):
    """The bits of |x|: integers in the order of magnitudes, NaN above infinity; a maximum of floats would drop it."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _largest(x, K: tl.constexpr, WIDE: tl.constexpr):
    """The largest magnitude of K neighbours, WIDE at a time; NaN if one of them is."""
    k = tl.arange(0, WIDE)
    most = tl.zeros((WIDE,), tl.int32)
    for first in range(0, K, WIDE):
        part = tl.load(x + first + k, mask=first + k < K, other=0.0)
        most = tl.maximum(most, _magnitude(part))
    return tl.max(most, 0).to(tl.float32, bitcast=True)


@triton.jit
def quantize_rows(
    x,
    codes,
    scale,
    K: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    EPS: tl.constexpr,
    BK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """codes (M, K) and scale (M,) float32 of each row of x (M, K), symmetric. Grid (M,)."""
    D: tl.constexpr = codes.dtype.element_ty
    follow(EARLY)
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BK)
    if K <= BK:
        values = tl.load(x + row * K + k, mask=k < K, other=0.0)
        by_row = _row_scale(tl.max(_magnitude(values), 0).to(tl.float32, bitcast=True), LOW, HIGH, EPS)
        tl.store(codes + row * K + k, _by_row(values, 1.0 / by_row, D, LOW, HIGH), mask=k < K)
    else:
        by_row = _row_scale(_largest(x + row * K, K, BK), LOW, HIGH, EPS)
        for first in range(0, K, BK):
            part = tl.load(x + row * K + first + k, mask=first + k < K, other=0.0)
            at = codes + row * K + first + k
            tl.store(at, _by_row(part, 1.0 / by_row, D, LOW, HIGH), mask=first + k < K)
    tl.store(scale + row, by_row)


@triton.jit(do_not_specialize=["count"])
def quantize_tensor(
    x,
    codes,
    scale,
    zero_point,
    count,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SPAN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """codes of `count` values of x with the scale (1,) and zero point (1,) given. Grid (ceil(count / SPAN),)."""
    follow(EARLY)
    at = tl.program_id(0).to(tl.int64) * SPAN + tl.arange(0, SPAN)
    values = tl.load(x + at, mask=at < count, other=0.0)
    values = _on_grid(values, scale, zero_point, codes.dtype.element_ty, LOW, HIGH)
    tl.store(codes + at, values, mask=at < count)


@triton.jit
def _fetch_rows(weight, n, k, N, K: tl.constexpr, BN: tl.constexpr, EARLY: tl.constexpr):
    """Fetch what BN rows of weight (N, K), from n, hold from column k on."""
    if EARLY:
        i = tl.arange(0, LINES)
        row, column = tl.minimum(n + i // (LINES // BN), N - 1), tl.minimum(k + i % (LINES // BN) * 128, K - 1)
        fetch(weight + row.to(tl.int64) * K + column, EARLY)


@triton.jit
def _accumulator(S: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, DTYPE: tl.constexpr):
    if DTYPE == tl.int8:
        return tl.zeros((S, BN, BM), tl.int32)
    else:
        return tl.zeros((S, BN, BM), tl.float32)


@triton.jit
def _row_factor(values, m, M, rows):
    """One value a row of x, or the same for all: (BM,); `rows` is 1 where there is one a row, else 0."""
    return tl.load(values + m * rows, mask=m < M, other=0)


@triton.jit
def _scaled(acc, m, n, M, N, x_scale, x_zero_point, weight_scale, weight_sum, scale_rows, zero_rows, weight_rows):
    """s_x s_w (acc - z sum(Q_w)); acc (BN, BM)."""
    if x_zero_point is not None:
        zero = _row_factor(x_zero_point, m, M, zero_rows).to(tl.int32)
        acc -= tl.load(weight_sum + n, mask=n < N, other=0)[:, None] * zero[None, :]
    by_output = tl.load(weight_scale + n * weight_rows, mask=n < N, other=0.0)
    return acc.to(tl.float32) * _row_factor(x_scale, m, M, scale_rows)[None, :] * by_output[:, None]


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
    D: tl.constexpr = weight.dtype.element_ty
    _fetch_rows(weight, tl.program_id(0) * BN, 0, N, K, BN, EARLY)
    follow(EARLY)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    k = tl.arange(0, S)[:, None, None] * BK + tl.arange(0, BK)[None, None, :]
    kt = tl.arange(0, S)[:, None, None] * BK + tl.arange(0, BK)[None, :, None]
    rows = m.to(tl.int64) * K
    if x_scale is None:
        by_row = tl.full((BM,), EPS, tl.float32)
        for i in range(0, BM):  # a row at a time: often there is but one
            row = tl.program_id(1) * BM + i
            if row < M:
                most = _row_scale(_largest(x + row.to(tl.int64) * K, K, WIDE), LOW, HIGH, EPS)
                by_row = tl.where(tl.arange(0, BM) == i, most, by_row)
        inverse = (1.0 / by_row)[None, None, :]
    acc = _accumulator(S, BN, BM, D)
    at = n[None, :, None].to(tl.int64) * K
    for first in range(0, K, S * BK):
        w = tl.load(weight + at + (first + k), mask=(first + k < K) & (n < N)[None, :, None], other=0.0)
        inside = (first + kt < K) & (m < M)[None, None, :]
        values = tl.load(x + rows[None, None, :] + (first + kt), mask=inside, other=0.0)
        if x_scale is None:
            values = _by_row(values, inverse, D, LOW, HIGH)
        elif x.dtype.element_ty != D:
            values = _on_grid(values, x_scale, x_zero_point, D, LOW, HIGH)
        acc = tl.dot(w, values, acc, out_dtype=acc.dtype)
    total = tl.sum(acc, 0)
    if x_scale is None:
        by_output = tl.load(weight_scale + n * weight_rows, mask=n < N, other=0.0)
        y = total.to(tl.float32) * by_row[None, :] * by_output[:, None]
    else:
        y = _scaled(
            total, m, n, M, N, x_scale, x_zero_point, weight_scale, weight_sum, scale_rows, zero_rows, weight_rows
        )
    finish(y, m, n, (n < N)[:, None] & (m < M)[None, :], bias, residual, out, N, ACTIVATION)


@triton.jit
def _end(
    acc,
    m,
    n,
    M,
    N,
    x_scale,
    x_zero_point,
    weight_scale,
    weight_sum,
    bias,
    residual,
    out,
    scale_rows: tl.constexpr,
    zero_rows: tl.constexpr,
    weight_rows: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Store a tile acc (BN, BM) of products, finished; or where K is split into this program's part (SPLIT, M, N)."""
    mask = (n < N)[:, None] & (m < M)[None, :]
    if SPLIT == 1:
        y = _scaled(
            acc, m, n, M, N, x_scale, x_zero_point, weight_scale, weight_sum, scale_rows, zero_rows, weight_rows
        )
        finish(y, m, n, mask, bias, residual, out, N, ACTIVATION)
    else:
        part = out + tl.program_id(1).to(tl.int64) * M * N
        tl.store(part + m[None, :].to(tl.int64) * N + n[:, None], acc, mask=mask)


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

    Grid (ceil(N / BN) * ceil(M / BM), SPLIT). With SPLIT > 1 `out` are the products of a stretch of K each, (SPLIT, M,
    N) in the type in which tensor cores add up; `scale_products` does the rest.
    """
    D: tl.constexpr = weight.dtype.element_ty
    STRETCH: tl.constexpr = (K + SPLIT * BK - 1) // (SPLIT * BK) * BK
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    band = tl.program_id(0) // (GROUP * tiles_m)
    width = tl.minimum(tiles_n - band * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * tiles_m)
    begin = tl.program_id(1) * STRETCH
    _fetch_rows(weight, (band * GROUP + within % width) * BN, begin, N, K, BN, EARLY)
    follow(EARLY)
    n = (band * GROUP + within % width) * BN + tl.arange(0, BN)
    m = within // width * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    # rows beyond the matrix read its first ones instead: their sums are never stored
    wp = weight + tl.where(n < N, n, 0)[:, None].to(tl.int64) * K + k[None, :]
    xp = x + tl.where(m < M, m, 0)[None, :].to(tl.int64) * K + k[:, None]
    acc = tl.zeros((BN, BM), tl.int32 if D == tl.int8 else tl.float32)
    for step in range(0, STRETCH, BK):
        first = begin + step
        if K % (SPLIT * BK) == 0:
            w, values = tl.load(wp + first), tl.load(xp + first)
        else:
            w = tl.load(wp + first, mask=(first + k < K)[None, :], other=0.0)
            values = tl.load(xp + first, mask=(first + k < K)[:, None], other=0.0)
        acc = tl.dot(w, values, acc, out_dtype=acc.dtype)
    _end(
        acc,
        m,
        n,
        M,
        N,
        x_scale,
        x_zero_point,
        weight_scale,
        weight_sum,
        bias,
        residual,
        out,
        scale_rows,
        zero_rows,
        weight_rows,
        ACTIVATION,
        SPLIT,
    )


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
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    band = tl.program_id(0) // (GROUP * tiles_m)
    width = tl.minimum(tiles_n - band * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * tiles_m)
    n0, m0 = (band * GROUP + within % width) * BN, within // width * BM
    follow(EARLY)
    D: tl.constexpr = weight.dtype
    STRETCH: tl.constexpr = (K + SPLIT * BK - 1) // (SPLIT * BK) * BK
    acc = tl.zeros((BN, BM), tl.int32 if D == tl.int8 else tl.float32)
    for step in range(0, STRETCH, BK):
        first = tl.program_id(1) * STRETCH + step
        w, values = weight.load([n0, first]), x.load([m0, first])
        acc = tl.dot(w, values.T, acc, out_dtype=acc.dtype)
    n, m = n0 + tl.arange(0, BN), m0 + tl.arange(0, BM)
    _end(
        acc,
        m,
        n,
        M,
        N,
        x_scale,
        x_zero_point,
        weight_scale,
        weight_sum,
        bias,
        residual,
        out,
        scale_rows,
        zero_rows,
        weight_rows,
        ACTIVATION,
        SPLIT,
    )


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
    D: tl.constexpr = weight.dtype.element_ty
    K: tl.constexpr = KH * KW * C
    follow(EARLY)
    tiles_n = tl.cdiv(N, BN)  # neighbours read the same pixels
    n = tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)
    m = tl.program_id(0) // tiles_n * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    image, top, left = m // (OH * OW), m // OW % OH * stride_h - padding_h, m % OW * stride_w - padding_w
    pixels = image.to(tl.int64) * H * W
    wp = weight + tl.where(n < N, n, 0)[:, None].to(tl.int64) * K + k[None, :]
    acc = tl.zeros((BN, BM), tl.int32 if D == tl.int8 else tl.float32)
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
    if x_zero_point is not None:
        zero = tl.load(x_zero_point)
        for tap in range(KH * KW):  # not unrolled: the windows of patches are large
            y, z = top + tap // KW * dilation_h, left + tap % KW * dilation_w
            inside = (y >= 0) & (y < H) & (z >= 0) & (z < W)
            sums = tl.load(weight_sum + n * (KH * KW) + tap, mask=n < N, other=0) * zero
            acc -= tl.where(inside[None, :], sums[:, None], 0)
    y = _scaled(acc, m, n, M, N, x_scale, None, weight_scale, None, 0, 0, weight_rows)
    finish(y, m, n, (n < N)[:, None] & (m < M)[None, :], bias, residual, out, N, ACTIVATION)


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
    y = _scaled(acc, m, n, M, N, x_scale, x_zero_point, weight_scale, weight_sum, scale_rows, zero_rows, weight_rows)
    finish(y, m, n, mask, bias, residual, out, N, ACTIVATION)
