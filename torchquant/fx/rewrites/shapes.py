"""Ops that move data, in the few forms that Quantizers and delegates know."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchquant.fx import ops
from torchquant.fx.rewrites.builder import Builder, is_float32, is_static

aten = torch.ops.aten

_LAST = torch.iinfo(torch.int64).max  # as the end of a slice: all there is
COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default)


def reshaped(b: Builder, node: Node) -> Node | None:
    """Axes of size one added or removed, as a reshape."""
    return b.call(aten.reshape.default, node.args[0], list(node.meta["val"].shape)) if is_static(node) else None


def select(b: Builder, node: Node) -> Node | None:
    """One position of an axis, as a slice and a reshape."""
    x, axis, index = node.args
    if not is_static(x, node) or not isinstance(index, int):
        return None
    size = x.meta["val"].shape[axis]  # type: ignore[union-attr]
    part = b.call(aten.slice.Tensor, x, axis, index % size, index % size + 1)
    return b.call(aten.reshape.default, part, list(node.meta["val"].shape))


def stack(b: Builder, node: Node) -> Node | None:
    """Tensors stacked on a new axis, as a concatenation of reshaped ones."""
    tensors = list(node.args[0])  # type: ignore[arg-type]
    if not is_static(node, *tensors):
        return None
    shape = list(node.meta["val"].shape)
    axis = int(ops.arguments(node).get("dim", 0)) % len(shape)
    shape[axis] = 1
    return b.call(aten.cat.default, [b.call(aten.reshape.default, t, shape) for t in tensors], axis)


def single(b: Builder, node: Node) -> Node | None:
    """A concatenation of one tensor."""
    tensors = node.args[0]
    return tensors[0] if isinstance(tensors, (list, tuple)) and len(tensors) == 1 else None  # type: ignore[return-value]


def _needs_copies(model: GraphModule) -> bool:
    """Whether an op writes in place or reads strides, so that copies may not be left out."""
    schemas = [ops.schema_of(n) for n in model.graph.nodes]
    strided = any(n.target in (aten.as_strided.default, aten.view.dtype) for n in model.graph.nodes)
    return strided or any(schema is not None and schema.is_mutable for schema in schemas)


def viewed(b: Builder, node: Node) -> Node | None:
    """A view to the same shape left out, and any other as a reshape, whatever the strides are by then."""
    return needless(b, node) or b.call(aten.reshape.default, *node.args)


def shuffle(b: Builder, node: Node) -> Node | None:
    """Pixels or channels moved around: a reshape, a permute and a reshape."""
    x = node.args[0]
    if not is_static(x, node) or x.meta["val"].ndim != 4:  # type: ignore[union-attr]
        return None
    n, c, h, w = x.meta["val"].shape  # type: ignore[union-attr]
    r: Any = node.args[1]
    if node.target is aten.pixel_shuffle.default:
        inner, order = [n, c // r**2, r, r, h, w], [0, 1, 4, 2, 5, 3]
    elif node.target is aten.pixel_unshuffle.default:
        inner, order = [n, c, h // r, r, w // r, r], [0, 1, 3, 5, 2, 4]
    else:
        inner, order = [n, r, c // r, h, w], [0, 2, 1, 3, 4]
    moved = b.call(aten.permute.default, b.call(aten.reshape.default, x, inner), order)
    return b.call(aten.reshape.default, moved, list(node.meta["val"].shape))


def cropped(b: Builder, node: Node) -> Node | None:
    """A pad with negative sizes: slices, then a pad of what is left."""
    arguments = ops.arguments(node)
    x, sizes = arguments["self"], list(arguments["pad"])
    if not is_float32(x) or all(s >= 0 for s in sizes) or arguments.get("mode", "constant") != "constant":
        return None
    rank = x.meta["val"].ndim
    for i in range(len(sizes) // 2):
        axis, before, behind = rank - 1 - i, max(-sizes[2 * i], 0), max(-sizes[2 * i + 1], 0)
        size = x.meta["val"].shape[axis]
        if before or behind:
            end = size - behind if isinstance(size, int) else -behind or _LAST
            x = b.call(aten.slice.Tensor, x, axis, before, end)
    left = [max(s, 0) for s in sizes]
    return b.call(aten.constant_pad_nd.default, x, left, float(arguments.get("value") or 0.0)) if any(left) else x


def needless(b: Builder, node: Node) -> Node | None:
    """What leaves its input as it is: a copy, a dropout in eval mode, a reshape or a slice to the same shape."""
    x = node.args[0]
    if not isinstance(x, Node) or not isinstance(x.meta.get("val"), torch.Tensor):
        return None
    before, behind = x.meta["val"], node.meta.get("val")
    if (
        not isinstance(behind, torch.Tensor)
        or before.dtype != behind.dtype
        or any(u.op == "output" for u in node.users)
    ):
        return None
    if node.target is aten.dropout.default:
        return None if node.args[2] else x
    if node.target in COPIES and _needs_copies(b.model):
        return None
    return x if is_static(x, node) and before.shape == behind.shape else None


def transpose(b: Builder, node: Node) -> Node | None:
    """Two axes swapped, as a permute."""
    x, i, j = node.args
    if not is_static(x):
        return None
    order = list(range(node.meta["val"].ndim))
    order[i], order[j] = order[j], order[i]  # type: ignore[index]
    return b.call(aten.permute.default, x, order)


def expand(b: Builder, node: Node) -> Node | None:
    """An expansion that its users' broadcasting does anyway."""
    x = node.args[0]
    broadcasting = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor)
    needless = is_static(x) and all(
        user.target in broadcasting
        and user.args[0] is not node
        and isinstance(user.args[0], Node)
        and user.args[0].meta["val"].shape == user.meta["val"].shape
        for user in node.users
    )
    return x if needless else None  # type: ignore[return-value]
