"""How a convolution or linear is a matrix product: its weight as a matrix, its input as columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from torchquant.errors import SchemeError
from torchquant.fx import ops

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """How a convolution or linear is a matrix product.

    Args:
        shape: of the weight.
        groups, stride, padding, dilation: of the convolution; all empty for a linear.
        transposed: weight (in, out / groups, ...).
    """

    shape: torch.Size
    groups: int = 1
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    transposed: bool = False

    @staticmethod
    def of(node: Node, shape: torch.Size) -> Layout:
        """The layout of a conv or linear node with a weight of `shape`.

        Raises:
            SchemeError: the op has no such form.
        """
        name, rank = ops.op_name(node), len(shape) - 2
        arguments = ops.arguments(node)
        if name == "linear":
            return Layout(shape)
        if not name.startswith("conv") or arguments.get("transposed"):
            raise SchemeError(f"{node.name}: {name} is not a matrix product that a Gram matrix describes")
        padding = arguments.get("padding", 0)
        return Layout(
            shape,
            arguments.get("groups", 1),
            _each(arguments.get("stride", 1), rank),
            padding if isinstance(padding, str) else _each(padding, rank),
            _each(arguments.get("dilation", 1), rank),
            _each(arguments.get("output_padding", 0), rank),
            transposed="transpose" in name,
        )

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """(g, o, k) of a tensor in the weight's shape."""
        if not self.stride:
            return weight.reshape(1, self.shape[0], -1)
        if not self.transposed:
            return weight.reshape(self.groups, self.shape[0] // self.groups, -1)
        parts = weight.reshape(self.groups, self.shape[0] // self.groups, *self.shape[1:])
        turned = parts.flip(tuple(range(3, parts.ndim))).transpose(1, 2)
        return turned.reshape(self.groups, self.shape[1], -1)

    def tensor(self, matrix: torch.Tensor) -> torch.Tensor:
        """The tensor in the weight's shape of a matrix (g, o, k)."""
        if not self.transposed:
            return matrix.reshape(self.shape)
        inside = self.shape[0] // self.groups
        parts = matrix.reshape(self.groups, self.shape[1], inside, *self.shape[2:]).transpose(1, 2)
        return parts.flip(tuple(range(3, parts.ndim))).reshape(self.shape)

    def columns(self, x: torch.Tensor) -> torch.Tensor:
        """The inputs of every output place as columns (g, k, samples)."""
        return self._unfolded(x) if not self.stride else self._flat(self._windows(x))

    def pieces(self, x: torch.Tensor, elements: int) -> Iterator[torch.Tensor]:
        """The same columns, some at a time: of so many elements at most, or those of one row of places."""
        if not self.stride:
            rows = x.reshape(-1, x.shape[-1])
            yield from map(self._unfolded, rows.split(max(1, elements // max(1, rows.shape[1]))))
            return
        samples = 1
        if len(x):
            samples = max(1, elements // max(1, self._windows(x[:1]).numel()))
        for part in x.split(samples):
            windows = self._windows(part)
            lines = windows.shape[3]
            for some in windows.split(max(1, elements * lines // max(1, windows.numel())), 3):
                yield self._flat(some)

    def _unfolded(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(1, -1, x.shape[-1]).transpose(1, 2)

    def _windows(self, x: torch.Tensor) -> torch.Tensor:
        """A view (n, g, channels, *places, *kernel) of the padded input."""
        x = self._padded(x)
        kernel = self.shape[2:]
        stride = (1,) * len(kernel) if self.transposed else self.stride
        for axis, (size, step, apart) in enumerate(zip(kernel, stride, self.dilation, strict=True), start=2):
            x = x.unfold(axis, apart * (size - 1) + 1, step)[..., ::apart]
        n, c = x.shape[:2]
        return x.reshape(n, self.groups, c // self.groups, *x.shape[2:])

    def _flat(self, windows: torch.Tensor) -> torch.Tensor:
        rank = len(self.shape) - 2
        places, inside = range(3, 3 + rank), range(3 + rank, 3 + 2 * rank)
        x = windows.permute(1, 2, *inside, 0, *places)
        return x.reshape(self.groups, windows.shape[2] * self.shape[2:].numel(), -1)

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        kernel = self.shape[2:]
        reach = [d * (k - 1) for d, k in zip(self.dilation, kernel, strict=True)]
        if self.transposed:
            assert not isinstance(self.padding, str)
            for axis, step in enumerate(self.stride, start=2):
                x = _spread(x, axis, step)
            sides = [(r - p, r - p + o) for r, p, o in zip(reach, self.padding, self.output_padding, strict=True)]
        elif self.padding == "same":
            sides = [(r // 2, r - r // 2) for r in reach]
        else:
            sides = [(p, p) for p in ([0] * len(kernel) if isinstance(self.padding, str) else self.padding)]
        if not any(n for side in sides for n in side):
            return x
        return torch.nn.functional.pad(x, [n for side in reversed(sides) for n in side])


def _spread(x: torch.Tensor, axis: int, step: int) -> torch.Tensor:
    """Zeros between neighbours, as a transposed convolution sees its input."""
    if step == 1:
        return x
    shape = list(x.shape)
    shape[axis] = (shape[axis] - 1) * step + 1
    wide = x.new_zeros(shape)
    wide[(slice(None),) * axis + (slice(None, None, step),)] = x
    return wide


def _each(value: Any, rank: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * rank if len(values) == 1 else values
