"""Triton kernels that quantize activations, and the parts of them that products use too; see kernels.py."""

from __future__ import annotations

import triton
import triton.language as tl

from torchquant.ops.gpu.kernel_parts import clamp, follow

__all__ = ["codes_by_row", "codes_on_grid", "largest_magnitude", "quantize_rows", "quantize_tensor", "row_scale"]


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """The nearest codes, ties to even, of float32 values within the range of codes.

    Adding 1.5 * 2**23 leaves the integer in the lowest bits: a byte of it is the code. NaN is 0, as torch converts it.
    """
    if DTYPE == tl.int8:
        return tl.where(x == x, (x + 12582912.0).to(tl.int32, bitcast=True), 0).to(tl.int8)
    else:
        return x.to(DTYPE)


@triton.jit
def codes_by_row(x, inverse, DTYPE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Codes of x for inverse scales of its rows; only a grid with more codes below 0 than above can be exceeded."""
    x = x.to(tl.float32) * inverse
    return _rounded(x if LOW + HIGH == 0 else tl.minimum(x, HIGH, tl.PropagateNan.ALL), DTYPE)


@triton.jit
def codes_on_grid(x, scale, zero_point, DTYPE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The codes of x for one scale and one zero point."""
    x = x.to(tl.float32) * (1.0 / tl.load(scale))
    if zero_point is None:
        return _rounded(clamp(x, LOW, HIGH), DTYPE)
    else:
        zero = tl.load(zero_point)
        x = clamp(x, LOW - zero.to(tl.float32), HIGH - zero.to(tl.float32))
        return tl.where(x == x, (x + 12582912.0).to(tl.int32, bitcast=True) + zero, 0).to(tl.int8)


@triton.jit
def row_scale(largest, LOW: tl.constexpr, HIGH: tl.constexpr, EPS: tl.constexpr):
    """The scale of a row whose largest magnitude is given; EPS at least."""
    return tl.maximum(largest / ((HIGH - LOW) / 2), EPS, tl.PropagateNan.ALL)


@triton.jit
def _magnitude(x):
    """The bits of |x|: integers in the order of magnitudes, NaN above infinity; a maximum of floats would drop it."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def largest_magnitude(x, K: tl.constexpr, WIDE: tl.constexpr):
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
        by_row = row_scale(tl.max(_magnitude(values), 0).to(tl.float32, bitcast=True), LOW, HIGH, EPS)
        tl.store(codes + row * K + k, codes_by_row(values, 1.0 / by_row, D, LOW, HIGH), mask=k < K)
    else:
        by_row = row_scale(largest_magnitude(x + row * K, K, BK), LOW, HIGH, EPS)
        for first in range(0, K, BK):
            part = tl.load(x + row * K + first + k, mask=first + k < K, other=0.0)
            at = codes + row * K + first + k
            tl.store(at, codes_by_row(part, 1.0 / by_row, D, LOW, HIGH), mask=first + k < K)
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
    values = codes_on_grid(values, scale, zero_point, codes.dtype.element_ty, LOW, HIGH)
    tl.store(codes + at, values, mask=at < count)
