"""Scaled dot product attention in float32 by a kernel of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchquant.fx import ops
from torchquant.ops.x86 import matching, native

__all__ = ["replace_attention"]

_MOST_KEYS = 4096  # of attention; beyond, the scores of a few rows leave the cache, and torch's kernel is made for that


def replace_attention(graph: GraphModule) -> int:
    """Scaled dot product attention in float32 by our kernel, which takes strided operands; returns how many."""
    replaced = 0
    for node in list(graph.graph.nodes):
        arguments = ops.arguments(node)
        if ops.op_name(node) != "attention" or not _attends(node, arguments):
            continue
        width = matching.shape_of(arguments["query"])[-1]
        scale = arguments.get("scale")
        args = (arguments["query"], arguments["key"], arguments["value"], arguments.get("attn_mask"))
        options = (float(int(width) ** -0.5 if scale is None else scale), bool(arguments.get("is_causal", False)))
        with graph.graph.inserting_before(node):
            call = graph.graph.call_function(native.ops().x86_attention.default, (*args, *options))
            turned = graph.graph.call_function(torch.ops.aten.transpose.int, (call, 1, 2))
        turned.meta = dict(node.meta)
        node.replace_all_uses_with(turned)
        graph.graph.erase_node(node)
        replaced += 1
    return replaced


def _attends(node: Node, arguments: dict[str, Any]) -> bool:
    """Whether the kernel computes the same: float32, four dimensions, no dropout, not too many keys."""
    shapes = [matching.shape_of(arguments[k]) for k in ("query", "key", "value")]
    if not all(len(s) == 4 for s in shapes) or not all(
        matching.is_float32(arguments[k]) for k in ("query", "key", "value")
    ):
        return False
    if arguments.get("dropout_p", 0.0) or len({s[3] for s in shapes}) != 1 or not isinstance(shapes[0][3], int):
        return False
    if shapes[1][:3] != shapes[2][:3] or shapes[0][0] != shapes[1][0]:
        return False
    heads = (shapes[0][1], shapes[1][1])
    if _largest(arguments["key"], 2) > _MOST_KEYS or (heads[0] != heads[1] and not arguments.get("enable_gqa")):
        return False
    mask = arguments.get("attn_mask")
    value = mask.meta.get("val") if isinstance(mask, Node) else None
    return mask is None or (isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.bool))


def _largest(node: Node, axis: int) -> float:
    """The largest size that an axis may have, as far as the graph says."""
    size = node.meta["val"].shape[axis]
    return size if isinstance(size, int) else float(size.node.shape_env.bound_sympy(size.node.expr).upper)
