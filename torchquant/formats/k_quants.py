"""The k-quants of ggml: super-blocks of 256 neighbouring weights with scales in two levels.

https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h: `block_q4_K`, `block_q5_K`, `block_q6_K`. The encoders
are our own. They minimize the sum of squared errors: for each block of 32 (16 in Q6_K) a search over starting scales,
each followed by least squares for the scale (and minimum) of the codes that it gives; then, in turns, the integers
nearest to these in units of the super-block, chosen among their neighbours by the error that they leave, and least
squares for the units.

Legend: S super-blocks, B blocks in one, n weights of a block, x (S, B, n).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchquant.errors import InputError

__all__ = ["SUPER_BLOCK", "encode_q4_k", "encode_q5_k", "encode_q6_k"]

SUPER_BLOCK = 256
_AT_ONCE = 256  # super-blocks, which stay in a core's cache
_STARTS = 8
_ROUNDS = 2


def encode_q4_k(values: Tensor) -> Tensor:
    """Bytes (rows, columns / 256 * 144) of float32 `values` (rows, columns).

    Raises:
        InputError: the columns are no multiple of 256, or a value is not finite or too large for scales in float16.
    """
    return _by_parts(values, lambda x: _packed_q4(*_affine(x.view(-1, 8, 32), 15)))


def encode_q5_k(values: Tensor) -> Tensor:
    """Bytes (rows, columns / 256 * 176) of float32 `values` (rows, columns); raises as `encode_q4_k`."""
    return _by_parts(values, lambda x: _packed_q5(*_affine(x.view(-1, 8, 32), 31)))


def encode_q6_k(values: Tensor) -> Tensor:
    """Bytes (rows, columns / 256 * 210) of float32 `values` (rows, columns); raises as `encode_q4_k`."""
    return _by_parts(values, lambda x: _packed_q6(*_scaled(x.view(-1, 16, 16))))


def _by_parts(values: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
    rows, columns = values.shape
    if columns % SUPER_BLOCK:
        raise InputError(f"{columns} columns are no super-blocks of {SUPER_BLOCK}; take Q4_0, Q5_0 or Q8_0")
    if not bool(values.isfinite().all()) or float(values.abs().max()) > torch.finfo(torch.float16).max:
        raise InputError("a k-quant holds finite values up to 65504; these have others")
    blocks = values.detach().float().reshape(-1, SUPER_BLOCK)
    return torch.cat([encode(part) for part in blocks.split(_AT_ONCE)]).view(rows, -1)


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x == 0, 0.0, 1.0 / x)


def _chosen(better: Tensor, *pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Of each pair the first where `better`, else the second."""
    return [torch.where(better, *pair) for pair in pairs]


# a scale and a minimum for each block: x = d s q - e m ---------------------------------------------------------------


def _affine(x: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """d and e (S,) as float16, s and m (S, B) from 0 to 63, q (S, B, n) from 0 to `most`."""
    scale, low = _search_affine(x, most)
    d, e = scale.amax(1).div(63).half(), (-low).amax(1).div(63).half()
    for turn in range(_ROUNDS):
        s, m, q = _integers_affine(x, scale, low, d.float(), e.float(), most)
        if turn < _ROUNDS - 1:
            d, e = _units_affine(x, s, m, q, d, e)
            scale, low = d.float()[:, None] * s, -e.float()[:, None] * m
    return d, e, s, m, q


def _search_affine(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The best scale and minimum (at most 0) of each block, (S, B)."""
    n = x.shape[-1]
    least = x.amin(-1).clamp(max=0)
    width = x.amax(-1) - least
    sum_x, sum_xx = x.sum(-1), x.square().sum(-1)
    shifted = x - least[..., None]
    best = torch.full_like(width, torch.inf)
    scale, low = torch.zeros_like(width), torch.zeros_like(width)
    for start in torch.linspace(most - 1.0, most + 1.0, _STARTS).tolist():
        q = (shifted * (start * _inverse(width))[..., None]).round_().clamp_(0, most)
        sum_q, sum_qq, sum_xq = q.sum(-1), q.square().sum(-1), (q * x).sum(-1)
        spread = n * sum_qq - sum_q.square()  # 0 where all codes are the same
        inverse = _inverse(spread)
        a, b = (n * sum_xq - sum_x * sum_q) * inverse, (sum_qq * sum_x - sum_q * sum_xq) * inverse
        a = torch.where((b > 0) | (spread == 0), sum_xq * _inverse(sum_qq), a)
        b = b.clamp(max=0)
        error = sum_xx + a * (a * sum_qq + 2 * b * sum_q - 2 * sum_xq) + b * (n * b - 2 * sum_x)
        better = error < best
        best, scale, low = _chosen(better, (error, best), (a, scale), (b, low))
    return scale, low


def _integers_affine(
    x: Tensor, scale: Tensor, low: Tensor, d: Tensor, e: Tensor, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """s, m and q of the least error: s and m among the neighbours of the nearest."""
    s0, m0 = (scale * _inverse(d)[:, None]).round(), (-low * _inverse(e)[:, None]).round()
    best = torch.full_like(s0, torch.inf)
    s, m, q = torch.zeros_like(s0), torch.zeros_like(m0), torch.zeros_like(x)
    for ds in (0, -1, 1):
        for dm in (0, -1, 1):
            s1, m1 = (s0 + ds).clamp(0, 63), (m0 + dm).clamp(0, 63)
            step, offset = (d[:, None] * s1)[..., None], (e[:, None] * m1)[..., None]
            q1 = ((x + offset) * _inverse(step)).round_().clamp_(0, most)
            error = (q1 * step - offset - x).square_().sum(-1)
            better = error < best
            best, s, m = _chosen(better, (error, best), (s1, s), (m1, m))
            q = torch.where(better[..., None], q1, q)
    return s, m, q


def _units_affine(x: Tensor, s: Tensor, m: Tensor, q: Tensor, d: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """The best d and e for these codes, by least squares; the old ones where these are none."""
    first, second = (s[..., None] * q).flatten(1), m[..., None].expand_as(q).flatten(1)
    flat = x.flatten(1)
    aa, bb, ab = (first * first).sum(1), (second * second).sum(1), (first * second).sum(1)
    ax, bx = (first * flat).sum(1), (second * flat).sum(1)
    inverse = _inverse(aa * bb - ab * ab)
    d1, e1 = (ax * bb - bx * ab) * inverse, (ab * ax - aa * bx) * inverse
    fits = (d1 > 0) & (e1 >= 0)
    return torch.where(fits, d1, d.float()).half(), torch.where(fits, e1, e.float()).half()


# a scale for each block: x = d s q -----------------------------------------------------------------------------------


def _scaled(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d (S,) as float16, s (S, B) from -128 to 127, q (S, B, n) from -32 to 31."""
    scale = _search_scaled(x)
    largest = scale.gather(1, scale.abs().argmax(1, keepdim=True)).squeeze(1)
    d = (largest / -128).half()
    for turn in range(_ROUNDS):
        s, q = _integers_scaled(x, scale, d.float())
        if turn < _ROUNDS - 1:
            codes = s[..., None] * q
            units = (codes * x).sum((1, 2)) * _inverse(codes.square().sum((1, 2)))
            d = torch.where(units * d > 0, units, d.float()).half()
            scale = d.float()[:, None] * s
    return d, s, q


def _search_scaled(x: Tensor) -> Tensor:
    """The best scale of each block, (S, B): the largest magnitude is near -32 scales or 32."""
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    best, scale = torch.zeros_like(largest[..., 0]), torch.zeros_like(largest[..., 0])
    for start in torch.linspace(-33.0, -31.0, _STARTS).tolist():
        q = (x * (start * _inverse(largest))).round_().clamp_(-32, 31)
        sum_xq, sum_qq = (x * q).sum(-1), q.square().sum(-1)
        a = sum_xq * _inverse(sum_qq)
        better = a * sum_xq > best
        best, scale = torch.where(better, a * sum_xq, best), torch.where(better, a, scale)
    return scale


def _integers_scaled(x: Tensor, scale: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    s0 = (scale * _inverse(d)[:, None]).round()
    best, s, q = torch.full_like(s0, torch.inf), torch.zeros_like(s0), torch.zeros_like(x)
    for ds in (0, -1, 1):
        s1 = (s0 + ds).clamp(-128, 127)
        step = (d[:, None] * s1)[..., None]
        q1 = (x * _inverse(step)).round_().clamp_(-32, 31)
        error = (q1 * step - x).square_().sum(-1)
        better = error < best
        best, s = torch.where(better, error, best), torch.where(better, s1, s)
        q = torch.where(better[..., None], q1, q)
    return s, q


# bytes ---------------------------------------------------------------------------------------------------------------


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(len(values), -1).view(torch.uint8)


def _six_bits(s: Tensor, m: Tensor) -> Tensor:
    """Eight scales and eight minima of 6 bits in 12 bytes."""
    s, m = s.to(torch.uint8), m.to(torch.uint8)
    first = s[:, :4] | (s[:, 4:] >> 4) << 6
    second = m[:, :4] | (m[:, 4:] >> 4) << 6
    return torch.cat([first, second, (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4], 1)


def _nibbles(q: Tensor) -> Tensor:
    """Low nibbles of two blocks of 32 in 32 bytes."""
    pairs = (q & 15).view(-1, 4, 2, 32)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)


def _packed_q4(d: Tensor, e: Tensor, s: Tensor, m: Tensor, q: Tensor) -> Tensor:
    return torch.cat([_bytes(d), _bytes(e), _six_bits(s, m), _nibbles(q.to(torch.uint8))], 1)


def _packed_q5(d: Tensor, e: Tensor, s: Tensor, m: Tensor, q: Tensor) -> Tensor:
    codes = q.to(torch.uint8)
    fifth = torch.zeros(len(q), 32, dtype=torch.uint8)
    for block in range(8):
        fifth |= (codes[:, block] >> 4) << block
    return torch.cat([_bytes(d), _bytes(e), _six_bits(s, m), fifth, _nibbles(codes)], 1)


def _packed_q6(d: Tensor, s: Tensor, q: Tensor) -> Tensor:
    quarters = (q + 32).to(torch.uint8).view(-1, 2, 4, 32)  # of each half of a super-block
    low, high = quarters & 15, quarters >> 4
    nibbles = torch.stack([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], 2)
    pairs = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    return torch.cat([nibbles.flatten(1), pairs.flatten(1), _bytes(s.to(torch.int8)), _bytes(d)], 1)
