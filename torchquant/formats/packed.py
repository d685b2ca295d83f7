"""Codes of fewer than 8 bits side by side, and the ops with which a converted graph reads what it stores narrow.

Codes (n,) of b bits less the lowest code are cut into planes of 4, 2 and 1 bits, as many as b is the sum of. A plane of
w bits has 8 / w fields in a byte; field i holds the i-th of 8 / w equal parts of the codes, so that to unpack one is a
shift, and nothing is interleaved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

__all__ = ["LARGEST_BITS", "bits_of", "pack_codes", "unpack_codes"]

LARGEST_BITS = 7  # wider codes take a byte in any case
_WIDTHS = (4, 2, 1)


def bits_of(low: int, high: int) -> int:
    """Bits of codes from `low` to `high`."""
    return (high - low).bit_length()


def pack_codes(codes: torch.Tensor, bits: int, low: int) -> torch.Tensor:
    """Integer codes of any shape, from `low` to `low + 2 ** bits - 1`, as bytes: uint8 (ceil(n / 8) * bits,)."""
    fields = (codes.reshape(-1) - low).to(torch.uint8)
    fields = torch.nn.functional.pad(fields, (0, -fields.numel() % 8))
    planes = []
    for width, shift in _planes(bits):
        parts = ((fields >> shift) & (2**width - 1)).view(8 // width, -1)
        plane = parts[0].clone()
        for i in range(1, len(parts)):
            plane |= parts[i] << (width * i)
        planes.append(plane)
    return torch.cat(planes)


def unpack_codes(packed: torch.Tensor, bits: int, low: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The codes of `shape` and `dtype` that `pack_codes` was given."""
    count = math.prod(shape)
    eighth, start = -(-count // 8), 0
    codes = torch.zeros(8 * eighth, dtype=torch.uint8, device=packed.device)
    for width, shift in _planes(bits):
        plane, parts = packed[start : start + width * eighth], codes.view(8 // width, -1)
        for i in range(len(parts)):
            parts[i] |= ((plane >> (width * i)) & (2**width - 1)) << shift
        start += width * eighth
    return codes[:count].to(dtype).add_(low).view(tuple(shape))


def _planes(bits: int) -> Iterator[tuple[int, int]]:
    """Width of each plane, and how far its fields are shifted within a code."""
    shift = 0
    for width in _WIDTHS:
        if bits & width:
            yield width, shift
            shift += width


_LIBRARY = torch.library.Library("torchquant", "FRAGMENT")
_LIBRARY.define("unpack_codes(Tensor packed, int bits, int low, int[] shape, ScalarType dtype) -> Tensor")
_LIBRARY.impl("unpack_codes", unpack_codes, "CompositeExplicitAutograd")
torch.library.register_fake(
    "torchquant::unpack_codes",
    lambda packed, bits, low, shape, dtype: packed.new_empty(shape, dtype=dtype),
)
# scales and zero points of groups that are numbers of a narrower dtype; an op of its own, so that readers know it
_LIBRARY.define("widen(Tensor narrow, ScalarType dtype) -> Tensor")
_LIBRARY.impl("widen", lambda narrow, dtype: narrow.to(dtype, copy=True), "CompositeExplicitAutograd")
torch.library.register_fake("torchquant::widen", lambda narrow, dtype: torch.empty_like(narrow, dtype=dtype))
