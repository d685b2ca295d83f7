"""Keys and values in 8 or 4 bits, behind a Hadamard rotation of each head, which spreads outliers over the features.

    (q R) . (k R) = q . k    and    (p (v R)) RT = p v    for an orthogonal R (D, D)

so that only what is stored changes. Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", NeurIPS
2024, section 4 (stage 2). Codes of 8 bits are symmetric; those of 4 bits lie on the 16 levels of llama.cpp's Q4_0, the
lowest of which is the element of the largest magnitude, and share a byte with those of half a head further.

Legend: B batch, K key and value heads, D size of a head, L cache.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torchquant.errors import ExportError
from torchquant.language.key_value_cache import KeyValueCache

__all__ = ["QuantizedKeyValueCache", "hadamard"]

_GROUP = 32  # features that share a scale, where that divides the head
_LEAST_SCALE = 2.0**-24  # the smallest number of float16 above zero


def hadamard(size: int) -> Tensor:
    """An orthogonal (size, size): Hadamard blocks of the largest power of two that divides `size`."""
    block = torch.ones(1, 1)
    while size % (2 * len(block)) == 0:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return torch.block_diag(*[block / len(block) ** 0.5] * (size // len(block)))


class QuantizedKeyValueCache(KeyValueCache):
    """Codes of keys and values in buffers (B, K, L + 1, D), or (B, K, L + 1, D / 2) of 4 bits, and float16 scales.

    Args:
        shapes, max_cache_len, batch_size, dtype, device: as for `KeyValueCache`.
        bits: 8 or 4.
    """

    def __init__(
        self,
        shapes: list[tuple[int, int, int]],
        max_cache_len: int,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        bits: int,
    ) -> None:
        sizes = {size for _, *sizes in shapes for size in sizes}
        odd = [size for size in sizes if size * bits % 8]
        if odd:
            raise ExportError(f"heads of {odd[0]} features fill no whole bytes of {bits} bits; take cache_bits=8")
        self.bits = bits
        super().__init__(shapes, max_cache_len, batch_size, dtype, device)
        for size in sizes:
            self.register_buffer(f"rotation_{size}", hadamard(size).to(device, dtype), persistent=False)

    def stored(self, size: int) -> dict[str, tuple[int, torch.dtype]]:
        """Codes, and scales of groups."""
        codes = size * self.bits // 8, torch.int8 if self.bits == 8 else torch.uint8
        return {"": codes, "_scale": (size // _group(size), torch.float16)}

    def encoded(self, rows: Tensor) -> dict[str, Tensor]:
        """Codes and scales of rows (..., D)."""
        codes, scale = _encoded(rows, self.bits)
        return {"": codes, "_scale": scale}

    def decoded(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The rows (..., D) that codes and scales stand for."""
        return _decoded(parts[""], parts["_scale"], self.bits, self.dtype)

    def rotated(self, x: Tensor) -> Tensor:
        """x R of (..., D)."""
        rotation: Tensor = getattr(self, f"rotation_{x.shape[-1]}")
        return x @ rotation

    def restored(self, x: Tensor) -> Tensor:
        """x RT of (..., D): R is symmetric, and so its own inverse."""
        return self.rotated(x)


def _group(size: int) -> int:
    return _GROUP if size % _GROUP == 0 else size


def _encoded(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes as they are stored, and scales, of (..., D)."""
    groups = x.float().unflatten(-1, (-1, _group(x.shape[-1])))
    most, least = groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True)
    if bits == 8:
        scale = (torch.maximum(most, -least) / 127).clamp(min=_LEAST_SCALE).to(torch.float16)
        codes = torch.round(groups / scale.float()).clamp(-127, 127).flatten(-2)
        return codes.to(torch.int8), scale.squeeze(-1)
    largest = torch.where(most >= -least, most, least)
    scale = torch.where(largest.abs() < 8 * _LEAST_SCALE, 8 * _LEAST_SCALE, largest / -8).to(torch.float16)
    codes = (torch.round(groups / scale.float()).clamp(-8, 7) + 8).flatten(-2)
    low, high = codes.chunk(2, -1)
    return (low + 16 * high).to(torch.uint8), scale.squeeze(-1)


def _decoded(codes: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The numbers (..., D) that codes and scales stand for."""
    if bits == 8:
        levels = codes.to(torch.float32)
    else:  # without a shift, which ExecuTorch lacks
        low, high = (torch.bitwise_and(codes, mask).to(torch.float32) for mask in (15, 240))
        levels = torch.cat([low, high / 16], -1) - 8
    groups = levels.unflatten(-1, (scale.shape[-1], -1))
    return (groups * scale.float().unsqueeze(-1)).flatten(-2).to(dtype)
