"""Tensor subclasses (as of `torchao.quantize_`) in an exported graph: one parameter, of which ops read the tensors."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from torchquant.fx import ops, passes

__all__ = ["has_parts", "split_parts"]


def has_parts(model: GraphModule) -> bool:
    """Whether the graph has tensor subclasses among its parameters and reads the tensors that they are made of."""
    return any(map(ops.is_part, model.graph.nodes))


def split_parts(model: GraphModule) -> int:
    """Put buffers in the place of what is read of tensor subclasses, which are dropped; returns how many."""
    done = 0
    buffers: dict[tuple[str, str], str] = {}
    for node in [n for n in model.graph.nodes if ops.is_part(n) and ops.is_constant(n)]:
        value = ops.constant_value(model, node)
        if type(value) is not torch.Tensor:
            continue  # a subclass within a subclass, whose own parts are read behind it
        key = (str(node.args[0]), str(node.args[1]))
        with model.graph.inserting_before(node):
            part = (
                model.graph.get_attr(buffers[key]) if key in buffers else passes.add_buffer(model, "_".join(key), value)
            )
        buffers[key] = str(part.target)
        part.meta = {**node.meta, "val": node.meta.get("val", value)}
        node.replace_all_uses_with(part)
        model.graph.erase_node(node)
        done += 1
    if done:
        model.graph.eliminate_dead_code()
        passes.remove_dead_weights(model)
    return passes.finished(model, done)
