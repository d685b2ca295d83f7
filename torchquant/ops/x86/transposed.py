"""Transposed convolutions as convolutions of their phases.

Output pixels whose places leave the same remainder by the stride are a convolution of the input, with every stride-th
tap of the kernel. All phases together are one convolution that moves by one, whose output channels are the phases of a
pixel; its blocks of channels then become pixels. Zeros are multiplied only where a phase has fewer taps than others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from torchquant.fx import ops

__all__ = ["NAMES", "Phases", "phases_of"]

NAMES = ("conv_transpose1d", "conv_transpose2d")


@dataclass(frozen=True)
class Axis:
    """One direction: `stride` phases, `taps` of the convolution that starts `before` pixels ahead of the input.

    Args:
        crop: pixels of the result in front of the output.
        places: (phase, tap of the convolution) for each tap of the kernel.
    """

    stride: int
    taps: int
    before: int
    crop: int
    places: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, size: int, stride: int, padding: int, dilation: int) -> Axis:
        """For a kernel of `size` taps: the crop with which the convolution has fewest taps, then the least crop."""
        return min(
            (cls._cropped(size, stride, padding, dilation, crop) for crop in range(stride)), key=lambda a: a.taps
        )

    @classmethod
    def _cropped(cls, size: int, stride: int, padding: int, dilation: int, crop: int) -> Axis:
        """Output q * stride + phase - crop reads input q + shift by the tap at input * stride + tap * dilation."""
        offsets = [k * dilation - padding + crop for k in range(size)]
        phases = [offset % stride for offset in offsets]
        shifts = [(phase - offset) // stride for phase, offset in zip(phases, offsets, strict=True)]
        first, last = min(0, *shifts), max(0, *shifts)  # with the pixel itself, so that a border lies around the input
        places = tuple((phase, shift - first) for phase, shift in zip(phases, shifts, strict=True))
        return cls(stride, last - first + 1, -first, crop, places)

    def pixels(self, size: int) -> int:
        """Of the convolution's result, for an output of `size`."""
        return -(-(size + self.crop) // self.stride)


@dataclass(frozen=True)
class Phases:
    """Both directions, for `groups` groups of `outputs` channels."""

    rows: Axis
    columns: Axis
    groups: int
    outputs: int

    @property
    def window(self) -> dict[str, int]:
        """Of the convolution, as `matching.window_of` gives it."""
        taps = {"kh": self.rows.taps, "kw": self.columns.taps, "pt": self.rows.before, "pl": self.columns.before}
        return {**taps, "sh": 1, "sw": 1, "dh": 1, "dw": 1}

    @property
    def blocks(self) -> dict[str, int]:
        """How blocks of channels become pixels, as the op of plan.h takes it."""
        stride, crop = (self.rows.stride, self.columns.stride), (self.rows.crop, self.columns.crop)
        return {"sh": stride[0], "sw": stride[1], "pt": crop[0], "pl": crop[1], "group_out": self.outputs}

    @property
    def cells(self) -> int:
        """Pixels that a pixel of the convolution's result becomes."""
        return self.rows.stride * self.columns.stride

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """What each channel `(groups * outputs,)`, or each within a group `(outputs,)`, has, for all phases."""
        by_group = values.expand(self.groups * self.outputs) if values.numel() == 1 else values
        by_group = by_group.reshape(-1, 1, self.outputs)
        return by_group.expand(self.groups, self.cells, self.outputs).reshape(-1)

    def weight(self, codes: torch.Tensor) -> torch.Tensor:
        """int8 `(inputs, outputs, kh, kw)` as `(groups * phases * outputs, inputs of a group, rows, columns)`."""
        inputs, outputs = len(codes) // self.groups, self.outputs
        grouped = codes.reshape(self.groups, inputs, outputs, len(self.rows.places), len(self.columns.places))
        form = (self.groups, self.rows.stride, self.columns.stride, outputs, inputs, self.rows.taps, self.columns.taps)
        weight = torch.zeros(form, dtype=codes.dtype)
        for ky, (row, y) in enumerate(self.rows.places):
            for kx, (column, x) in enumerate(self.columns.places):
                weight[:, row, column, :, :, y, x] = grouped[..., ky, kx].transpose(1, 2)
        return weight.reshape(-1, inputs, self.rows.taps, self.columns.taps)


def phases_of(node: Node) -> Phases | None:
    """The phases of a transposed convolution whose kernel is known; None for every other op."""
    if ops.op_name(node) not in NAMES:
        return None
    arguments = ops.arguments(node)
    shape, groups, flat = (
        ops.shape_of(arguments["weight"]),
        arguments.get("groups", 1),
        len(ops.shape_of(node) or ()) == 3,
    )
    if shape is None or not all(isinstance(s, int) for s in shape):
        return None
    given = [(arguments.get(name, fill)) for name, fill in (("stride", 1), ("padding", 0), ("dilation", 1))]
    axes = []
    for i, size in enumerate(shape[2:]):
        numbers = [_at(value, i) for value in given]
        axes.append(Axis.of(int(size), *numbers))
    alone = Axis.of(1, 1, 0, 1)
    rows, columns = (alone, axes[0]) if flat else (axes[0], axes[-1])
    return Phases(rows, columns, int(groups), int(shape[1]))


def _at(value: int | Sequence[int], axis: int) -> int:
    """A number for an axis, of one for all or one for each."""
    if isinstance(value, int):
        return value
    return int(value[axis if len(value) > 1 else 0])
