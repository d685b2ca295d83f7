"""Triton kernel of products of few rows by codes, in Gluon, where layouts are said instead of found; see kernels.py."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from torchquant.ops.gpu import packing
from torchquant.ops.gpu.kernel_parts import LINES, bytes_of, fetch, finish, follow, nibbles_of, offset_of
from torchquant.ops.gpu.weight_only_kernels import lines_of

__all__ = ["weight_only_direct"]

CHUNK = gl.constexpr(packing.CHUNK)
BLOCK = gl.constexpr(packing.BLOCK)


@gluon.jit
def _along(size: gl.constexpr, axis: gl.constexpr, layout: gl.constexpr):
    """0, 1, ... along one axis of a tensor of three axes."""
    if axis == 0:
        one = gl.arange(0, size, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
        return gl.expand_dims(gl.expand_dims(one, 1), 2)
    elif axis == 1:
        one = gl.arange(0, size, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
        return gl.expand_dims(gl.expand_dims(one, 0), 2)
    else:
        one = gl.arange(0, size, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
        return gl.expand_dims(gl.expand_dims(one, 0), 1)


@gluon.jit
def _params(qparams, block, i: gl.constexpr, n, N, K: gl.constexpr, G: gl.constexpr):
    """The words that hold scale and zero point of chunk `i` of a block; 0, which is a scale of 0, beyond the weight."""
    k = block * BLOCK + (0 if G % BLOCK == 0 else i * CHUNK)
    return gl.load(qparams + (k // G) * N + n, mask=(n < N) & (k < K), other=0)


@gluon.jit
def _of_block(qparams, block, n, N, K: gl.constexpr, G: gl.constexpr):
    return (
        _params(qparams, block, 0, n, N, K, G),
        _params(qparams, block, 1, n, N, K, G),
        _params(qparams, block, 2, n, N, K, G),
        _params(qparams, block, 3, n, N, K, G),
    )


@gluon.jit
def _scale(words, DTYPE: gl.constexpr):
    return (words & 0xFFFF).to(gl.uint16).to(DTYPE, bitcast=True)


@gluon.jit(do_not_specialize=["M"])
def weight_only_direct(
    x,
    packed,
    qparams,
    bias,
    residual,
    out,
    M,
    N,
    K: gl.constexpr,
    G: gl.constexpr,
    ZERO: gl.constexpr,
    BITS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    S: gl.constexpr,
    AHEAD: gl.constexpr,
    EARLY: gl.constexpr,
):
    """y (M, N), as `weight_only_skinny`, without shared memory: codes are loaded where tensor cores take them.

    Each of S warps has a slice of K, and walks it at its own pace, `AHEAD` steps (1 or 2) of codes under way. A thread
    reads 16 bytes of codes of an output, 8 neighbours in each chunk, which are operands in that order because x is
    read in the same. Grid (ceil(N / BN), ceil(M / BM)).
    """
    D: gl.constexpr = x.dtype.element_ty
    SHIFT: gl.constexpr = offset_of(D) if BITS == 4 else 0.0
    BLOCKS: gl.constexpr = (K + BLOCK - 1) // BLOCK
    WHOLE: gl.constexpr = K % (BLOCK * S) == 0
    REGULAR: gl.constexpr = G % BLOCK == 0 or BLOCK % G == 0
    sums: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [S, 1, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 8)
    right: gl.constexpr = gl.DotOperandLayout(1, sums, 8)
    n0, m0 = gl.program_id(0) * BN, gl.program_id(1) * BM
    if EARLY:
        line = gl.arange(0, LINES, gl.BlockedLayout([1], [32], [S], [0]))
        fetch(lines_of(line, packed, n0, 0, 1, N, BLOCKS, BN, BITS), EARLY)
    follow(EARLY)
    # indices beyond the matrices are clamped to the last output or row: their sums are never stored
    at = gl.minimum(n0 + _along(BN, 1, left), N - 1) * CHUNK + _along(CHUNK, 2, left)
    rows = gl.minimum(m0 + _along(BM, 2, right), M - 1).to(gl.int64) * K + _along(CHUNK, 1, right)
    s, sx = _along(S, 0, left), _along(S, 0, right)
    sp, np, nz = _along(S, 0, sums), n0 + _along(BN, 1, sums), n0 + _along(BN, 1, left)
    acc = gl.zeros((S, BN, BM), gl.float32, sums)
    none = gl.zeros((S, BN, BM), gl.float32, sums)
    words, more = _words(packed, at, s, N, BLOCKS, BITS)
    if AHEAD == 2:
        words2, more2 = _words(packed, at, s + S, N, BLOCKS, BITS)
    p0, p1, p2, p3 = _of_block(qparams, sp, np, N, K, G)
    if ZERO:
        z0, z1, z2, z3 = _of_block(qparams, s, nz, N, K, G)
    for first in range(0, BLOCKS, S):
        later, later_more = _words(packed, at, first + AHEAD * S + s, N, BLOCKS, BITS)
        later_p = _of_block(qparams, first + S + sp, np, N, K, G)
        if ZERO:
            later_z = _of_block(qparams, first + S + s, nz, N, K, G)
        if BITS == 4:
            w0, w1, w2, w3 = nibbles_of(words, D, True)
        else:
            w0, w1 = bytes_of(words, D, True)
            w2, w3 = bytes_of(more, D, True)
        part = none
        for i in gl.static_range(4):
            w = w0 if i == 0 else (w1 if i == 1 else (w2 if i == 2 else w3))
            k = (first + sx) * BLOCK + i * CHUNK
            if WHOLE:
                values = gl.load(x + rows + k)
            else:
                values = gl.load(x + rows + k, mask=k + _along(CHUNK, 1, right) < K, other=0.0)
            if ZERO:
                zero = z0 if i == 0 else (z1 if i == 1 else (z2 if i == 2 else z3))
                part = mma_v2(w - (_scale(zero >> 16, D) + SHIFT), values, part)
            elif BITS == 4:
                part = mma_v2(w - SHIFT, values, part)
            else:
                part = mma_v2(w, values, part)
            if i == 3 or (i + 1) * CHUNK % G == 0 or not REGULAR:
                scale = p0 if i == 0 else (p1 if i == 1 else (p2 if i == 2 else p3))
                acc += part * _scale(scale, D).to(gl.float32)
                part = none
        p0, p1, p2, p3 = later_p
        if ZERO:
            z0, z1, z2, z3 = later_z
        if AHEAD == 2:
            words, more = words2, more2
            words2, more2 = later, later_more
        else:
            words, more = later, later_more
    y = gl.sum(acc, 0)
    n = n0 + gl.arange(0, BN, gl.SliceLayout(1, y.type.layout))
    m = m0 + gl.arange(0, BM, gl.SliceLayout(0, y.type.layout))
    finish(y, m, n, (n < N)[:, None] & (m < M)[None, :], bias, residual, out, N, ACTIVATION)


@gluon.jit
def _words(packed, at, block, N, BLOCKS: gl.constexpr, BITS: gl.constexpr):
    """The words of a packed block, of 8 bits those of its first and its last two chunks; anything beyond the weight."""
    there = block < BLOCKS
    if BITS == 4:
        words = gl.load(packed + block.to(gl.int64) * (N * CHUNK) + at, mask=there)
        return words, words
    else:
        first = packed + block.to(gl.int64) * (2 * N * CHUNK) + at
        return gl.load(first, mask=there), gl.load(first + N * CHUNK, mask=there)
