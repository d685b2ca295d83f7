"""Keys and values in 8 or 4 bits, behind a Hadamard rotation of each head, which spreads outliers over the features.

    (q R) . (k R) = q . k    and    (p (v R)) RT = p v    for an orthogonal R (D, D)

so that only what is stored changes. Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", NeurIPS
2024, section 4 (stage 2). Codes of 8 bits are symmetric; those of 4 bits lie on the 16 levels of llama.cpp's Q4_0, the
lowest of which is the element of the largest magnitude, and share a byte with those of half a head further.

Legend: B batch, K key and value heads, T new tokens, S positions that are read, D size of a head, L cache.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchquant.errors import ExportError

__all__ = ["QuantizedKeyValueCache", "hadamard"]

_GROUP = 32  # features that share a scale, where that divides the head
_LEAST_SCALE = 2.0**-24  # the smallest number of float16 above zero


def hadamard(size: int) -> Tensor:
    """An orthogonal (size, size): Hadamard blocks of the largest power of two that divides `size`."""
    block = torch.ones(1, 1)
    while size % (2 * len(block)) == 0:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return torch.block_diag(*[block / len(block) ** 0.5] * (size // len(block)))


class QuantizedKeyValueCache(nn.Module):
    """Codes of keys and values in buffers (B, K, L + 1, D), or (B, K, L + 1, D / 2) of 4 bits, and float16 scales.

    Args:
        shapes: for each layer (K, size of a key, size of a value).
        max_cache_len, batch_size: L and B.
        dtype, device: of keys and values as the model has them.
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
        super().__init__()
        self.layers, self.bits, self.dtype = len(shapes), bits, dtype
        odd = [size for _, *sizes in shapes for size in sizes if size * bits % 8]
        if odd:
            raise ExportError(f"heads of {odd[0]} features fill no whole bytes of {bits} bits; take cache_bits=8")
        for i, (heads, *sizes) in enumerate(shapes):
            for kind, size in zip(("keys", "values"), sizes, strict=True):
                rows = batch_size, heads, max_cache_len + 1
                stored = {"": (size * bits // 8, torch.int8 if bits == 8 else torch.uint8)}
                stored |= {"_scale": (size // _group(size), torch.float16)}
                for ending, (columns, of) in stored.items():
                    empty = torch.zeros(*rows, columns, dtype=of, device=device)
                    self.register_buffer(f"{kind}_{i}{ending}", empty, persistent=False)
        for size in {size for _, *sizes in shapes for size in sizes}:
            rotation = hadamard(size).to(device, dtype)
            self.register_buffer(f"rotation_{size}", rotation, persistent=False)

    def rotated(self, x: Tensor) -> Tensor:
        """x R of (..., D)."""
        rotation: Tensor = getattr(self, f"rotation_{x.shape[-1]}")
        return x @ rotation

    def restored(self, x: Tensor) -> Tensor:
        """x RT of (..., D): R is symmetric, and so its own inverse."""
        return self.rotated(x)

    def update(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Write the new rows (B, K, T, D) at `positions` (T,); return the first `count` (B, K, S, D), rotated."""
        rows = []
        for kind, new in (("keys", keys), ("values", values)):
            codes, scale = _encoded(self.rotated(new), self.bits)
            stored = []
            for ending, part in (("", codes), ("_scale", scale)):
                cache = getattr(self, f"{kind}_{layer}{ending}")
                cache.index_copy_(2, positions, part)
                stored.append(cache.narrow(2, 0, count))
            rows.append(_decoded(stored[0], stored[1], self.bits, self.dtype))
        return rows[0], rows[1]


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
