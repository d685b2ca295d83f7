"""Chains that quantize at run time, as the XNNPACK delegate takes them: by token, and one for each user."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from torchquant.fx import ops
from torchquant.fx.passes import finished
from torchquant.fx.reading import GraphReading
from torchquant.observers.minmax import per_token

__all__ = ["duplicate_dynamic_chains", "per_token_linears"]

aten = torch.ops.aten


def per_token_linears(model: GraphModule) -> int:
    """Quantize the input of dynamic linears per token, in one dialect, whatever the graph says; returns how many."""
    reading = GraphReading(model)
    done = 0
    for node in [n for n in model.graph.nodes if _is_chain_of_linears(n)]:
        quantized = reading.op(node)
        if quantized is None or quantized.source is None or quantized.choice is None or quantized.choice.symmetric:
            continue
        qparams = quantized.qparams
        low, high = int(qparams.quant_min), int(qparams.quant_max)
        with model.graph.inserting_before(node):
            values = per_token(model, quantized.source, low, high, qparams.dtype)
        values.meta = {**node.meta, **values.meta}
        node.replace_all_uses_with(values)
        done += 1
    return finished(model, done)


_OTHERS = ("dequantize_per_tensor", "dequantize_affine")  # dialects of chains that the delegate computes by token


def _is_chain_of_linears(node: Node) -> bool:
    is_other = ops.qdq_name(node) in _OTHERS and ops.has_own_scale(node)
    return is_other and bool(node.users) and all(user.target is aten.linear.default for user in node.users)


def duplicate_dynamic_chains(model: GraphModule) -> int:
    """Give every user of a dynamically quantized tensor its own choose-quantize-dequantize chain.

    A delegate groups nodes pairwise: three projections behind one chain would fall into separate groups.
    """
    done = 0
    for node in list(model.graph.nodes):
        if not ops.is_dequantize(node) or not ops.has_own_scale(node):
            continue
        shared = len(node.args[0].users) > 1
        for user in list(node.users)[0 if shared else 1 :]:
            user.replace_input_with(node, _copy_chain(model, node))
            done += 1
    return finished(model, done)


def _copy_chain(model: GraphModule, dequantize: Node) -> Node:
    quantize, scale, zero_point = dequantize.args[:3]
    assert isinstance(scale, Node)
    copies: dict[Node, Node] = {}
    with model.graph.inserting_before(dequantize):
        for original in (scale.args[0], scale, zero_point, quantize, dequantize):
            assert isinstance(original, Node)
            copies[original] = model.graph.node_copy(original, lambda n: copies.get(n, n))
    return copies[dequantize]
