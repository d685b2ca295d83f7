"""Triton kernels of products of floats by codes: y = x (s (Q - z))^T; see kernels.py."""

from __future__ import annotations

import triton
import triton.language as tl

from torchquant.ops.gpu import packing
from torchquant.ops.gpu.kernel_parts import (
    LINES,
    bytes_of,
    constant,
    fetch,
    finish,
    finish_or_store_part,
    follow,
    nibbles_of,
    offset_of,
)

__all__ = ["dequantize_weight", "lines_of", "weight_only_skinny", "weight_only_tiled"]

CHUNK = constant(packing.CHUNK)  # neighbours on K that are packed side by side; see packing.py
BLOCK = constant(packing.BLOCK)  # codes along K in a packed block


@triton.jit
def lines_of(i, packed, n, first, step, N, BLOCKS: tl.constexpr, BN: tl.constexpr, BITS: tl.constexpr):
    """Where lines 0, 1, ... (i) of the codes of BN outputs from n lie, in the blocks first, first + step, ..."""
    parts: tl.constexpr = BITS // 4  # of a packed block
    part = i // (BN // 2)  # a line holds the codes of two outputs
    block = tl.minimum(first + part // parts * step, BLOCKS - 1)
    output = tl.minimum(n + i % (BN // 2) * 2, N - 1)
    return packed + ((block * parts + part % parts).to(tl.int64) * N + output) * CHUNK


@triton.jit
def _codes(packed, at, block, N, mask, DTYPE: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Four chunks of the codes of a packed block as DTYPE, each plus `_shift(DTYPE, BITS)`."""
    if BITS == 4:
        words = tl.load(packed + block.to(tl.int64) * (N * CHUNK) + at, mask=mask, other=0)
        return nibbles_of(words, DTYPE, ASM)
    else:
        first = packed + block.to(tl.int64) * (2 * N * CHUNK) + at
        w0, w1 = bytes_of(tl.load(first, mask=mask, other=0), DTYPE, ASM)
        w2, w3 = bytes_of(tl.load(first + N * CHUNK, mask=mask, other=0), DTYPE, ASM)
        return w0, w1, w2, w3


@triton.constexpr_function
def _shift(dtype, bits):
    return offset_of(dtype) if bits == 4 else 0.0


@triton.jit
def _chunk_params(params, block, i: tl.constexpr, n, N, mask, K: tl.constexpr, G: tl.constexpr):
    """The words that hold scale and zero point of chunk `i` of a block, for outputs n.

    Words have four bytes because asynchronous copies to shared memory are of four bytes at least.
    """
    k = block * BLOCK + (0 if G % BLOCK == 0 else i * CHUNK)
    return tl.load(params + (k // G) * N + n, mask=mask & (k < K), other=0)


@triton.jit
def _block_params(params, block, n, N, mask, K: tl.constexpr, G: tl.constexpr):
    return (
        _chunk_params(params, block, 0, n, N, mask, K, G),
        _chunk_params(params, block, 1, n, N, mask, K, G),
        _chunk_params(params, block, 2, n, N, mask, K, G),
        _chunk_params(params, block, 3, n, N, mask, K, G),
    )


@triton.jit
def _scale(words, DTYPE: tl.constexpr):
    return (words & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)


@triton.jit
def _values(w, words, SHIFT: tl.constexpr, ZERO: tl.constexpr):
    """(w - SHIFT - zero point) scale in w's dtype; `words` has one axis less than w."""
    if ZERO:
        w = w - tl.expand_dims(_scale(words >> 16, w.dtype) + SHIFT, -1)  # exact, since both are small integers
    else:
        w = w - SHIFT
    return w * tl.expand_dims(_scale(words, w.dtype), -1)


@triton.jit
def _add_blocks(
    acc,
    x,
    rows,
    m,
    M,
    codes,
    scales,
    qparams,
    block,
    n,
    N,
    mask,
    K: tl.constexpr,
    G: tl.constexpr,
    ZERO: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """acc (S, BN, BM) plus products with a packed block for each of S slices.

    rows (1, 1, BM): where rows m of x begin; codes, scales: of the four chunks of the blocks, (S, BN, 32) and (S, BN);
    block (S,); mask (S, BN): outputs n and blocks that there are. Without zero points a group's sum is scaled.
    """
    REGULAR: tl.constexpr = G % BLOCK == 0 or BLOCK % G == 0  # groups end at the same chunks of every block
    j = tl.arange(0, CHUNK)
    part = tl.zeros(acc.shape, tl.float32)
    for i in tl.static_range(4):
        k = block[:, None, None] * BLOCK + i * CHUNK + j[None, :, None]
        values = tl.load(x + rows + k, mask=(k < K) & (m < M)[None, None, :], other=0.0)
        if ZERO:
            words = _chunk_params(qparams, block[:, None], i, n[None, :], N, mask, K, G)
            acc = tl.dot(_values(codes[i], words, SHIFT, ZERO), values, acc)
        else:
            part = tl.dot(codes[i] - SHIFT, values, part)
            if i == 3 or (i + 1) * CHUNK % G == 0 or not REGULAR:
                acc += part * _scale(scales[i], codes[i].dtype).to(tl.float32)[:, :, None]
                part = tl.zeros(acc.shape, tl.float32)
    return acc


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
    EARLY: tl.constexpr,
):
    """y (M, N). Without zero points the integers are multiplied exactly and each group's sum is scaled in float32.

    x (M, K); packed as `pack_weight` makes it; qparams as `pack_params` makes it; grid (ceil(N / BN), ceil(M / BM)).
    """
    D: tl.constexpr = x.dtype.element_ty
    SHIFT: tl.constexpr = _shift(D, BITS)
    BLOCKS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    if EARLY:
        fetch(lines_of(tl.arange(0, LINES), packed, tl.program_id(0) * BN, 0, 1, N, BLOCKS, BN, BITS), EARLY)
    follow(EARLY)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    s = tl.arange(0, S)
    j = tl.arange(0, CHUNK)
    at = n[None, :, None] * CHUNK + j[None, None, :]
    rows = m[None, None, :].to(tl.int64) * K
    acc = tl.zeros((S, BN, BM), tl.float32)
    ahead = (s < BLOCKS)[:, None] & (n < N)[None, :]
    params = _block_params(qparams, s[:, None], n[None, :], N, ahead, K, G)
    for first in range(0, BLOCKS, S):
        block = first + s
        mask = (block < BLOCKS)[:, None] & (n < N)[None, :]
        codes = _codes(packed, at, block[:, None, None], N, mask[:, :, None], D, BITS, ASM)
        ahead = (block + S < BLOCKS)[:, None] & (n < N)[None, :]
        next_params = _block_params(qparams, (block + S)[:, None], n[None, :], N, ahead, K, G)
        acc = _add_blocks(acc, x, rows, m, M, codes, params, qparams, block, n, N, mask, K, G, ZERO, SHIFT)
        params = next_params
    mask = (n < N)[:, None] & (m < M)[None, :]
    finish(tl.sum(acc, 0), m, n, mask, bias, residual, out, N, ACTIVATION)


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
    EARLY: tl.constexpr,
):
    """As `weight_only_skinny`, by tiles; weights are scaled in x's dtype, before the product.

    Grid (ceil(N / BN) * ceil(M / BM), SPLIT). With SPLIT > 1 `out` is a float32 workspace (SPLIT, M, N).
    """
    D: tl.constexpr = x.dtype.element_ty
    BLOCKS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    tiles_m = tl.cdiv(M, BM)
    if EARLY:
        lines, n0 = tl.arange(0, LINES), tl.program_id(0) // tiles_m * BN
        fetch(lines_of(lines, packed, n0, tl.program_id(1), SPLIT, N, BLOCKS, BN, BITS), EARLY)
    follow(EARLY)
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
        codes = _codes(packed, at, block, N, mask_w[:, None], D, BITS, ASM)
        for i in tl.static_range(4):
            words = _chunk_params(qparams, block, i, n, N, mask_w, K, G)
            k = (block * BLOCK + i * CHUNK + j)[:, None]
            values = tl.load(x + rows + k, mask=(k < K) & (m < M)[None, :], other=0.0)
            acc = tl.dot(_values(codes[i], words, _shift(D, BITS), ZERO), values, acc)
    mask_y = mask_n[:, None] & (m < M)[None, :]
    finish_or_store_part(acc, m, n, mask_y, bias, residual, out, M, N, ACTIVATION, SPLIT)


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
    EARLY: tl.constexpr,
):
    """out (N, K) = (Q - z) s in out's dtype, for products with so many rows that this costs little.

    Grid (ceil(N / BN), ceil(K / 128)).
    """
    D: tl.constexpr = out.dtype.element_ty
    SHIFT: tl.constexpr = _shift(D, BITS)
    follow(EARLY)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    j = tl.arange(0, CHUNK)
    block = tl.program_id(1)
    mask_n = n < N
    codes = _codes(packed, n[:, None] * CHUNK + j[None, :], block, N, mask_n[:, None], D, BITS, ASM)
    for i in tl.static_range(4):
        words = _chunk_params(qparams, block, i, n, N, mask_n, K, G)
        k = (block * BLOCK + i * CHUNK + j)[None, :]
        tl.store(
            out + n[:, None].to(tl.int64) * K + k, _values(codes[i], words, SHIFT, ZERO), mask=mask_n[:, None] & (k < K)
        )
