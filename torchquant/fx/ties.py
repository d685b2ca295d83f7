"""Values whose channels must share one factor, since quantized additions lie between them: a residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import FixedQParamsObserver
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from torchquant.fx import ops
from torchquant.fx.consumers import Reader
from torchquant.fx.producers import (
    LAYERS,
    Producer,
    channel_axis,
    has_constants,
    producer_of,
    readers,
    shape_behind,
)
from torchquant.fx.reading import observer_of
from torchquant.types import DTYPE_RANGE

__all__ = ["Tie", "has_static_range", "is_annotated", "quantizes_output", "ties_of"]

_SUMS = ("add", "sub")
_NORMS = ("layer_norm", "batch_norm", "group_norm")
# ops of one input that a positive factor for each channel commutes with, and that leave the channels where they are
_COMMUTING = ("relu.default", "dropout.default", "clone.default", "contiguous.default", "alias.default")


@dataclass
class Tie:
    """Values that share a factor s for each channel: each is to become itself / s.

    Args:
        values: in graph order; constants among them.
        axis: of the channels, counted from the end.
        observers: the observers of the values, with the value of each.
        producers: constants that take 1 / s.
        made: values made by what takes no factor: a division must follow.
        layers: readers whose weight takes s.
        outside: (source, readers that take no factor): a multiplication by s must stand between.
        reason: why the factor is impossible; empty if it is not.
    """

    values: list[Node]
    axis: int = -1
    observers: dict[Node, Node] = field(default_factory=dict)
    producers: list[Producer] = field(default_factory=list)
    made: list[Node] = field(default_factory=list)
    layers: list[Reader] = field(default_factory=list)
    outside: dict[Node, list[Node]] = field(default_factory=dict)
    reason: str = ""

    @property
    def is_sum(self) -> bool:
        """Whether additions tie the values, not one op only that reads one of them."""
        return any(ops.op_name(v) in _SUMS for v in self.values)

    @property
    def operations(self) -> int:
        """How many ops the factor would insert."""
        return len(self.made) + len(self.outside)


def ties_of(prepared: GraphModule) -> list[Tie]:
    """Every set of values with static ranges that additions tie, or that others than layers read as quantized.

    An op that the Quantizer annotated must keep its observers as neighbours, or it would not be lowered as an integer
    op: no op is inserted beside it.
    """
    ties = []
    for values in _components(prepared):
        if all(map(ops.is_constant, values)):
            continue
        tie = Tie(values)
        tie.observers = {o: v for v in values for o in _observers(prepared, v)}
        if any(has_static_range(prepared, o) for o in tie.observers):
            tie.reason = _classify(prepared, tie)
            if tie.is_sum or any(source in tie.observers for source in tie.outside):
                ties.append(tie)
    return ties


def is_annotated(node: Node) -> bool:
    """Whether the Quantizer wants this op quantized: its inputs, its output, or within a pattern."""
    annotation = node.meta.get(Q_ANNOTATION_KEY)
    if annotation is None:
        return False
    specs = [*annotation.input_qspec_map.values(), annotation.output_qspec]
    return bool(annotation._annotated) or any(s is not None for s in specs)


def quantizes_output(node: Node) -> bool:
    """Whether the Quantizer wants the op's output quantized, by an observer right behind it."""
    annotation = node.meta.get(Q_ANNOTATION_KEY)
    return annotation is not None and annotation.output_qspec is not None


def _components(prepared: GraphModule) -> list[list[Node]]:
    parent: dict[Node, Node] = {}

    def root(node: Node) -> Node:
        while parent.setdefault(node, node) is not node:
            node = parent[node]
        return node

    for node in prepared.graph.nodes:
        if observer_of(prepared, node) is not None:
            root(_value(prepared, node))
        for operand in _tied(prepared, node):
            parent[root(operand)] = root(node)
    components: dict[Node, list[Node]] = {}
    for node in [n for n in prepared.graph.nodes if n in parent]:
        components.setdefault(root(node), []).append(node)
    return list(components.values())


def _tied(prepared: GraphModule, node: Node) -> list[Node]:
    """The values that must share the factor of this op's output; none if the op forces nothing on them."""
    schema = ops.schema_of(node)
    if schema is None or schema.is_mutable:
        return []
    operands = [a for a in node.args[:2] if isinstance(a, Node)]
    if f"{schema.name.removeprefix('aten::')}.{schema.overload_name or 'default'}" in _COMMUTING:
        return [_value(prepared, operands[0])]
    observed = any(observer_of(prepared, n) is not None for n in (*operands, *node.users))
    if ops.op_name(node) not in _SUMS or len(operands) < 2 or not observed:
        return []
    return [_value(prepared, a) for a in operands]


def _value(prepared: GraphModule, node: Node) -> Node:
    """The value that an observer passes on."""
    while observer_of(prepared, node) is not None:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _observers(prepared: GraphModule, value: Node) -> Iterator[Node]:
    for user in value.users:
        if observer_of(prepared, user) is not None:
            yield user
            yield from _observers(prepared, user)


def has_static_range(prepared: GraphModule, node: Node) -> bool:
    """Whether the observer has one integer range for the whole tensor."""
    module = observer_of(prepared, node)
    observer: Any = getattr(module, "activation_post_process", module)
    if getattr(observer, "is_dynamic", False) or getattr(observer, "quant_min", None) is None:
        return False
    whole = getattr(observer, "qscheme", None) in (torch.per_tensor_affine, torch.per_tensor_symmetric)
    return whole and getattr(observer, "dtype", None) in DTYPE_RANGE and not callable(getattr(observer, "convert", 0))


# who takes the factor ---------------------------------------------------------------------------------------------


def _classify(prepared: GraphModule, tie: Tie) -> str:
    """Fill in who takes the factor; returns why nobody can."""
    members = set(tie.values)
    if odd := [v.name for v in tie.values if not ops.is_float(v)]:
        return f"{odd[0]} is no float tensor"
    axes = {a for v in tie.values for a in _channel_axes(prepared, v)}
    if len(axes) != 1:
        return "its channels lie on different axes" if axes else "no layer says where its channels are"
    tie.axis = axes.pop()
    sizes = {shape[tie.axis] if len(shape := shape_behind(v)) >= -tie.axis else 1 for v in tie.values}
    if len(sizes) != 1 or not isinstance(next(iter(sizes)), int):
        return "its parts differ in their channels"
    modules = {id(observer_of(prepared, o)) for o in tie.observers}
    for node in prepared.graph.nodes:
        module = observer_of(prepared, node)
        if id(module) in modules and (node not in tie.observers or isinstance(module, FixedQParamsObserver)):
            return f"{node.name} has the same range, or a fixed one"
    for value in tie.values:
        reason = _made(prepared, tie, value) or _read(prepared, tie, value, members)
        if reason:
            return reason
    return ""


def _channel_axes(prepared: GraphModule, value: Node) -> set[int]:
    """The axis, from the end, that layers and normalizations beside the value take for its channels."""
    kinds = (*LAYERS, *_NORMS)
    near = [u for _, u in _readings(prepared, value) if ops.op_name(u) in kinds and _value_at(prepared, u) is value]
    near += [value] if ops.op_name(value) in kinds else []
    return {channel_axis(n) - len(shape_behind(ops.argument(n, 0))) for n in near}


def _value_at(prepared: GraphModule, layer: Node) -> Node | None:
    source = ops.argument(layer, 0)
    return None if source is None else _value(prepared, source)


def _made(prepared: GraphModule, tie: Tie, value: Node) -> str:
    if _tied(prepared, value):
        return ""
    producer = producer_of(prepared, value, tie.axis) if not ops.is_constant(value) else ""
    if isinstance(producer, Producer) and producer.repeat == 1:
        tie.producers.append(producer)
    elif is_annotated(value):
        return f"{value.name} is quantized and takes no factor"
    else:
        tie.made.append(value)
    return ""


def _read(prepared: GraphModule, tie: Tie, value: Node, members: set[Node]) -> str:
    for source, user in _readings(prepared, value):
        if user in members and _tied(prepared, user):
            continue
        schema = ops.schema_of(user)
        if schema is not None and schema.is_mutable:
            return f"{user.name} changes {value.name} in place"
        if ops.op_name(user) in LAYERS and _value_at(prepared, user) is value and has_constants(prepared, user):
            tie.layers.append(Reader(user, source))
        elif is_annotated(user):
            return f"{user.name}, which reads {value.name}, is quantized and takes no factor"
        else:
            tie.outside.setdefault(source, []).append(user)
    return ""


def _readings(prepared: GraphModule, value: Node) -> Iterator[tuple[Node, Node]]:
    """(the value or an observer of it, who reads that), observers themselves left out."""
    for source in (value, *_observers(prepared, value)):
        for user in readers(source):
            if observer_of(prepared, user) is None:
                yield source, user
