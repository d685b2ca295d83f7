"""Ops of a calibrated prepared graph put back to float, whoever wrote its Quantizer."""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from torchquant.calibration.evaluator import FLOAT_BIAS
from torchquant.fx import ops
from torchquant.fx.reading import observer_of
from torchquant.fx.sites import NOTE, note

__all__ = ["leave_float"]


def leave_float(prepared: GraphModule, names: Collection[str], reason: str) -> None:
    """Let the named nodes read their operands as they are, in place: without observers, and with the float bias.

    What an op in front of them gives quantized, because its Quantizer asked for that, they read as it is given: so does
    what a Quantizer excludes. What they return stays observed where other ops read it quantized.

    Args:
        reason: for reports; their status is `excluded`.
    """
    nodes = [n for n in prepared.graph.nodes if n.name in names]
    for node in nodes:
        node.meta.pop(Q_ANNOTATION_KEY, None)
        note(node, "excluded", reason)
    for node in nodes:
        for source in list(node.all_input_nodes):
            _read_exact(prepared, node, source)
    for node in reversed(list(prepared.graph.nodes)):
        if not node.users and (node.op == "get_attr" or observer_of(prepared, node) is not None):
            prepared.graph.erase_node(node)
    prepared.recompile()


def _read_exact(prepared: GraphModule, node: Node, source: Node) -> None:
    """Take the observers between a node and its operand off this way."""
    while observer_of(prepared, source) is not None:
        exact = source.all_input_nodes[0]
        if _is_given_quantized(prepared, exact):
            return
        node.replace_input_with(source, exact)
        source = exact
    if FLOAT_BIAS in source.meta:
        _put_back_bias(prepared, node, source)


def _is_given_quantized(prepared: GraphModule, value: Node) -> bool:
    """Whether an op that is not left float was asked to return this value quantized."""
    annotation = value.meta.get(Q_ANNOTATION_KEY)
    if annotation is None or annotation.output_qspec is None:
        return False
    maker = value  # of what ends in an activation, the product in front of it
    while not _is_left_float(maker):
        inputs = [n for n in maker.all_input_nodes if ops.is_float(n)]
        kind = ops.kind_of(maker)
        if (kind is not None and kind.compute) or len(inputs) != 1 or observer_of(prepared, inputs[0]) is not None:
            return True
        maker = inputs[0]
    return False


def _is_left_float(node: Node) -> bool:
    return ((node.meta.get("custom") or {}).get(NOTE) or {}).get("status") == "excluded"


def _put_back_bias(prepared: GraphModule, node: Node, corrected: Node) -> None:
    name = corrected.meta[FLOAT_BIAS]
    if name is None:
        node.args = tuple(None if arg is corrected else arg for arg in node.args)
        return
    with prepared.graph.inserting_before(node):
        exact = prepared.graph.get_attr(name)
    exact.meta["val"] = corrected.meta.get("val")
    node.replace_input_with(corrected, exact)
