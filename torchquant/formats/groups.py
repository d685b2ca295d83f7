"""Weights (out, in, ...) in pieces that share what a format stores: one, output channels, or groups of neighbours.

Groups lie along the input axis. An affine grid has one scale for the group at all places of a convolution's window,
as torchao's affine ops have it (`spread`); a format of its own encodes the group at each place for itself (`cells_of`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchquant.errors import SchemeError

__all__ = ["cells_of", "spread", "storable", "weight_of"]


def cells_of(weight: torch.Tensor, axis: int | None, group_size: int | None) -> torch.Tensor:
    """A weight as float32 cells (cells, weights): one for all, one a channel of `axis`, or groups along the inputs.

    Raises:
        SchemeError: the inputs are no whole groups.
    """
    flat = weight.detach().float()
    if group_size is None:
        return flat.reshape(1, -1) if axis is None else flat.transpose(0, axis).flatten(1)
    _check_whole(flat.shape[1], group_size)
    return flat.movedim(1, -1).reshape(-1, group_size)


def weight_of(cells: torch.Tensor, shape: Sequence[int], axis: int | None, group_size: int | None) -> torch.Tensor:
    """The inverse of `cells_of` for a weight of `shape`."""
    if group_size is not None:
        return cells.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    if axis is None:
        return cells.reshape(tuple(shape))
    swapped = list(shape)
    swapped[0], swapped[axis] = swapped[axis], swapped[0]
    return cells.reshape(swapped).transpose(0, axis)


def storable(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float32 scales of groups as numbers of 16 bits, so that a kernel may hold them so.

    Of a weight in float32 they become numbers of float16, above zero, where none is too large; of another one of its
    own dtype.
    """
    if dtype == torch.float32:
        dtype = torch.float16 if bool((scale <= torch.finfo(torch.float16).max).all()) else dtype
    return scale.to(dtype).float().clamp(min=2.0**-24)


def spread(values: torch.Tensor, shape: Sequence[int], group_size: int) -> torch.Tensor:
    """`values` (out, groups) of an affine grid's groups, to be broadcast over a weight of `shape`.

    Raises:
        SchemeError: the inputs are no whole groups, or others than there are values for.
    """
    _check_whole(shape[1], group_size)
    if values.numel() != shape[0] * (shape[1] // group_size):
        raise SchemeError(f"{values.numel()} scales or zero points do not fit {tuple(shape)} in groups of {group_size}")
    rows = values.reshape(shape[0], -1).repeat_interleave(group_size, 1)
    return rows.reshape(*rows.shape, *[1] * (len(shape) - 2))


def _check_whole(inputs: int, group_size: int) -> None:
    if inputs % group_size:
        raise SchemeError(f"{inputs} input features are no whole groups of {group_size}; take another group size")
