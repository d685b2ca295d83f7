"""Triton kernels for linears with quantized weights on NVIDIA GPUs (sm_80 and later).

Legend: x (M, K) activations, W (N, K) weights, y (M, N). All kernels compute the transposed product, W x^T, so that the
weights are the operand that tensor cores take from registers: codes are unpacked in the layout in which they are
multiplied, and no unpacked weight ever passes through shared memory.

Two forms of each product:

- *skinny*, for few rows of x: one program computes BN outputs over all of K, its S warps (or groups of warps) each a
  slice of K, and adds their sums in the end. No second kernel, no atomics, no workspace: deterministic by construction.
- *tiled*, for many rows: BN x BM tiles, with K split over SPLIT programs where there are few tiles; their float32 sums
  go to a workspace that `add_splits` adds up in a fixed order.

M is never specialized on: one compiled kernel serves every M. K is a constant of the kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torchquant.ops.gpu import packing

__all__ = [
    "add_splits",
    "dequantize_weight",
    "quantize_rows",
    "quantize_tensor",
    "scale_products",
    "scaled_convolution",
    "scaled_skinny",
    "scaled_tiled",
    "weight_only_skinny",
    "weight_only_tiled",
]

_CONSTANT = (
    int if triton.knobs.runtime.interpret else tl.constexpr
)  # the interpreter does arithmetic with plain numbers
CHUNK = _CONSTANT(packing.CHUNK)  # neighbours on K that are packed side by side; see packing.py
BLOCK = _CONSTANT(packing.BLOCK)  # codes along K in a packed block


# the parts ----------------------------------------------------------------------------------------------------------


@triton.jit
def _activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        y = tl.maximum(y, 0.0)
    elif ACTIVATION == "relu6":
        y = tl.minimum(tl.maximum(y, 0.0), 6.0)
    elif ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
    return y


@triton.jit
def _finish(y, m, n, mask, bias, residual, out, N, ACTIVATION: tl.constexpr):
    """Store activation(y + bias + residual); y (BN, BM) float32, out (M, N)."""
    at = m[None, :].to(tl.int64) * N + n[:, None]
    if bias is not None:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if residual is not None:
        y += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, _activate(y, ACTIVATION).to(out.dtype.element_ty), mask=mask)


@triton.constexpr_function
def _offset(dtype):
    """What `_nibbles` returns for the signed code 0."""
    return {tl.bfloat16: 136.0, tl.float16: 1032.0}.get(dtype, 8.0)


@triton.jit
def _nibbles(words, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The four codes in each int16, as DTYPE, each plus `_offset(DTYPE)`.

    A float with the exponent in which one unit in the last place is 1 (128 in bfloat16, 1024 in float16) takes a
    nibble in its mantissa: one `and` and `or` for two codes, instead of conversions.
    """
    if ASM and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t;
            lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
            shr.u32 t, $4, 4;
            lop3.b32 $1, t, 0x000F000F, 0x43004300, 0xEA;
            shr.u32 t, $4, 8;
            lop3.b32 $2, t, 0x000F000F, 0x43004300, 0xEA;
            shr.u32 t, $4, 12;
            lop3.b32 $3, t, 0x000F000F, 0x43004300, 0xEA;
            }
            """,
            "=r,=r,=r,=r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    elif ASM and DTYPE == tl.float16:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t;
            lop3.b32 $0, $4, 0x000F000F, 0x64006400, 0xEA;
            shr.u32 t, $4, 4;
            lop3.b32 $1, t, 0x000F000F, 0x64006400, 0xEA;
            shr.u32 t, $4, 8;
            lop3.b32 $2, t, 0x000F000F, 0x64006400, 0xEA;
            shr.u32 t, $4, 12;
            lop3.b32 $3, t, 0x000F000F, 0x64006400, 0xEA;
            }
            """,
            "=r,=r,=r,=r,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        base: tl.constexpr = _offset(DTYPE) - 8.0
        w0 = (words & 15).to(DTYPE) + base
        w1 = ((words >> 4) & 15).to(DTYPE) + base
        w2 = ((words >> 8) & 15).to(DTYPE) + base
        w3 = ((words >> 12) & 15).to(DTYPE) + base
        return w0, w1, w2, w3


# weight only: y = x (s (Q - z))^T ------------------------------------------------------------------------------------


@triton.jit
def _codes(packed, at, block, N, mask, DTYPE: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Four chunks of the codes of a packed block as DTYPE, each plus `_shift(DTYPE, BITS)`."""
    if BITS == 4:
        words = tl.load(packed + block * (N * CHUNK) + at, mask=mask, other=0)
        w0, w1, w2, w3 = _nibbles(words, DTYPE, ASM)
        return w0, w1, w2, w3
    else:
        first = packed + block * (N * BLOCK) + at
        w0 = tl.load(first, mask=mask, other=0).to(DTYPE)
        w1 = tl.load(first + N * CHUNK, mask=mask, other=0).to(DTYPE)
        w2 = tl.load(first + 2 * N * CHUNK, mask=mask, other=0).to(DTYPE)
        w3 = tl.load(first + 3 * N * CHUNK, mask=mask, other=0).to(DTYPE)
        return w0, w1, w2, w3


@triton.constexpr_function
def _shift(dtype, bits):
    return _offset(dtype) if bits == 4 else 0.0


@triton.jit
def _of_chunk(params, block, i: tl.constexpr, n, N, mask, K: tl.constexpr, G: tl.constexpr):
    """The words that hold scale and zero point of chunk `i` of a block, for outputs n.

    Of four bytes, since nothing smaller can be copied to shared memory ahead of its use.
    """
    k = block * BLOCK + (0 if G % BLOCK == 0 else i * CHUNK)
    return tl.load(params + (k // G) * N + n, mask=mask & (k < K), other=0)


@triton.jit
def _of_block(params, block, n, N, mask, K: tl.constexpr, G: tl.constexpr):
    return (
        _of_chunk(params, block, 0, n, N, mask, K, G),
        _of_chunk(params, block, 1, n, N, mask, K, G),
        _of_chunk(params, block, 2, n, N, mask, K, G),
        _of_chunk(params, block, 3, n, N, mask, K, G),
    )


@triton.jit
def _scale(words, DTYPE: tl.constexpr):
    return (words & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)


@triton.jit
def _values(w, words, SHIFT: tl.constexpr, ZERO: tl.constexpr):
    """(w - SHIFT - zero point) scale in w's dtype; `words` has one axis less than w."""
    if ZERO:
        w = w - tl.expand_dims(_scale(words >> 16, w.dtype) + SHIFT, -1)  # exact: integers
    else:
        w = w - SHIFT
    return w * tl.expand_dims(_scale(words, w.dtype), -1)


@triton.jit(do_not_specialize=["M"])
def weight_only_skinny(
    x,
    packed,
    qparams,
    bias,
    residual,
    out,
    M,
    N,
    K: tl.constexpr,
    G: tl.constexpr,
    ZERO: tl.constexpr,
    BITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    S: tl.constexpr,
    ASM: tl.constexpr,
):
    """y (M, N). Without zero points the integers are multiplied exactly and each group's sum is scaled in float32.

    x (M, K); packed as `pack_weight` makes it; qparams as `pack_params` makes it; grid (ceil(N / BN), ceil(M / BM)).
    """
    D: tl.constexpr = x.dtype.element_ty
    SHIFT: tl.constexpr = _shift(D, BITS)
    BLOCKS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    REGULAR: tl.constexpr = (
        G % BLOCK == 0 or BLOCK % G == 0
    )  # groups end where chunks or blocks do, in all blocks alike
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    s = tl.arange(0, S)
    j = tl.arange(0, CHUNK)
    at = n[None, :, None] * CHUNK + j[None, None, :]
    rows = m[None, None, :].to(tl.int64) * K
    acc = tl.zeros((S, BN, BM), tl.float32)
    ahead = (s < BLOCKS)[:, None] & (n < N)[None, :]
    p0, p1, p2, p3 = _of_block(qparams, s[:, None], n[None, :], N, ahead, K, G)
    for first in range(0, BLOCKS, S):
        block = first + s
        mask = (block < BLOCKS)[:, None] & (n < N)[None, :]
        w0, w1, w2, w3 = _codes(packed, at, block[:, None, None], N, mask[:, :, None], D, BITS, ASM)
        ahead = (block + S < BLOCKS)[:, None] & (n < N)[None, :]
        q0, q1, q2, q3 = _of_block(qparams, (block + S)[:, None], n[None, :], N, ahead, K, G)
        part = tl.zeros((S, BN, BM), tl.float32)
        for i in tl.static_range(4):
            w = w0 if i == 0 else (w1 if i == 1 else (w2 if i == 2 else w3))
            k = block[:, None, None] * BLOCK + i * CHUNK + j[None, :, None]
            values = tl.load(x + rows + k, mask=(k < K) & (m < M)[None, None, :], other=0.0)
            if ZERO:
                words = _of_chunk(qparams, block[:, None], i, n[None, :], N, mask, K, G)
                acc = tl.dot(_values(w, words, SHIFT, ZERO), values, acc)
            else:
                part = tl.dot(w - SHIFT, values, part)
                if i == 3 or (i + 1) * CHUNK % G == 0 or not REGULAR:
                    words = p0 if i == 0 else (p1 if i == 1 else (p2 if i == 2 else p3))
                    acc += part * _scale(words, D).to(tl.float32)[:, :, None]
                    part = tl.zeros((S, BN, BM), tl.float32)
        p0, p1, p2, p3 = q0, q1, q2, q3
    mask = (n < N)[:, None] & (m < M)[None, :]
    _finish(tl.sum(acc, 0), m, n, mask, bias, residual, out, N, ACTIVATION)


@triton.jit(do_not_specialize=["M"])
def weight_only_tiled(
    x,
    packed,
    qparams,
    bias,
    residual,
    out,
    M,
    N,
    K: tl.constexpr,
    G: tl.constexpr,
    ZERO: tl.constexpr,
    BITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
    ASM: tl.constexpr,
):
    """As `weight_only_skinny`, by tiles; weights are scaled in x's dtype, before the product.

    Grid (ceil(N / BN) * ceil(M / BM), SPLIT). With SPLIT > 1 `out` is a float32 workspace (SPLIT, M, N).
    """
    D: tl.constexpr = x.dtype.element_ty
    SHIFT: tl.constexpr = _shift(D, BITS)
    BLOCKS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    tiles_m = tl.cdiv(M, BM)
    n = tl.program_id(0) // tiles_m * BN + tl.arange(0, BN)
    m = tl.program_id(0) % tiles_m * BM + tl.arange(0, BM)
    j = tl.arange(0, CHUNK)
    at = n[:, None] * CHUNK + j[None, :]
    rows = m[None, :].to(tl.int64) * K
    mask_n = n < N
    acc = tl.zeros((BN, BM), tl.float32)
    for step in range(0, (BLOCKS + SPLIT - 1) // SPLIT):
        block = step * SPLIT + tl.program_id(1)
        mask_w = mask_n if BLOCKS % SPLIT == 0 else mask_n & (block < BLOCKS)
        w0, w1, w2, w3 = _codes(packed, at, block, N, mask_w[:, None], D, BITS, ASM)
        for i in tl.static_range(4):
            w = w0 if i == 0 else (w1 if i == 1 else (w2 if i == 2 else w3))
            words = _of_chunk(qparams, block, i, n, N, mask_w, K, G)
            k = (block * BLOCK + i * CHUNK + j)[:, None]
            values = tl.load(x + rows + k, mask=(k < K) & (m < M)[None, :], other=0.0)
            acc = tl.dot(_values(w, words, SHIFT, ZERO), values, acc)
    mask = mask_n[:, None] & (m < M)[None, :]
    if SPLIT == 1:
        _finish(acc, m, n, mask, bias, residual, out, N, ACTIVATION)
    else:
        part = out + tl.program_id(1).to(tl.int64) * M * N
        tl.store(part + m[None, :].to(tl.int64) * N + n[:, None], acc, mask=mask)


@triton.jit(do_not_specialize=["M"])
def add_splits(
    parts, bias, residual, out, M, N, SPLIT: tl.constexpr, ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """out (M, N) = activation(sum of parts (SPLIT, M, N) + bias + residual), added in order. Grid (N / BN, M / BM)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    mask = (n < N)[:, None] & (m < M)[None, :]
    at = m[None, :].to(tl.int64) * N + n[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for i in tl.static_range(SPLIT):
        acc += tl.load(parts + i * (M.to(tl.int64) * N) + at, mask=mask, other=0.0)
    _finish(acc, m, n, mask, bias, residual, out, N, ACTIVATION)


@triton.jit
def dequantize_weight(
    packed,
    qparams,
    out,
    N,
    K: tl.constexpr,
    G: tl.constexpr,
    ZERO: tl.constexpr,
    BITS: tl.constexpr,
    BN: tl.constexpr,
    ASM: tl.constexpr,
):
    """out (N, K) = (Q - z) s in out's dtype, for products with so many rows that this costs little.

    Grid (ceil(N / BN), ceil(K / 128)).
    """
    D: tl.constexpr = out.dtype.element_ty
    SHIFT: tl.constexpr = _shift(D, BITS)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    j = tl.arange(0, CHUNK)
    block = tl.program_id(1)
    mask_n = n < N
    w0, w1, w2, w3 = _codes(packed, n[:, None] * CHUNK + j[None, :], block, N, mask_n[:, None], D, BITS, ASM)
    for i in tl.static_range(4):
        w = w0 if i == 0 else (w1 if i == 1 else (w2 if i == 2 else w3))
        words = _of_chunk(qparams, block, i, n, N, mask_n, K, G)
        k = (block * BLOCK + i * CHUNK + j)[None, :]
        tl.store(out + n[:, None].to(tl.int64) * K + k, _values(w, words, SHIFT, ZERO), mask=mask_n[:, None] & (k < K))


# codes by codes: y = s_x s_w (Q_x - z) Q_w^T -------------------------------------------------------------------------


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """Float32 that lie on the grid's range, to its nearest codes, ties to even.

    Adding 1.5 * 2**23 leaves the integer in the lowest bits: a byte of it is the code.
    """
    if DTYPE == tl.int8:
        return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        return x.to(DTYPE)


@triton.jit
def _by_row(x, inverse, DTYPE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Codes of x, times the inverse scales of its rows: only on an uneven grid can they leave it."""
    x = x.to(tl.float32) * inverse
    return _rounded(x if LOW + HIGH == 0 else tl.minimum(x, HIGH), DTYPE)


@triton.jit
def _on_grid(x, scale, zero_point, DTYPE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The codes of x for one scale and one zero point."""
    x = x.to(tl.float32) * (1.0 / tl.load(scale))
    if zero_point is None:
        return _rounded(tl.minimum(tl.maximum(x, LOW), HIGH), DTYPE)
    else:
        zero = tl.load(zero_point)
        x = tl.minimum(tl.maximum(x, LOW - zero.to(tl.float32)), HIGH - zero.to(tl.float32))
        return ((x + 12582912.0).to(tl.int32, bitcast=True) + zero).to(tl.int8)


@triton.jit
def _row_scale(largest, LOW: tl.constexpr, HIGH: tl.constexpr, EPS: tl.constexpr):
    """The scale of a row whose largest magnitude is given; EPS at least."""
    return tl.maximum(largest / ((HIGH - LOW) / 2), EPS)


@triton.jit
def quantize_rows(
    x, codes, scale, K: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, EPS: tl.constexpr, BK: tl.constexpr
):
    """codes (M, K) and scale (M,) float32 of each row of x (M, K), symmetric. Grid (M,)."""
    D: tl.constexpr = codes.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BK)
    if K <= BK:
        values = tl.load(x + row * K + k, mask=k < K, other=0.0)
        by_row = _row_scale(tl.max(tl.abs(values.to(tl.float32)), 0), LOW, HIGH, EPS)
        tl.store(codes + row * K + k, _by_row(values, 1.0 / by_row, D, LOW, HIGH), mask=k < K)
    else:
        most = tl.zeros((BK,), tl.float32)
        for first in range(0, K, BK):
            part = tl.load(x + row * K + first + k, mask=first + k < K, other=0.0)
            most = tl.maximum(most, tl.abs(part.to(tl.float32)))
        by_row = _row_scale(tl.max(most, 0), LOW, HIGH, EPS)
        for first in range(0, K, BK):
            part = tl.load(x + row * K + first + k, mask=first + k < K, other=0.0)
            at = codes + row * K + first + k
            tl.store(at, _by_row(part, 1.0 / by_row, D, LOW, HIGH), mask=first + k < K)
    tl.store(scale + row, by_row)


@triton.jit(do_not_specialize=["count"])
def quantize_tensor(x, codes, scale, zero_point, count, LOW: tl.constexpr, HIGH: tl.constexpr, SPAN: tl.constexpr):
    """codes of `count` values of x with the scale (1,) and zero point (1,) given. Grid (ceil(count / SPAN),)."""
    at = tl.program_id(0).to(tl.int64) * SPAN + tl.arange(0, SPAN)
    values = tl.load(x + at, mask=at < count, other=0.0)
    values = _on_grid(values, scale, zero_point, codes.dtype.element_ty, LOW, HIGH)
    tl.store(codes + at, values, mask=at < count)


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
):
    """y (M, N) for few rows. x (M, K) codes, or floats that each program quantizes for itself.

    x_scale None: by row, from its largest magnitude, found WIDE values at a time. weight (N, K) int8 or float8_e4m3fn.
    Grid (ceil(N / BN), ceil(M / BM)).
    """
    D: tl.constexpr = weight.dtype.element_ty
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    k = tl.arange(0, S)[:, None, None] * BK + tl.arange(0, BK)[None, None, :]
    kt = tl.arange(0, S)[:, None, None] * BK + tl.arange(0, BK)[None, :, None]
    rows = m.to(tl.int64) * K
    if x_scale is None:
        wide = tl.arange(0, WIDE)
        most = tl.zeros((BM, WIDE), tl.float32)
        for first in range(0, K, WIDE):
            inside = (first + wide < K)[None, :] & (m < M)[:, None]
            part = tl.load(x + rows[:, None] + (first + wide)[None, :], mask=inside, other=0.0)
            most = tl.maximum(most, tl.abs(part.to(tl.float32)))
        by_row = _row_scale(tl.max(most, 1), LOW, HIGH, EPS)
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
    _finish(y, m, n, (n < N)[:, None] & (m < M)[None, :], bias, residual, out, N, ACTIVATION)


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
    GROUP: tl.constexpr,
):
    """y (M, N) by tiles, for many rows; x (M, K) codes. GROUP tiles of N are walked at a time, so that x stays in L2.

    Grid (ceil(N / BN) * ceil(M / BM),).
    """
    D: tl.constexpr = weight.dtype.element_ty
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    band = tl.program_id(0) // (GROUP * tiles_m)
    width = tl.minimum(tiles_n - band * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * tiles_m)
    n = (band * GROUP + within % width) * BN + tl.arange(0, BN)
    m = within // width * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    # rows beyond the matrix read its first ones instead: their sums are never stored
    wp = weight + tl.where(n < N, n, 0)[:, None].to(tl.int64) * K + k[None, :]
    xp = x + tl.where(m < M, m, 0)[None, :].to(tl.int64) * K + k[:, None]
    acc = tl.zeros((BN, BM), tl.int32 if D == tl.int8 else tl.float32)
    for first in range(0, K, BK):
        if K % BK == 0:
            w, values = tl.load(wp + first), tl.load(xp + first)
        else:
            w = tl.load(wp + first, mask=(first + k < K)[None, :], other=0.0)
            values = tl.load(xp + first, mask=(first + k < K)[:, None], other=0.0)
        acc = tl.dot(w, values, acc, out_dtype=acc.dtype)
    y = _scaled(acc, m, n, M, N, x_scale, x_zero_point, weight_scale, weight_sum, scale_rows, zero_rows, weight_rows)
    _finish(y, m, n, (n < N)[:, None] & (m < M)[None, :], bias, residual, out, N, ACTIVATION)


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
):
    """A convolution as the product of its weight (N, KH * KW * C) and windows that are never written out.

    x (batch, H, W, C) codes; out (M, N) with M = batch * OH * OW; weight_sum (N, KH * KW) goes with x_zero_point, which
    is taken off where the window lies on the image. Grid (ceil(N / BN) * ceil(M / BM),).
    """
    D: tl.constexpr = weight.dtype.element_ty
    K: tl.constexpr = KH * KW * C
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
    _finish(y, m, n, (n < N)[:, None] & (m < M)[None, :], bias, residual, out, N, ACTIVATION)


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
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """y (M, N) from products (M, N) int32 of codes that a library made. Grid (ceil(N / BN), ceil(M / BM))."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    mask = (n < N)[:, None] & (m < M)[None, :]
    acc = tl.load(products + m[None, :].to(tl.int64) * N + n[:, None], mask=mask, other=0)
    y = _scaled(acc, m, n, M, N, x_scale, x_zero_point, weight_scale, weight_sum, scale_rows, zero_rows, weight_rows)
    _finish(y, m, n, mask, bias, residual, out, N, ACTIVATION)
