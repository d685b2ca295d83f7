"""Parts of transformers whose lengths vary, in the forms that the delegate takes: reshapes that infer one size."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from torchquant.backends.executorch_xnnpack.values import is_float32, value_of, varying
from torchquant.fx import ops
from torchquant.fx.rewrites.builder import Builder

__all__ = ["attention", "last_axis_parts"]

aten = torch.ops.aten
_NEGATIVE = -1e30  # in the place of minus infinity, with which a row whose keys are all masked would be NaN
_MOST_COLUMNS = 256  # that are put in order by a product


def attention(b: Builder, node: Node) -> Node | None:
    """Scaled dot-product attention as bmm, mask, softmax, bmm on (batch * heads, length, features), lengths varying.

    A row whose keys are all masked gives their mean here, where PyTorch's safe softmax gives zero.
    """
    arguments = ops.arguments(node)
    q, k, v, mask = (arguments.get(name) for name in ("query", "key", "value", "attn_mask"))
    values = [value_of(x) for x in (q, k, v)]
    if not all(is_float32(x, 4) for x in (q, k, v)) or not varying([s for x in values for s in x.shape]):  # type: ignore
        return None
    (batch, heads, _, features), (*_, outputs) = values[0].shape, values[2].shape  # type: ignore[union-attr]
    known = all(isinstance(s, int) for s in (batch, heads, features, outputs))
    alike = all(tuple(x.shape[:2]) == (batch, heads) for x in values)  # type: ignore[union-attr]
    if not known or not alike or any(arguments.get(name) for name in ("dropout_p", "is_causal", "enable_gqa")):
        return None
    added = None if mask is None else _additive(b, mask)
    if mask is not None and added is None:
        return None
    scale = arguments.get("scale")
    scaled = b.call(aten.mul.Tensor, q, b.scalar(1 / math.sqrt(features) if scale is None else float(scale)))
    rows, keys, contents = (_stacked(b, x) for x in (scaled, k, v))
    scores = b.call(aten.bmm.default, rows, b.call(aten.permute.default, keys, [0, 2, 1]))
    scores = scores if added is None else b.call(aten.add.Tensor, scores, added)
    mixed = b.call(aten.bmm.default, b.call(aten.softmax.int, scores, -1), contents)
    return b.call(aten.reshape.default, mixed, [batch, heads, -1, outputs])


def _stacked(b: Builder, x: Any) -> Node:
    batch, heads, _, features = x.meta["val"].shape
    return b.call(aten.reshape.default, x, [batch * heads, -1, features])


def _additive(b: Builder, mask: Any) -> Node | None:
    """A mask (1, 1, length, source) as numbers (1, length, source) to be added; one for all layers that read it."""
    value = value_of(mask)
    if value is None or value.ndim != 4 or tuple(value.shape[:2]) != (1, 1):
        return None
    rows = _once(b, mask, aten.select.int, 0, 0)
    if value.dtype == torch.bool:
        return b.call(aten.where.self, rows, b.scalar(0.0), b.scalar(_NEGATIVE))
    return _once(b, rows, aten.clamp.default, _NEGATIVE)


def _once(b: Builder, x: Node, target: Any, *arguments: Any) -> Node:
    """An op on `x`, or the node in front that has computed the same."""
    known = [u for u in x.users if u.target is target and u.args[1:] == arguments and not u.kwargs and u < b.at]
    return known[0] if known else b.call(target, x, *arguments)


def last_axis_parts(b: Builder, node: Node) -> Node | None:
    """Slices of the last axis in another order and with other signs (rotary embeddings), as a product.

    The delegate slices only tensors of sizes known beforehand.
    """
    parts, axis = node.args[0], ops.arguments(node).get("dim", 0)
    sources = [source for part in parts if (source := _part(part)) is not None]  # type: ignore[union-attr]
    if not sources or len(sources) < len(parts):  # type: ignore[arg-type]
        return None
    x = sources[0][0]
    shape = x.meta["val"].shape
    is_one = all(source[0] is x for source in sources) and axis % len(shape) == len(shape) - 1
    if not is_one or not isinstance(shape[-1], int) or shape[-1] > _MOST_COLUMNS or not varying(shape):
        return None
    columns = torch.cat([columns for _, columns, _ in sources])
    signs = torch.cat([signs for _, _, signs in sources])
    matrix = torch.zeros(len(columns), shape[-1]).scatter_(1, columns[:, None], signs[:, None])
    return b.call(aten.linear.default, x, b.constant(matrix, f"order_of_{shape[-1]}"))


def _part(part: Any) -> tuple[Node, torch.Tensor, torch.Tensor] | None:
    """The tensor that a slice of its last axis is of, the columns, and 1 or -1 for each; None for other values."""
    sign = 1.0
    if isinstance(part, Node) and part.target is aten.neg.default:
        part, sign = part.args[0], -1.0
    if not isinstance(part, Node) or part.target is not aten.slice.Tensor or not is_float32(part.args[0]):
        return None
    arguments = ops.arguments(part)
    x = arguments["self"]
    rank, size = x.meta["val"].ndim, x.meta["val"].shape[-1]
    limits = [arguments.get(name) for name in ("start", "end", "step")]
    if arguments.get("dim", 0) % rank != rank - 1 or not all(v is None or isinstance(v, int) for v in (*limits, size)):
        return None
    columns = torch.arange(size)[slice(*limits)]
    return x, columns, torch.full((len(columns),), sign)
