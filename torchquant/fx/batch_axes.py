"""Convolutions of one image and linears of one vector as those of a batch of one."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchquant.fx import ops
from torchquant.fx.passes import replace_each

__all__ = ["add_batch_axes", "lacks_batch_axis"]

aten = torch.ops.aten
_RANKS = {f"conv{kind}{dim}d": dim + 2 for kind in ("", "_transpose") for dim in (1, 2, 3)} | {"linear": 2}
_ELEMENTWISE = ("relu", "hardtanh", "gelu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "leaky_relu", "elu")


def lacks_batch_axis(node: Node) -> bool:
    """Whether a node is a convolution of (C, ...) or a linear of (features,)."""
    shape = ops.shape_of(node)
    return shape is not None and len(shape) == _RANKS.get(ops.op_name(node), 0) - 1


def add_batch_axes(model: GraphModule) -> int:
    """Rewrite every such op as `squeeze(op(unsqueeze(x)))`, and a function of its elements in front of the squeeze.

    Kernels want the axis, and algorithms and torchao's folding of BatchNorm read channels where they are behind it.
    Returns how many ops.
    """
    return replace_each(model, lambda n: lacks_batch_axis(n) or _follows(n), _of_a_batch)


def _follows(node: Node) -> bool:
    """Whether a node is the only reader of a result whose batch axis is removed, element by element."""
    sources = node.all_input_nodes
    if ops.op_name(node) not in _ELEMENTWISE or len(sources) != 1 or len(sources[0].users) != 1:
        return False
    return _batched(sources[0]) is not None


def _batched(node: Node) -> Node | None:
    """What a squeeze removes a batch axis from."""
    source = node.args[0] if node.target is aten.squeeze.dim and node.args[1] == 0 else None
    return source if isinstance(source, Node) and (ops.shape_of(source) or (0,))[0] == 1 else None


def _of_a_batch(model: GraphModule, node: Node) -> Node:
    call, x = model.graph.call_function, node.args[0]
    assert isinstance(x, Node)
    batch = _batched(x)
    if batch is None:
        batch = call(aten.unsqueeze.default, (x, 0))
        batch.meta = _widened(x)
    result = call(node.target, (batch, *node.args[1:]), dict(node.kwargs))  # type: ignore[arg-type]
    result.meta = _widened(node)
    return call(aten.squeeze.dim, (result, 0))


def _widened(node: Node) -> dict[str, Any]:
    """A node's meta with a value that has one axis more in front."""
    value = node.meta.get("val")
    return node.meta if value is None else {**node.meta, "val": value.unsqueeze(0)}
