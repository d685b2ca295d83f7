"""What the Triton kernels have in common: how they begin and end, and how codes are unpacked."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = [
    "LINES",
    "activate",
    "add_splits",
    "bytes_of",
    "clamp",
    "constant",
    "fetch",
    "finish",
    "finish_or_store_part",
    "follow",
    "nibbles_of",
    "offset_of",
]

constant = int if triton.knobs.runtime.interpret else tl.constexpr  # the interpreter takes plain numbers as globals
LINES = constant(256)  # cache lines of 128 bytes of weights that a program prefetches, see `fetch`


@triton.jit
def follow(EARLY: tl.constexpr):
    """Wait until the preceding kernel has ended, if this one was launched early (programmatic dependent launch).

    It comes before all loads and stores: the preceding kernel may write what this one reads, and read what it writes.
    Then let the next kernel begin, up to its own `follow`. Since every program waits before it lets the next kernel
    begin, all kernels before the preceding one have ended too.
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def fetch(pointers, EARLY: tl.constexpr):
    """Prefetch the cache lines at these addresses to L2, before `follow`: the weights that a program reads first.

    This is safe even if the preceding kernel still writes them, since L2 is coherent for the whole GPU.
    """
    if EARLY:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [pointers.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def clamp(x, low, high):
    """x between low and high; NaN stays."""
    return tl.minimum(tl.maximum(x, low, tl.PropagateNan.ALL), high, tl.PropagateNan.ALL)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        y = tl.maximum(y, 0.0, tl.PropagateNan.ALL)
    elif ACTIVATION == "relu6":
        y = clamp(y, 0.0, 6.0)
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
def finish(y, m, n, mask, bias, residual, out, N, ACTIVATION: tl.constexpr):
    """Store activation(y + bias + residual); y (BN, BM) float32, out (M, N)."""
    at = m[None, :].to(tl.int64) * N + n[:, None]
    if bias is not None:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if residual is not None:
        y += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, activate(y, ACTIVATION).to(out.dtype.element_ty), mask=mask)


@triton.jit
def finish_or_store_part(y, m, n, mask, bias, residual, out, M, N, ACTIVATION: tl.constexpr, SPLIT: tl.constexpr):
    """As `finish`; or with K split store y (BN, BM) as this program's part of out (SPLIT, M, N)."""
    if SPLIT == 1:
        finish(y, m, n, mask, bias, residual, out, N, ACTIVATION)
    else:
        part = out + tl.program_id(1).to(tl.int64) * M * N
        tl.store(part + m[None, :].to(tl.int64) * N + n[:, None], y, mask=mask)


@triton.jit(do_not_specialize=["M"])
def add_splits(
    parts,
    bias,
    residual,
    out,
    M,
    N,
    SPLIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out (M, N) = activation(sum of parts (SPLIT, M, N) + bias + residual), added in order. Grid (N / BN, M / BM)."""
    follow(EARLY)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    mask = (n < N)[:, None] & (m < M)[None, :]
    at = m[None, :].to(tl.int64) * N + n[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for i in tl.static_range(SPLIT):
        acc += tl.load(parts + i * (M.to(tl.int64) * N) + at, mask=mask, other=0.0)
    finish(acc, m, n, mask, bias, residual, out, N, ACTIVATION)


@triton.constexpr_function
def offset_of(dtype):
    """What `nibbles_of` returns for the signed code 0."""
    return {tl.bfloat16: 136.0, tl.float16: 1032.0}.get(dtype, 8.0)


@triton.jit
def _nibbles_of_bfloat16(words):
    """Four-bit codes in pairs of int16, as bfloat16 from 128 on."""
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


@triton.jit
def _nibbles_of_float16(words):
    """Four-bit codes in pairs of int16, as float16 from 1024 on."""
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


@triton.jit
def nibbles_of(words, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The four codes in each int16, as DTYPE, each plus `offset_of(DTYPE)`.

    A float with the exponent in which one unit in the last place is 1 (128 in bfloat16, 1024 in float16) takes a
    nibble in its mantissa: one `and` and `or` for two codes, instead of conversions.
    """
    if ASM and DTYPE == tl.bfloat16:
        return _nibbles_of_bfloat16(words)
    elif ASM and DTYPE == tl.float16:
        return _nibbles_of_float16(words)
    else:
        base: tl.constexpr = offset_of(DTYPE) - 8.0
        w0 = (words & 15).to(DTYPE) + base
        w1 = ((words >> 4) & 15).to(DTYPE) + base
        w2 = ((words >> 8) & 15).to(DTYPE) + base
        w3 = ((words >> 12) & 15).to(DTYPE) + base
        return w0, w1, w2, w3


@triton.jit
def _bytes_of_bfloat16(words):
    """Signed eight-bit codes in pairs of int16, as bfloat16."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 t, u, v, one;
        mov.b32 one, 0x3F803F80;
        lop3.b32 t, $2, 0x007F007F, 0x43004300, 0xEA;
        lop3.b32 u, $2, 0x00800080, 0xC300C300, 0xEA;
        fma.rn.bf16x2 $0, t, one, u;
        shr.u32 v, $2, 8;
        lop3.b32 t, v, 0x007F007F, 0x43004300, 0xEA;
        lop3.b32 u, v, 0x00800080, 0xC300C300, 0xEA;
        fma.rn.bf16x2 $1, t, one, u;
        }
        """,
        "=&r,=r,r",
        [words],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _bytes_of_float16(words):
    """Signed eight-bit codes in pairs of int16, as float16."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 t, v, offset;
        mov.b32 offset, 0xE480E480;
        lop3.b32 t, $2, 0x00FF00FF, 0x64806480, 0x6A;
        add.rn.f16x2 $0, t, offset;
        shr.u32 v, $2, 8;
        lop3.b32 t, v, 0x00FF00FF, 0x64806480, 0x6A;
        add.rn.f16x2 $1, t, offset;
        }
        """,
        "=&r,=r,r",
        [words],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def bytes_of(words, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The two signed codes in each int16, as DTYPE.

    A bfloat16's mantissa takes seven bits: the sign chooses between 128 and 256 to subtract. A float16's takes eight.
    """
    if ASM and DTYPE == tl.bfloat16:
        return _bytes_of_bfloat16(words)
    elif ASM and DTYPE == tl.float16:
        return _bytes_of_float16(words)
    else:
        return words.to(tl.int8).to(DTYPE), (words >> 8).to(tl.int8).to(DTYPE)
