"""Sites: what each op of a prepared or converted graph is quantized to, whoever wrote the Quantizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from torchquant.fx import dataflow, ops
from torchquant.fx.reading import GraphReading, observer_of
from torchquant.fx.stale import refuse_stale_copies
from torchquant.types import QParams, Site, Status

CONSTANT = "it does not depend on the model's inputs"
_SITE = "torchquant_site"  # likewise
NOTE = "torchquant"  # key in node.meta["custom"], which torch.export keeps when retracing and saving


def note(node: Node, status: Status, reason: str = "", scheme: str = "") -> None:
    """Record on the node what the Quantizer decided and why, and in which scheme it is quantized."""
    node.meta["custom"] = {**node.meta.get("custom", {}), NOTE: {"status": status, "reason": reason, "scheme": scheme}}


def mark_sites(graph: GraphModule) -> None:
    """Write each node's name into its metadata, so that `marked` knows it after all rewrites and exports."""
    for node in graph.graph.nodes:
        node.meta["custom"] = {**(node.meta.get("custom") or {}), _SITE: node.name}


def marked(node: Node) -> str:
    """The name that the node had when its graph was marked; empty if it was not."""
    return str((node.meta.get("custom") or {}).get(_SITE, ""))


def refuse_lost_writes(model: GraphModule) -> None:
    """Raise ExportError if a prepared or converted graph reads a quantized copy of what is written in place later."""
    refuse_stale_copies(
        model, lambda n: observer_of(model, n) is not None or ops.is_quantize(n) or ops.is_dequantize(n)
    )


def read_sites(model: GraphModule) -> list[Site]:
    """Every op of a prepared or converted graph that computes on data, with its status, and every matrix product.

    Quantize, dequantize and observer nodes, shape arithmetic and mere getters are no sites. Reshapes and
    slices move data and are no sites either.
    """
    data, reading = dataflow.data_nodes(model), GraphReading(model)
    return [
        _site(reading, node)
        for node in model.graph.nodes
        if node.op == "call_function" and _computes(node) and (node in data or _is_compute(node))
    ]


def site_edges(model: GraphModule, sites: Sequence[Site]) -> list[tuple[str, str]]:
    """(site, site) by node, in graph order: the second reads what the first made, perhaps through ops that are none."""
    names, made = {site.node for site in sites}, dict[Node, tuple[str, ...]]()
    edges = []
    for node in model.graph.nodes:
        read = tuple(dict.fromkeys(name for source in node.all_input_nodes for name in made[source]))
        is_site = node.name in names and node.op == "call_function"
        made[node] = (node.name,) if is_site else read
        edges += [(name, node.name) for name in read] if is_site else []
    return edges


def _computes(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or ops.qdq_name(node):
        return ops.is_higher_order(node)
    return ops.op_name(node) not in ("reshape", "slice", "sym_size", "choose_qparams", "to", "_to_copy", "copy_")


def _is_compute(node: Node) -> bool:
    """Whether the op multiplies matrices, looks up weights, or may hide ops that do."""
    if ops.is_higher_order(node):
        bodies = [body for n in node.all_input_nodes if (body := ops.body_of(n)) is not None]
        return not bodies or any(_is_compute(n) for body in bodies for n in body.graph.nodes)
    kind = ops.kind_of(node)
    return kind is not None and kind.compute


def _site(reading: GraphReading, node: Node) -> Site:
    kind = ops.kind_of(node)
    compute = _is_compute(node)
    weight, activation = None, None
    if kind is not None:
        inputs = ops.data_inputs(node, kind)
        read = [_qparams(reading, n) for n in inputs]
        activation = read[0] if read and all(q is not None for q in read) else None
        weights = [_qparams(reading, n) for n in ops.weights_of(node, kind)]
        weight = weights[0] if weights and all(q is not None for q in weights) else None
    status, reason = _status(node, compute, activation, weight, kind is not None and kind.weighted)
    return Site(node.name, ops.op_name(node), ops.module_path(node), compute, activation, weight, status, reason)


def _qparams(reading: GraphReading, node: Node | None) -> QParams | None:
    quantized = reading.tensor(node)
    return None if quantized is None else quantized.qparams


def _status(
    node: Node, compute: bool, activation: QParams | None, weight: QParams | None, weighted: bool
) -> tuple[Status, str]:
    recorded = (node.meta.get("custom") or {}).get(NOTE)
    if weight is not None:
        scheme, why = (recorded.get("scheme"), recorded["reason"]) if recorded else (None, "")
        return "quantized", f"{scheme}: {why}" if scheme and why else "weight only" if activation is None else ""
    if recorded is not None and recorded["status"] != "quantized":
        return recorded["status"], recorded["reason"]
    if recorded is not None and not compute:
        return "quantized", recorded["reason"] or recorded.get("scheme", "")
    if recorded is not None and (weighted or activation is None):
        return "missed", "annotated, yet left float by convert"
    if activation is not None and not weighted and (recorded is not None or _is_annotated(node)):
        return "quantized", ""
    if ops.is_higher_order(node) and not compute:
        return "unsupported", "nothing that its graphs compute could be quantized"
    if ops.is_higher_order(node):
        return "missed", f"the ops inside {node.target} are hidden from every Quantizer"
    if compute and ops.is_constant(node):
        return "unsupported", CONSTANT
    return ("missed", "the Quantizer did not annotate it") if compute else ("unsupported", "not annotated")


def _is_annotated(node: Node) -> bool:
    """Whether a foreign Quantizer meant this op: by its annotation, or where none was kept by a quantized output."""
    annotation = node.meta.get(Q_ANNOTATION_KEY)
    if annotation is not None:
        return bool(annotation.input_qspec_map) or annotation.output_qspec is not None
    return bool(node.users) and all(ops.is_quantize(user) for user in node.users)
