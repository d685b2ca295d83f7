"""Which values of a graph are data: observed, they give a range that calibration can know."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from torchquant.fx import ops


def data_nodes(model: GraphModule) -> set[Node]:
    """Nodes whose float value is data: observed, it gives a range that calibration can know.

    Float, complex and uint8 inputs, embeddings, state, and whatever is computed from them; not masks and positions that
    come from integers, bools, `ones`, `arange`, `cumsum` or from shapes: observing those wastes range or ruins it. What
    a matrix product makes of them is data again.
    """
    return _flowing(model)[0]


def derived_nodes(model: GraphModule) -> set[Node]:
    """Nodes whose value depends on what the model is given: data, and masks, positions and one-hot codes as well."""
    data, derived = _flowing(model)
    return data | derived


def _flowing(model: GraphModule) -> tuple[set[Node], set[Node]]:
    data: set[Node] = set()
    derived: set[Node] = set()
    for node in model.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            if node.op == "placeholder" or ops.is_overwritten(node):
                (data if _is_data(node) else derived).add(node)
            continue
        if _makes_new(node):
            continue
        inputs = node.all_input_nodes
        follows = any(n in data for n in inputs)
        looked_up = _looks_up(node) or (_is_product(node) and any(n in derived for n in inputs))
        if (follows or looked_up) and _may_carry_data(node):
            data.add(node)
        elif (follows or looked_up or any(n in derived for n in inputs)) and _is_tensor(node):
            derived.add(node)
    return data, derived


def _is_data(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and (
        value.is_floating_point() or value.is_complex() or value.dtype == torch.uint8
    )


def _makes_new(node: Node) -> bool:
    """Whether the op makes a tensor of which it takes no more than the shape and dtype of another."""
    name = ops.op_name(node)
    return name.endswith("_like") or name in ("new_zeros", "new_ones", "new_full", "new_empty")


def _looks_up(node: Node) -> bool:
    """Whether the op reads rows of a constant table, by whatever integers."""
    name = ops.op_name(node)
    if name == "embedding":
        return True
    table = ops.argument(node, 0) if name in ("index", "index_select", "gather", "take_along_dim") else None
    unknown = table is not None and "val" not in table.meta  # of an attribute that a pass made
    return table is not None and ops.is_constant(table) and (unknown or _is_data(table)) and not ops.is_constant(node)


def _is_product(node: Node) -> bool:
    kind = ops.kind_of(node)
    return kind is not None and kind.compute


def _is_tensor(node: Node) -> bool:
    value = node.meta.get("val", ())  # observers and quantize ops carry none
    return isinstance(value, (torch.Tensor, list, tuple))


def _may_carry_data(node: Node) -> bool:
    value = node.meta.get("val", ())
    complex_ = isinstance(value, torch.Tensor) and value.is_complex()
    return isinstance(value, (list, tuple)) or ops.is_float(node) or complex_ or ops.is_quantize(node)
