"""Where a convolution reads: its kernel, stride, padding and dilation, however they were written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from torchquant.fx import ops

__all__ = ["Window", "is_spatial_pad", "window_of"]


@dataclass(frozen=True)
class Window:
    """A number for each axis of the image; of padding two, in front and behind."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @property
    def one_pixel(self) -> bool:
        """Whether each result comes from one pixel: a matrix product, if the convolution has one group."""
        return all(size == 1 for size in self.kernel) and not any(map(any, self.padding))

    @property
    def uneven(self) -> tuple[int, ...]:
        """How much more padding there is behind than in front."""
        return tuple(behind - front for front, behind in self.padding)

    def planar(self) -> Window:
        """In two dimensions: a line is an image of height 1."""
        if len(self.kernel) == 2:
            return self
        return Window((1, *self.kernel), (1, *self.stride), ((0, 0), *self.padding), (1, *self.dilation))


def window_of(node: Node, kernel: Sequence[int]) -> Window:
    """The window of a convolution whose weight is (out, in, *kernel)."""
    arguments, rank = ops.arguments(node), len(kernel)
    stride, dilation = (_each(arguments.get(name, 1), rank) for name in ("stride", "dilation"))
    padding = arguments.get("padding", 0)
    if padding == "same":
        totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        pairs = tuple((total // 2, total - total // 2) for total in totals)
    else:
        pairs = tuple((size, size) for size in _each(0 if padding == "valid" else padding, rank))
    return Window(tuple(kernel), stride, pairs, dilation)


def is_spatial_pad(node: Node) -> bool:
    """Whether an op pads with zeros the spatial axes of an image or a sequence."""
    arguments = ops.arguments(node)
    sizes, rank = arguments.get("pad", ()), len(ops.shape_of(node) or ())
    zeros = arguments.get("mode", "constant") == "constant" and not arguments.get("value", 0)
    known = all(isinstance(s, int) and s >= 0 for s in sizes) and not any(sizes[2 * (rank - 2) :])
    return ops.op_name(node) == "pad" and zeros and known


def _each(value: Any, rank: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * rank if len(values) == 1 else values
