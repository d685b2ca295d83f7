"""Triton kernel of products of many rows by codes on Hopper, in Gluon; see kernels.py.

Tensor cores take weights from registers, and do not wait for them: while they multiply 32 columns of a tile, its warps
unpack the next 32 into other registers. x, codes and their scales come through a ring of buffers in shared memory that
the copy engine fills, of the next tile too while the last one is stored: a program has many tiles.

What else could hide the unpacking, and why it is not here. Weights unpacked to shared memory would be written once and
read once for each 64 outputs, out of the bandwidth that tensor cores need for x. A warp of its own to copy, and two
groups of four warps that multiply out of step, leave a thread 240 registers; two chunks under way want more, and ptxas
then makes all products wait. It also takes what the copying warp has, 24, for the limit of those that multiply. And
it makes them wait where more than two chunks are under way (C7513): a wait has to follow each before the next is
unpacked.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from torchquant.ops.gpu import packing
from torchquant.ops.gpu.kernel_parts import finish, follow, offset_of

__all__ = ["weight_only_pipelined"]

CHUNK = gl.constexpr(packing.CHUNK)
BLOCK = gl.constexpr(packing.BLOCK)


@gluon.constexpr_function
def _unpacking(bits, i, dtype, zero):
    """PTX for two values of chunk `i`, $0, from two words, $1, their scales, $2, and zero points, $3.

    A float in whose exponent a unit in the last place is 1 takes a code in its mantissa, as in kernel_parts.py; all
    that follows is exact but the last multiplication.
    """
    bfloat = dtype == gl.bfloat16
    kind = "bf16x2" if bfloat else "f16x2"
    if bits == 4:
        exponent, offset = ("0x43004300", "0x43084308") if bfloat else ("0x64006400", "0x64086408")
        unpack = f"shr.u32 t, $1, {4 * i}; lop3.b32 t, t, 0x000F000F, {exponent}, 0xEA;"
        unpack += "mov.b32 u, $3;" if zero else f"mov.b32 u, {offset};"
    elif bfloat:
        unpack = f"""
            shr.u32 v, $1, {8 * (i % 2)};
            lop3.b32 t, v, 0x007F007F, 0x43004300, 0xEA;
            lop3.b32 u, v, 0x00800080, 0x43004300, 0xEA;"""
    else:
        unpack = f"shr.u32 v, $1, {8 * (i % 2)}; lop3.b32 t, v, 0x00FF00FF, 0x64806480, 0x6A; mov.b32 u, 0x64806480;"
    shift = f"sub.rn.{kind} t, t, $3;" if zero and bits == 8 else ""
    return f"{{ .reg .b32 t, u, v; {unpack} sub.rn.{kind} t, t, u; {shift} mul.rn.{kind} $0, t, $2; }}"


@gluon.jit
def _values(words, i: gl.constexpr, params, ZERO: gl.constexpr, BITS: gl.constexpr, DTYPE: gl.constexpr):
    """(codes of chunk `i` - zero points) scales; words (outputs, 32), params (outputs,)."""
    scale = (params & 0xFFFF).to(gl.uint16).to(DTYPE, bitcast=True)
    zero = scale
    if ZERO:
        zero = (params >> 16).to(gl.uint16).to(DTYPE, bitcast=True)
        if BITS == 4:
            zero += offset_of(DTYPE)  # exact, since both are small integers
    return gl.inline_asm_elementwise(
        _unpacking(BITS, i, DTYPE, ZERO),
        "=r,r,r,r",
        [words, gl.expand_dims(scale, 1), gl.expand_dims(zero, 1)],
        dtype=scale.dtype,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _place(tile, M, N, BM: gl.constexpr, BN: gl.constexpr, SPLIT: gl.constexpr):
    """First row, first output and part of K of a tile: those that have weights in common follow each other."""
    tiles_m = gl.cdiv(M, BM)
    return tile // SPLIT % tiles_m * BM, tile // SPLIT // tiles_m * BN, tile % SPLIT


@gluon.jit
def _next(tile, place, block, M, N, BM: gl.constexpr, BN: gl.constexpr, BLOCKS: gl.constexpr, SPLIT: gl.constexpr):
    """The block after one of a tile, of this program's next tile after the last."""
    block += SPLIT
    if block >= BLOCKS:
        tile += gl.num_programs(0)
        place = _place(tile, M, N, BM, BN, SPLIT)
        block = place[2]
    return tile, place, block


@gluon.jit
def _copy(x, packed, qparams, rings, place, block, stage, there, N, G: gl.constexpr):
    """Have the copy engine bring a block of a tile to a stage of the ring, if it is `there`."""
    x_ring, codes_ring, params_ring, ready = rings
    m0, n0, _ = place
    BM: gl.constexpr = x.block_shape[0]
    BN: gl.constexpr = packed.block_shape[0]
    HALVES: gl.constexpr = codes_ring.shape[0] // x_ring.shape[0]
    GROUPS: gl.constexpr = params_ring.shape[0] // x_ring.shape[0]
    full = ready.index(stage)
    # beyond the matrices zeros are read, or codes and scales of other outputs, whose sums are never stored
    mbarrier.expect(full, BM * BLOCK * 2 + HALVES * BN * CHUNK * 2 + GROUPS * BN * 4, pred=there)
    for i in gl.static_range(HALVES):
        codes = codes_ring.index(stage * HALVES + i)
        tma.async_copy_global_to_shared(packed, [(block * HALVES + i) * N + n0, 0], full, codes, pred=there)
    for i in gl.static_range(GROUPS):
        params = params_ring.index(stage * GROUPS + i)
        group = (block * BLOCK + i * CHUNK) // G
        tma.async_copy_global_to_shared(qparams, [group * N + n0], full, params, pred=there)
    tma.async_copy_global_to_shared(x, [m0, block * BLOCK], full, x_ring.index(stage), pred=there)


@gluon.jit
def _store(y, m0, n0, part, bias, residual, out, M, N, ACTIVATION: gl.constexpr, SPLIT: gl.constexpr):
    """Store y (outputs, rows) by few rows at a time, which takes little shared memory to reorder; see `finish`."""
    BN: gl.constexpr = y.shape[0]
    BM: gl.constexpr = y.shape[1]
    if BM > 16:
        first, second = y.reshape([BN, 2, BM // 2]).permute((0, 2, 1)).split()
        _store(first, m0, n0, part, bias, residual, out, M, N, ACTIVATION, SPLIT)
        _store(second, m0 + BM // 2, n0, part, bias, residual, out, M, N, ACTIVATION, SPLIT)
    else:
        lines: gl.constexpr = gl.BlockedLayout([4, 1], [32, 1], [1, gl.num_warps()], [0, 1])
        y = gl.convert_layout(y, lines)
        n = n0 + gl.arange(0, BN, gl.SliceLayout(1, lines))
        m = m0 + gl.arange(0, BM, gl.SliceLayout(0, lines))
        mask = (n < N)[:, None] & (m < M)[None, :]
        if SPLIT == 1:
            finish(y, m, n, mask, bias, residual, out, N, ACTIVATION)
        else:
            at = part.to(gl.int64) * M * N + m[None, :].to(gl.int64) * N + n[:, None]
            gl.store(out + at, y, mask=mask)


@gluon.jit(do_not_specialize=["M"])
def weight_only_pipelined(
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
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
    EARLY: gl.constexpr,
):
    """y (M, N), as `weight_only_tiled`, of which the parts of K are tiles here.

    Tensor descriptors: x (M, K) in tiles (BM, 128); packed, as rows of 32 words, in tiles (BN, 32); qparams, as one
    row of words, in tiles (BN,). Any number of programs: they take the tiles in turn.
    """
    follow(EARLY)
    D: gl.constexpr = x.dtype
    BM: gl.constexpr = x.block_shape[0]
    BN: gl.constexpr = packed.block_shape[0]
    BLOCKS: gl.constexpr = (K + BLOCK - 1) // BLOCK
    HALVES: gl.constexpr = BITS // 4
    GROUPS: gl.constexpr = 1 if G % BLOCK == 0 else 4  # sets of scales for a block
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BM, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    x_ring = gl.allocate_shared_memory(D, [STAGES, BM, BLOCK], x.layout)
    codes_ring = gl.allocate_shared_memory(packed.dtype, [STAGES * HALVES, BN, CHUNK], packed.layout)
    params_ring = gl.allocate_shared_memory(qparams.dtype, [STAGES * GROUPS, BN], qparams.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    rings = (x_ring, codes_ring, params_ring, ready)
    tiles = gl.cdiv(M, BM) * gl.cdiv(N, BN) * SPLIT
    # the next block to copy, STAGES - 1 steps ahead of the block that is multiplied
    next_tile = gl.program_id(0)
    next_place = _place(next_tile, M, N, BM, BN, SPLIT)
    next_block = next_place[2]
    for i in gl.static_range(STAGES - 1):
        _copy(x, packed, qparams, rings, next_place, next_block, i, next_tile < tiles, N, G)
        next_tile, next_place, next_block = _next(next_tile, next_place, next_block, M, N, BM, BN, BLOCKS, SPLIT)
    stage = 0
    phase = 0
    free = STAGES - 1  # the stage whose block has been multiplied
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m0, n0, part = _place(tile, M, N, BM, BN, SPLIT)
        acc = gl.zeros((BN, BM), gl.float32, sums)
        for _ in range(part, BLOCKS, SPLIT):
            mbarrier.wait(ready.index(stage), phase)
            for i in gl.static_range(4):
                if i * HALVES % 4 == 0:
                    words = codes_ring.index(stage * HALVES + i * HALVES // 4).load(left)
                if i < GROUPS:
                    params = params_ring.index(stage * GROUPS + i).load(gl.SliceLayout(1, left))
                values = _values(words, i, params, ZERO, BITS, D)
                columns = x_ring.index(stage).slice(i * CHUNK, CHUNK, 1).permute((1, 0))
                acc = warpgroup_mma(values, columns, acc, is_async=True)
                if i == 1:  # the last step's products are done, so its stage may be overwritten
                    gl.thread_barrier()
                    _copy(x, packed, qparams, rings, next_place, next_block, free, next_tile < tiles, N, G)
                    next_tile, next_place, next_block = _next(
                        next_tile, next_place, next_block, M, N, BM, BN, BLOCKS, SPLIT
                    )
                acc = warpgroup_mma_wait(1, deps=[acc])  # until the products of the chunk before this one are done
            free = stage
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        _store(acc, m0, n0, part, bias, residual, out, M, N, ACTIVATION, SPLIT)
