"""Formats of weights that are no affine grid: whoever writes one says how to encode, how to decode, and no more.

A converted graph holds a weight's codes and what its cells have in common as buffers, and one op that decodes them,
`torchquant::dequantize_encoded`, which looks the format up by its name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torchquant.errors import SchemeError
from torchquant.formats.groups import weight_of
from torchquant.types import Format

__all__ = ["EncodedFormat", "dequantize_encoded", "encoded", "format_named", "registered"]

_REGISTERED: dict[str, EncodedFormat] = {}


@dataclass(frozen=True)
class EncodedFormat(Format, ABC):
    """A format whose codes stand for values of its own.

    A weight is cut into cells (the whole, output channels, or groups of neighbours), which have something in common: a
    scale, say. Making an object registers it under its name.

    Raises:
        SchemeError: another format has the name.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if _REGISTERED.setdefault(self.name, self) != self:
            raise SchemeError(f"there is another format named {self.name!r}; choose another name")

    @property
    def is_affine(self) -> bool:
        return False

    @abstractmethod
    def encode(self, cells: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What is stored of float32 `cells` (cells, weights): the codes first, then what each cell has in common.

        Each (cells, ...), of any dtype; codes may be packed.
        """

    @abstractmethod
    def decode(self, *stored: torch.Tensor) -> torch.Tensor:
        """The float32 values (cells, weights) of what `encode` returned.

        Where packing needs more weights than a cell has, the values may be more: those at the end are dropped.
        """

    def bits_per_weight(self, cell: int, *, symmetric: bool = True) -> float:
        """Exactly, from what `encode` stores of one cell."""
        return sum(8 * part.numel() * part.element_size() for part in self.encode(torch.ones(1, cell))) / cell


def registered() -> tuple[str, ...]:
    """Names of the formats that this process knows."""
    return tuple(sorted(_REGISTERED))


def format_named(name: str) -> EncodedFormat:
    """The format of a name; raises SchemeError if nothing has been imported that defines it."""
    if name not in _REGISTERED:
        known = ", ".join(registered()) or "none"
        raise SchemeError(f"no format {name!r} is registered ({known}): import the module that defines it first")
    return _REGISTERED[name]


def encoded(format: EncodedFormat, cells: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What `format` stores of cells, decoded once to see that they come back.

    Raises:
        SchemeError: the format's own code fails, or breaks its contract.
    """
    what = f"format {format.name!r}, cells of shape {tuple(cells.shape)}"
    try:
        stored = format.encode(cells)
        broken = _broken(stored, len(cells))
        values = None if broken else _decoded(format, *stored, width=cells.shape[1])
    except SchemeError as error:
        raise SchemeError(f"{what}: {error}") from error
    except Exception as error:
        raise SchemeError(f"{what}: its code raises {type(error).__name__}: {error}") from error
    if values is not None and not bool(values.isfinite().all()):
        broken = "decode returns values that are not finite"
    if broken:
        raise SchemeError(f"{what}: {broken}")
    return tuple(part.detach() for part in stored)


def _broken(stored: object, count: int) -> str:
    """What is wrong with the result of `encode`; empty if nothing is."""
    if not isinstance(stored, (tuple, list)):
        return f"encode returns {type(stored).__name__}, not a tuple of tensors"
    if others := {type(part).__name__ for part in stored if not isinstance(part, torch.Tensor)}:
        return f"encode returns {', '.join(sorted(others))} where it must return tensors"
    shapes = [tuple(part.shape) for part in stored]
    if not shapes or any(shape[:1] != (count,) for shape in shapes):
        return f"encode returns tensors of shapes {shapes}; the first size of each must be {count}, the number of cells"
    return ""


def _decoded(format: EncodedFormat, *stored: torch.Tensor, width: int) -> torch.Tensor:
    """The values (cells, width), without those that packing added; raises SchemeError if there are too few."""
    values = format.decode(*stored)
    if values.ndim != 2 or len(values) != len(stored[0]) or values.shape[1] < width:
        raise SchemeError(f"decode returns shape {tuple(values.shape)}, not ({len(stored[0])}, {width})")
    return values[:, :width]


def dequantize_encoded(
    codes: torch.Tensor,
    rest: list[torch.Tensor],
    format: str,
    shape: Sequence[int],
    axis: int | None,
    group_size: int | None,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    """The weight of `shape` that codes and what their cells have in common stand for, in `output_dtype`."""
    width = group_size or math.prod(shape) // (1 if axis is None else shape[axis])
    cells = _decoded(format_named(format), codes, *rest, width=width)
    return weight_of(cells, shape, axis, group_size).to(output_dtype).contiguous()


_LIBRARY = torch.library.Library("torchquant", "FRAGMENT")
_LIBRARY.define(
    "dequantize_encoded(Tensor codes, Tensor[] rest, str format, int[] shape, int? axis, int? group_size, "
    "ScalarType output_dtype) -> Tensor"
)
# opaque to tracing: a format may decode in ways that no graph can hold
_LIBRARY.impl("dequantize_encoded", dequantize_encoded, "CompositeExplicitAutograd")
torch.library.register_fake(
    "torchquant::dequantize_encoded",
    lambda codes, rest, format, shape, axis, group_size, output_dtype: codes.new_empty(shape, dtype=output_dtype),
)
