"""Schemes whose weights have few bits, by name, as every target that runs them calls them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from torchquant.formats.integer import INT2, INT3, INT4, INT8, INT8_NARROW
from torchquant.types import Format, Scheme, TensorSpec

__all__ = ["GROUP_SIZES", "weight_schemes"]

GROUP_SIZES = (256, 128, 64, 32, 16)
_FORMATS = {8: INT8, 4: INT4, 3: INT3, 2: INT2}


def weight_schemes(
    bits: Sequence[int] = (8, 4, 3, 2),
    group_sizes: Sequence[int] = GROUP_SIZES,
    *,
    activations: Sequence[TensorSpec | None] = (None,),
    symmetric: Sequence[bool] = (False, True),
    scale_dtype: torch.dtype | None = None,
) -> dict[str, Scheme]:
    """`w4_g64`: affine, groups of 64 input features; `w4`: per output channel; `w4_symmetric_g64`: no zero points.

    Args:
        activations: a spec instead of None makes `w4a8_g64` and the like, whose activations have 8 bits.
        symmetric: without zero points, with, or both.
        scale_dtype: what the target stores the scales of groups in; None: it has a choice.
    """
    schemes = {}
    for activation, width, is_symmetric in itertools.product(activations, bits, symmetric):
        name = f"w{width}{'' if activation is None else 'a8'}{'_symmetric' if is_symmetric else ''}"
        for group_size in (None, *group_sizes):
            full = name if group_size is None else f"{name}_g{group_size}"
            weight = _weight(_FORMATS[width], is_symmetric, group_size, scale_dtype)
            schemes[full] = Scheme(full, activation, weight)
    return schemes


def _weight(format: Format, symmetric: bool, group_size: int | None, scale_dtype: torch.dtype | None) -> TensorSpec:
    if symmetric and format is INT8:
        format = INT8_NARROW
    if group_size is None:
        return TensorSpec(format, symmetric, "channel")
    return TensorSpec(format, symmetric, "group", group_size=group_size, scale_dtype=scale_dtype)
