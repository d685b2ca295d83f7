"""Ops of a calibrated prepared graph put back to float, whoever wrote its Quantizer."""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from torchquant.calibration.evaluator import FLOAT_BIAS
from torchquant.fx.reading import observer_of
from torchquant.fx.sites import note

__all__ = ["leave_float"]


def leave_float(prepared: GraphModule, names: Collection[str], reason: str) -> None:
    """Let the named nodes read their operands as they are, in place: without observers, and with the float bias.

    What they return stays observed where other ops read it quantized.

    Args:
        reason: for reports; their status is `excluded`.
    """
    for node in [n for n in prepared.graph.nodes if n.name in names]:
        for source in list(node.all_input_nodes):
            while observer_of(prepared, source) is not None:
                exact = source.args[0]
                assert isinstance(exact, Node)
                node.replace_input_with(source, exact)
                source = exact
            if FLOAT_BIAS in source.meta:
                _put_back_bias(prepared, node, source)
        node.meta.pop(Q_ANNOTATION_KEY, None)
        note(node, "excluded", reason)
    for node in reversed(list(prepared.graph.nodes)):
        if not node.users and (node.op == "get_attr" or observer_of(prepared, node) is not None):
            prepared.graph.erase_node(node)
    prepared.recompile()


def _put_back_bias(prepared: GraphModule, node: Node, corrected: Node) -> None:
    name = corrected.meta[FLOAT_BIAS]
    if name is None:
        node.args = tuple(None if arg is corrected else arg for arg in node.args)
        return
    with prepared.graph.inserting_before(node):
        exact = prepared.graph.get_attr(name)
    exact.meta["val"] = corrected.meta.get("val")
    node.replace_input_with(corrected, exact)
