"""What rewrites for ExecuTorch ask of values: dtype, rank, sizes that vary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from torchquant.fx.rewrites.builder import Builder

aten = torch.ops.aten


def value_of(node: object) -> torch.Tensor | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def is_float32(node: object, rank: int | None = None) -> bool:
    value = value_of(node)
    return value is not None and value.dtype == torch.float32 and rank in (None, value.ndim)


def reshaped(b: Builder, x: Node, shape: Sequence[object]) -> Node:
    """A reshape to sizes of which at most one varies."""
    return b.call(aten.reshape.default, x, [s if isinstance(s, int) else -1 for s in shape])


def varying(shape: Sequence[object]) -> int:
    return sum(not isinstance(s, int) for s in shape)
