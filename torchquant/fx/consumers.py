"""Who reads a tensor: the layers behind its observers, as groups that must share what is done to its channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import FixedQParamsObserver

from torchquant.fx import ops
from torchquant.fx.producers import (
    LAYERS,
    Producer,
    channel_axis,
    has_constants,
    is_padded,
    producer_of,
    readers,
    shape_behind,
)
from torchquant.fx.reading import observer_of
from torchquant.types import DTYPE_RANGE

__all__ = ["Group", "Reader", "groups_of"]


@dataclass(frozen=True)
class Reader:
    """A layer that reads the tensor.

    Args:
        layer: a linear or convolution.
        observer: through which it reads; the tensor itself where there is none.
    """

    layer: Node
    observer: Node


@dataclass(frozen=True)
class Group:
    """A tensor, the layers that read it, and what makes its channels.

    Args:
        tensor, axis: the tensor and its channel axis.
        readers: the layers, in graph order.
        producer: where a factor for each channel can go, or why there is no such place.
        reason: why these layers cannot share a factor; empty if they can.
    """

    tensor: Node
    axis: int
    readers: list[Reader]
    producer: Producer | str
    reason: str

    @property
    def by_rows(self) -> bool:
        """Whether all layers are matrices applied to each position."""
        return all(_is_matrix(r.layer) for r in self.readers)


def groups_of(prepared: GraphModule, *, unobserved: bool = False) -> list[Group]:
    """The tensors that layers read through an observer with one scale for all channels, in graph order.

    Args:
        prepared: the graph.
        unobserved: those too that layers read as they are.
    """
    tensors: dict[Node, list[Reader]] = {}
    for node in prepared.graph.nodes:
        if ops.op_name(node) not in LAYERS:
            continue
        source = node.args[0]
        if _is_smoothable(prepared, node):
            tensors.setdefault(source.args[0], []).append(Reader(node, source))
        elif unobserved and observer_of(prepared, source) is None and has_constants(prepared, node):
            tensors.setdefault(source, []).append(Reader(node, source))
    return [_group(prepared, tensor, tensor_readers) for tensor, tensor_readers in tensors.items()]


def _is_smoothable(prepared: GraphModule, layer: Node) -> bool:
    node = ops.argument(layer, 0)
    observer = _inner(observer_of(prepared, node)) if node is not None else None
    if node is None or observer is None or isinstance(observer, FixedQParamsObserver):
        return False
    whole = getattr(observer, "qscheme", torch.per_tensor_affine) in (
        torch.per_tensor_affine,
        torch.per_tensor_symmetric,
    )
    integer = getattr(observer, "dtype", None) in DTYPE_RANGE and getattr(observer, "quant_min", None) is not None
    return whole and integer and has_constants(prepared, layer)


def _group(prepared: GraphModule, tensor: Node, tensor_readers: list[Reader]) -> Group:
    axes = {channel_axis(r.layer) for r in tensor_readers}
    reason = "its readers take their channels from different axes" if len(axes) > 1 else ""
    axis = axes.pop()
    observers, layers = {r.observer for r in tensor_readers}, {r.layer for r in tensor_readers}
    reason = reason or _tied_table(prepared, tensor_readers)
    read = dict.fromkeys((tensor, *(r.observer for r in tensor_readers)))
    others = [u for source in read for u in readers(source) if u not in observers | layers]
    producer = producer_of(prepared, tensor, axis)
    if isinstance(producer, Producer):
        calls = {n for n in prepared.graph.nodes if n.op == "call_module" and n not in {*observers, *producer.path}}
        targets = {o.target for o in (*observers, *producer.path) if o.op == "call_module"}
        others += [n for n in calls if n.target in targets]
        if others:
            producer = f"{tensor.name} is read by {others[0].name} too"
        elif producer.repeat != 1:
            producer = f"several channels come from one of {producer.node.name}"
    return Group(tensor, axis, tensor_readers, producer, reason)


def _tied_table(prepared: GraphModule, tensor_readers: list[Reader]) -> str:
    """That a layer's weight is also a table of lookups: with a factor in it there would be two such tables."""
    for reader in tensor_readers:
        weight = ops.argument(reader.layer, 1)
        while weight is not None and observer_of(prepared, weight) is not None:
            weight = ops.argument(weight, 0)
        if weight is None or weight.op != "get_attr":
            continue
        same = [n for n in prepared.graph.nodes if n.op == "get_attr" and n.target == weight.target]
        for user in (user for node in same for user in readers(node)):
            for node in readers(user) if observer_of(prepared, user) is not None else [user]:
                if ops.op_name(node) == "embedding":
                    return f"the weight of {reader.layer.name} is also the table of {node.name}"
    return ""


def _is_matrix(layer: Node) -> bool:
    """Whether the layer applies one matrix to the channels at each position."""
    if ops.op_name(layer) == "linear":
        return True
    groups = ops.arguments(layer).get("groups", 1)
    return groups == 1 and not is_padded(layer) and all(k == 1 for k in shape_behind(ops.argument(layer, 1))[2:])


def _inner(observer: Any) -> Any:
    return getattr(observer, "activation_post_process", observer)
