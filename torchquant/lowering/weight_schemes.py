"""Schemes whose weights have few bits, by name, as every target that runs them calls them."""

from __future__ import annotations

from collections.abc import Sequence

from torchquant.formats.integer import INT2, INT3, INT4, INT8, INT8_NARROW
from torchquant.types import Format, Scheme, TensorSpec

__all__ = ["GROUP_SIZES", "weight_schemes"]

GROUP_SIZES = (256, 128, 64, 32, 16)
_FORMATS = {8: INT8, 4: INT4, 3: INT3, 2: INT2}
_BYTES_BY_ROW = TensorSpec(INT8_NARROW, symmetric=True, granularity="token", dynamic=True)


def weight_schemes(
    bits: Sequence[int] = (8, 4, 3, 2), group_sizes: Sequence[int] = GROUP_SIZES, *, activations: bool = False
) -> dict[str, Scheme]:
    """`w4_g64`: affine, groups of 64 input features; `w4`: per output channel; `w4_symmetric_g64`: no zero points.

    Args:
        activations: also `w4a8_g64` and the like, whose activations have 8 bits, chosen at run time for each row.
    """
    schemes = {}
    for ending, spec in (("", None), ("a8", _BYTES_BY_ROW)) if activations else (("", None),):
        for width in bits:
            for symmetric in (False, True):
                name = f"w{width}{ending}_symmetric" if symmetric else f"w{width}{ending}"
                for group_size in (None, *group_sizes):
                    full = name if group_size is None else f"{name}_g{group_size}"
                    schemes[full] = Scheme(full, spec, _weight(_FORMATS[width], symmetric, group_size))
    return schemes


def _weight(format: Format, symmetric: bool, group_size: int | None) -> TensorSpec:
    if symmetric and format is INT8:
        format = INT8_NARROW
    return TensorSpec(format, symmetric, "channel" if group_size is None else "group", group_size=group_size)
