"""What depends on no input, computed once."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchquant.fx import ops

aten = torch.ops.aten


def fold_constants(model: GraphModule, limit: int = 1 << 20) -> int:
    """Replace by buffers what is computed from attributes, `arange` and the like alone, up to `limit` elements."""
    values: dict[Node, Any] = {}
    for node in model.graph.nodes:
        if node.op == "get_attr":
            attribute: Any = operator.attrgetter(str(node.target))(model)
            if isinstance(attribute, torch.Tensor):
                values[node] = attribute.detach()
        elif _foldable(node, values):
            args, kwargs = (torch.fx.node.map_arg(a, values.__getitem__) for a in (node.args, node.kwargs))
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
    done = 0
    for node, value in values.items():
        used = any(user not in values for user in node.users)
        if node.op == "call_function" and used and isinstance(value, torch.Tensor) and value.numel() <= limit:
            name = f"_tq_folded_{done}"
            while hasattr(model, name):
                name += "_"
            model.register_buffer(name, value.contiguous().clone())
            with model.graph.inserting_before(node):
                constant = model.graph.get_attr(name)
            constant.meta = {"val": node.meta.get("val", value)}
            node.replace_all_uses_with(constant)
            done += 1
    if done:
        model.graph.eliminate_dead_code()
        model.recompile()
    return done


def _foldable(node: Node, values: dict[Node, Any]) -> bool:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    if not node.all_input_nodes:
        return ops.op_name(node) in ("arange", "full", "zeros", "ones", "scalar_tensor", "eye")
    return all(n in values for n in node.all_input_nodes)
