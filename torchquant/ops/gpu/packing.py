"""How quantized weights lie in GPU memory.

The K axis is cut into blocks of 128 codes, a block into four chunks of 32. Blocks come first and outputs second, so
that what one program reads at a time lies together. Four-bit codes are stored plus 8; element j of a block's 32 int16
holds the j-th code of each of the four chunks, the first in the lowest bits: an element unpacks into one operand of
four products of 32 columns each, with no exchange between threads. Of eight-bit codes an int16 holds two, of the chunks
0 and 1 or 2 and 3.

Scale and zero point of a group of weights lie side by side, and are read as one word of four bytes.
"""

from __future__ import annotations

import torch

__all__ = ["BLOCK", "CHUNK", "pack_params", "pack_weight", "unpack_params", "unpack_weight"]

BLOCK = 128
CHUNK = 32
_PARTS = BLOCK // CHUNK


def pack_weight(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (N, K) int8, signed, as kernels read them; K is filled up to a multiple of 128 with zeros.

    Returns:
        int16, (K / 128, N, 32) for 4 bits and (K / 128, 2, N, 32) for 8 bits.

    Raises:
        ValueError: another number of bits, or codes that do not fit it.
    """
    if bits not in (4, 8):
        raise ValueError(f"weights are packed in 4 or 8 bits, not {bits}")
    low, high = (int(v) for v in torch.aminmax(codes)) if codes.numel() else (0, 0)
    if not -(2 ** (bits - 1)) <= low <= high < 2 ** (bits - 1):
        raise ValueError(f"codes from {low} to {high} do not fit {bits} signed bits")
    n, k = codes.shape
    filled = torch.nn.functional.pad(codes.to(torch.int8), (0, -k % BLOCK))
    parts = filled.reshape(n, -1, _PARTS, CHUNK).permute(1, 2, 0, 3).to(torch.int32).contiguous()
    if bits == 8:
        return ((parts[:, ::2] & 255) | parts[:, 1::2] << 8).to(torch.int16).contiguous()
    words = torch.zeros_like(parts[:, 0])
    for i in range(_PARTS):
        words |= parts[:, i] + 8 << 4 * i
    return words.to(torch.int16)  # keeps the lower 16 bits


def unpack_weight(packed: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """The codes (N, k) int8 that `pack_weight` packed."""
    words = packed.to(torch.int32)
    if bits == 8:
        parts = torch.stack((words, words >> 8), 2).flatten(1, 2)  # (blocks, chunk, N, 32)
    else:
        parts = torch.stack([(words >> 4 * i & 15) - 8 for i in range(_PARTS)], 1)
    return parts.to(torch.int8).permute(2, 0, 1, 3).flatten(1)[:, :k]


def pack_params(scale: torch.Tensor, zero_point: torch.Tensor | None = None) -> torch.Tensor:
    """Scale and zero point (N, groups) as kernels read them: (groups, N, 2) in the scale's dtype.

    The scale's dtype is that of the activations the weight will be multiplied with.
    """
    zero = torch.zeros_like(scale) if zero_point is None else zero_point.to(scale.dtype)
    return torch.stack((scale.t(), zero.t()), -1).contiguous()


def unpack_params(params: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point, each (N, groups), as views."""
    return params[..., 0].t(), params[..., 1].t()
