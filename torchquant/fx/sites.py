"""Sites: what each op of a prepared or converted graph is quantized to, whoever wrote the Quantizer."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from torchquant.fx import ops
from torchquant.fx.functional import refuse_stale_copies
from torchquant.types import QParams, Site, Status

CONSTANT = "it does not depend on the model's inputs"
_SITE = "torchquant_site"  # likewise
NOTE = "torchquant"  # key in node.meta["custom"], which torch.export keeps when retracing and saving


def note(node: Node, status: Status, reason: str = "") -> None:
    """Record on the node what the Quantizer decided and why."""
    node.meta["custom"] = {**node.meta.get("custom", {}), NOTE: {"status": status, "reason": reason}}


def mark_sites(graph: GraphModule) -> None:
    """Write each node's name into its metadata, so that `marked` knows it after all rewrites and exports."""
    for node in graph.graph.nodes:
        node.meta["custom"] = {**(node.meta.get("custom") or {}), _SITE: node.name}


def marked(node: Node) -> str:
    """The name that the node had when its graph was marked; empty if it was not."""
    return str((node.meta.get("custom") or {}).get(_SITE, ""))


def is_observer(module: Any) -> bool:
    """Whether a module is an observer or a fake quantizer, whoever wrote it."""
    return isinstance(module, torch.nn.Module) and hasattr(module, "calculate_qparams")


def observer_of(model: GraphModule, node: Node) -> torch.nn.Module | None:
    """The observer that a `call_module` node calls, or None."""
    if node.op != "call_module":
        return None
    module = model.get_submodule(str(node.target))
    return module if is_observer(module) else None


def observers(model: GraphModule) -> Iterator[tuple[Node, torch.nn.Module]]:
    """Every observer node of a prepared graph with its module (a shared module comes once a node)."""
    for node in model.graph.nodes:
        module = observer_of(model, node)
        if module is not None:
            yield node, module


def is_prepared(model: GraphModule) -> bool:
    """Whether the graph holds observers."""
    return next(observers(model), None) is not None


def is_converted(model: GraphModule) -> bool:
    """Whether the graph holds dequantize ops."""
    return any(ops.is_dequantize(node) for node in model.graph.nodes)


def refuse_lost_writes(model: GraphModule) -> None:
    """Raise ExportError if a prepared or converted graph reads a quantized copy of what is written in place later."""
    refuse_stale_copies(
        model, lambda n: observer_of(model, n) is not None or ops.is_quantize(n) or ops.is_dequantize(n)
    )


def source_of(node: Node) -> Node:
    """The node behind a chain of reshapes: where a value was made."""
    while True:
        kind = ops.kind_of(node)
        if kind is None or kind.name != "reshape" or not node.all_input_nodes:
            return node
        node = node.all_input_nodes[0]


def qparams_of(model: GraphModule, node: Node | None) -> QParams | None:
    """How the value of `node` is quantized when an op reads it: by an observer or a dequantize op, or None."""
    if node is None:
        return None
    node = source_of(node)
    observer = observer_of(model, node)
    if observer is not None:
        return _observed(observer)
    return _dequantized(model, node) if ops.is_dequantize(node) else None


def _observed(observer: Any) -> QParams | None:
    low, high = getattr(observer, "quant_min", None), getattr(observer, "quant_max", None)
    if low is None or high is None:
        return None
    dtype: Any = getattr(observer, "dtype", None) or getattr(observer, "target_dtype", torch.int8)
    per_channel = getattr(observer, "qscheme", None) in (torch.per_channel_symmetric, torch.per_channel_affine)
    axis = int(observer.ch_axis) if per_channel and hasattr(observer, "ch_axis") else None
    granularity = getattr(observer, "granularity", None)
    dynamic = bool(getattr(observer, "is_dynamic", False))
    token = dynamic and (getattr(observer, "per_token", False) or type(granularity).__name__ == "PerToken")
    group_size = None if dynamic else getattr(granularity, "group_size", None)
    return QParams(dtype, low, high, axis, dynamic, group_size=group_size, token=token)


def _dequantized(model: GraphModule, node: Node) -> QParams:
    given = ops.arguments(node)
    scale = _value(model, given.get("scale", given.get("scales")))
    zero_point = _value(model, given.get("zero_point", given.get("zero_points")))
    axis, dtype = given.get("axis"), given.get("dtype", given.get("input_dtype"))
    group_size = given.get("group_size")
    if "block_size" in given:
        axis, group_size = _blocks(given["block_size"], _value(model, given["input"]))
    if scale is not None and scale.ndim > 1 and not group_size:  # one scale a row
        axis, scale = 0, scale.flatten()
        zero_point = zero_point if zero_point is None else zero_point.flatten()
    dynamic = isinstance(given.get("scale", given.get("scales")), Node) and scale is None
    return QParams(
        dtype=dtype if isinstance(dtype, torch.dtype) else torch.int8,
        quant_min=given.get("quant_min"),  # type: ignore[arg-type]
        quant_max=given.get("quant_max"),  # type: ignore[arg-type]
        axis=axis if isinstance(axis, int) else None,
        dynamic=dynamic,
        scale=scale,
        zero_point=zero_point,
        group_size=group_size,
        token=dynamic and _by_token(node, given),
    )


def _by_token(node: Node, given: dict[str, Any]) -> bool:
    """Whether each row has a scale of its own, as far as the ops say."""
    if "block_size" in given:
        return len(given["block_size"]) > 1 and all(size == 1 for size in given["block_size"][:-1])
    chosen = given["scale"] if "scale" in given else given["scales"]
    axis = ops.arguments(chosen).get("axis") if ops.qdq_name(chosen) == "choose_scale" else None
    return ops.qdq_name(node) == "dequantize_per_token" or axis is not None


def _blocks(block_size: Any, codes: torch.Tensor | None) -> tuple[int | None, int | None]:
    """Channel axis or group size of an affine block size."""
    if codes is None or all(b in (n, -1) for b, n in zip(block_size, codes.shape, strict=True)):
        return None, None
    whole = [i for i, (b, n) in enumerate(zip(block_size, codes.shape, strict=True)) if b == 1 and n != 1]
    if len(whole) == 1 and all(
        b == n for i, (b, n) in enumerate(zip(block_size, codes.shape, strict=True)) if i != whole[0]
    ):
        return whole[0], None
    return None, next((int(b) for b, n in zip(block_size, codes.shape, strict=True) if 1 < b < n), 1)


def _value(model: GraphModule, value: Any) -> torch.Tensor | None:
    if isinstance(value, (int, float)):
        return torch.tensor(value)
    if isinstance(value, Node) and value.op == "get_attr":
        found: Any = operator.attrgetter(str(value.target))(model)
        return found.detach() if isinstance(found, torch.Tensor) else None
    return None


def read_sites(model: GraphModule) -> list[Site]:
    """Every op of a prepared or converted graph that computes on data, with its status, and every matrix product.

    Quantize, dequantize and observer nodes, shape arithmetic and mere getters are no sites. Reshapes and
    slices move data and are no sites either.
    """
    data = ops.data_nodes(model)
    return [
        _site(model, node)
        for node in model.graph.nodes
        if node.op == "call_function" and _computes(node) and (node in data or _is_compute(node))
    ]


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


def _site(model: GraphModule, node: Node) -> Site:
    kind = ops.kind_of(node)
    compute = _is_compute(node)
    weight, activation = None, None
    if kind is not None:
        inputs = ops.data_inputs(node, kind)
        read = [qparams_of(model, n) for n in inputs]
        activation = read[0] if read and all(q is not None for q in read) else None
        if kind.weight is not None:
            weight = qparams_of(model, ops.argument(node, kind.weight))
    status, reason = _status(node, compute, activation, weight, kind is not None and kind.weight is not None)
    return Site(node.name, ops.op_name(node), ops.module_path(node), compute, activation, weight, status, reason)


def _status(
    node: Node, compute: bool, activation: QParams | None, weight: QParams | None, weighted: bool
) -> tuple[Status, str]:
    recorded = (node.meta.get("custom") or {}).get(NOTE)
    if weight is not None:
        why = recorded["reason"] if recorded and ": " in recorded["reason"] else ""
        return "quantized", why or ("weight only" if activation is None else "")
    if recorded is not None and recorded["status"] != "quantized":
        return recorded["status"], recorded["reason"]
    if recorded is not None and not compute:
        return "quantized", recorded["reason"]
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
