"""Rotary embeddings read from a table: a row a position, instead of sines and cosines in each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.errors import ExportError

__all__ = ["RotaryTable"]

_BY_LENGTH = ("dynamic", "longrope")  # frequencies that change with the length of the sequence


class RotaryTable(nn.Module):
    """In the place of a `...RotaryEmbedding` of transformers: the same cosines and sines, up to `max_cache_len`.

    Raises:
        ExportError: the frequencies depend on the length of the sequence, and the cache is longer than that from which
            they change.
    """

    def __init__(self, rotary: nn.Module, max_cache_len: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        _refuse_by_length(rotary, max_cache_len)
        positions = torch.arange(max_cache_len, device=device).unsqueeze(0)
        like = torch.zeros(1, dtype=dtype, device=device)
        kinds = getattr(rotary, "layer_types", None)  # with frequencies of their own, or one for all layers
        with torch.no_grad():
            for kind in kinds if isinstance(getattr(rotary, "rope_type", None), dict) and kinds else [None]:
                tables = rotary(like, positions, *([] if kind is None else [kind]))
                for name, table in zip(("cos", "sin"), tables, strict=True):
                    self.register_buffer(f"{name}_{kind or 'all'}", table[0].clone(), persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines (1, T, D) of `position_ids` (B, T), whose rows are equal; `x` is not read."""
        rows = position_ids[0]
        cos, sin = (getattr(self, f"{name}_{layer_type or 'all'}") for name in ("cos", "sin"))
        return cos.index_select(0, rows).unsqueeze(0), sin.index_select(0, rows).unsqueeze(0)


def _refuse_by_length(rotary: nn.Module, max_cache_len: int) -> None:
    parameters: Any = getattr(getattr(rotary, "config", None), "rope_parameters", None) or {}
    several = [p for p in parameters.values() if isinstance(p, Mapping)]
    for one in several or [parameters]:
        original: Any = one.get("original_max_position_embeddings", getattr(rotary, "original_max_seq_len", 0))
        if one.get("rope_type") in _BY_LENGTH and max_cache_len > original:
            raise ExportError(
                f"{type(rotary).__name__} changes its frequencies beyond {original} positions, and the graph of a "
                f"static cache cannot; export with max_cache_len={original} or less"
            )
