"""Keys and values of a decoder in buffers of fixed size, and what others may make of it: store something else.

Legend: B batch, K key and value heads, T new tokens, S positions that are read, D size of a head, L cache.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["KeyValueCache"]


class KeyValueCache(nn.Module):
    """Keys and values of all layers in buffers `keys_i` and `values_i` of (B, K, L + 1, D).

    The last row is never used: with it a view of S <= L rows is never contiguous, so that torch.export need not tell
    the full cache from others.

    Args:
        shapes: for each layer (K, size of a key, size of a value).
        max_cache_len, batch_size: L and B.
        dtype, device: of keys and values.
    """

    def __init__(
        self,
        shapes: list[tuple[int, int, int]],
        max_cache_len: int,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.layers, self.dtype = len(shapes), dtype
        for i, (heads, *sizes) in enumerate(shapes):
            for kind, size in zip(("keys", "values"), sizes, strict=True):
                for ending, (columns, stored_dtype) in self.stored(size).items():
                    shape = batch_size, heads, max_cache_len + 1, columns
                    empty = torch.zeros(shape, dtype=stored_dtype, device=device)
                    self.register_buffer(f"{kind}_{i}{ending}", empty, persistent=False)

    def update(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Write the new rows (B, K, T, D) at `positions` (T,), and return the first `count` rows (B, K, S, D).

        They are rotated, as `rotated` does it.
        """
        rows = []
        for kind, new in (("keys", keys), ("values", values)):
            parts = {}
            for ending, part in self.encoded(self.rotated(new)).items():
                cache = getattr(self, f"{kind}_{layer}{ending}")
                cache.index_copy_(2, positions, part)
                parts[ending] = cache.narrow(2, 0, count)
            rows.append(self.decoded(parts))
        return rows[0], rows[1]

    def stored(self, size: int) -> dict[str, tuple[int, torch.dtype]]:
        """What is kept of rows of `size`: ending of the buffer's name -> columns and dtype."""
        return {"": (size, self.dtype)}

    def encoded(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows (..., D) as they are kept, by ending of the buffer's name."""
        return {"": rows}

    def decoded(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The rows (..., D) that are kept so."""
        return parts[""]

    def rotated(self, x: Tensor) -> Tensor:
        """x R of (..., D), R orthogonal: here as it is."""
        return x

    def restored(self, x: Tensor) -> Tensor:
        """The inverse of `rotated`."""
        return x
