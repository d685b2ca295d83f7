"""Moving a factor for each channel of a tensor into the constants before and behind it; no constant changes in place.

y (..., channels)  the tensor        s (channels,)  the factor, positive      z (channels,)  the offset
y <- (y - z) / s   where it is made (`fold_output`) or by ops of its own (`insert_ops`)
W <- W s,  b <- b + W z   in every layer that reads it (`fold_input`)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchquant.fx import ops, passes
from torchquant.fx.consumers import Group
from torchquant.fx.grids import fake_quantizer
from torchquant.fx.producers import Producer, affine_positions, shape_behind
from torchquant.fx.reading import observer_of
from torchquant.fx.sites import note
from torchquant.observers.minmax import reset

__all__ = [
    "alone",
    "constant_at",
    "fold",
    "fold_input",
    "fold_output",
    "input_magnitudes",
    "insert_ops",
    "new_constant",
    "own_observer",
    "rounded",
    "scale_inputs",
    "set_constant",
    "tidy",
]

aten = torch.ops.aten


def scale_inputs(weight: torch.Tensor, factor: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """`weight` (out, in / groups, ...) times a factor (in,) for each input channel."""
    each = factor.reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).reshape(weight.shape[0], -1)
    return weight * each.reshape(*each.shape, *[1] * (weight.ndim - 2))


def input_magnitudes(weight: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """max |W| of each input channel (in,) of `weight` (out, in / groups, ...)."""
    rows = weight.abs().flatten(2).amax(2) if weight.ndim > 2 else weight.abs()
    return rows.reshape(groups, -1, weight.shape[1]).amax(1).reshape(-1)


def rounded(observer: Any, weight: torch.Tensor) -> torch.Tensor:
    """`weight` rounded to the grid that its observer (a copy, or None for a float weight) chooses for it."""
    if observer is None:
        return weight
    reset(observer)
    observer(weight)
    return fake_quantizer(observer, weight.shape)(weight)


def constant_at(model: GraphModule, node: Node, position: int | None) -> torch.Tensor | None:
    """The constant at `position` of an op's arguments, as it is before any observer; None if there is none."""
    source = ops.argument(node, position) if position is not None else None
    if source is not None and observer_of(model, source) is not None:
        source = ops.argument(source, 0)
    return ops.constant_value(model, source) if source is not None else None


def fold(model: GraphModule, group: Group, s: torch.Tensor, z: torch.Tensor | None = None, *, name: str) -> None:
    """Let all readers of a tensor take (y - z) / s: made by its producer, or by ops in front of the readers.

    Args:
        model: a prepared graph. group: the tensor and its readers.
        s, z: (channels,). name: of the algorithm, for the reports of the ops.
    """
    if isinstance(group.producer, Producer):
        fold_output(model, group.producer, s, z)
    else:
        layers, users = {r.layer for r in group.readers}, []
        for observer in dict.fromkeys(r.observer for r in group.readers):
            mine = [u for u in observer.users if u in layers]
            users += mine if observer is group.tensor else [alone(model, observer, mine)]
        order = {n: i for i, n in enumerate(model.graph.nodes)}
        users.sort(key=order.__getitem__)
        insert_ops(model, group.tensor, users, group.axis, s, z, f"{name}: {group.producer}")
    for reader in group.readers:
        fold_input(model, reader.layer, s, z)


def alone(model: GraphModule, observer: Node, users: list[Node]) -> Node:
    """The observer of these users alone: itself, or a copy where others share it."""
    is_alone = _callers(model, observer) == 1 and len(users) == len(observer.users)
    return observer if is_alone else own_observer(model, observer, users)


def fold_input(model: GraphModule, layer: Node, s: torch.Tensor, z: torch.Tensor | None = None) -> None:
    """Let a layer take (x - z) / s where it took x; with `z`, it must not pad."""
    weight, bias = constant_at(model, layer, 1), constant_at(model, layer, 2)
    assert weight is not None
    groups = int(ops.arguments(layer).get("groups", 1))
    if z is not None and bool(z.any()):
        offset = scale_inputs(weight, z, groups).flatten(1).sum(1)
        set_constant(model, layer, 2, offset if bias is None else bias + offset)
    set_constant(model, layer, 1, scale_inputs(weight, s, groups))


def fold_output(model: GraphModule, producer: Producer, s: torch.Tensor, z: torch.Tensor | None = None) -> None:
    """Let the producer make (y - z) / s where it made y; s and z have one value for each of its channels used."""
    factor, offset = affine_positions(producer.node)
    weight, bias = constant_at(model, producer.node, factor), constant_at(model, producer.node, offset)
    scale, shift = s.new_ones(producer.total), s.new_zeros(producer.total)
    mine = slice(producer.start, producer.start + len(s))
    scale[mine] = 1 / s
    if z is not None:
        shift[mine] = z
    if bias is not None or bool(shift.any()):
        assert offset is not None
        set_constant(model, producer.node, offset, (-shift if bias is None else bias - shift) * scale)
    if ops.op_name(producer.node) == "mul":
        assert weight is not None
        set_constant(model, producer.node, factor, weight * _along_channels(producer, scale))
    else:
        weight = s.new_ones(producer.total) if weight is None else weight
        set_constant(model, producer.node, factor, weight * scale.reshape(-1, *[1] * (weight.ndim - 1)))


def _along_channels(producer: Producer, scale: torch.Tensor) -> torch.Tensor:
    """(channels, 1, ...), so that it broadcasts over the output of a multiplication."""
    assert producer.axis is not None
    behind = len(ops.shape_of(producer.node) or ()) - producer.axis - 1
    return scale.reshape(-1, *[1] * behind)


def insert_ops(
    model: GraphModule,
    tensor: Node,
    users: Sequence[Node],
    axis: int,
    s: torch.Tensor,
    z: torch.Tensor | None,
    why: str,
) -> None:
    """Give `users` (in graph order) the tensor as (y - z) / s, by a multiplication and, with `z`, a subtraction."""
    rank = len(shape_behind(tensor))
    shape = (-1, *[1] * (rank - axis % rank - 1))
    value, first = tensor, users[0]
    steps = [(aten.sub.Tensor, z, "offset")] if z is not None and bool(z.any()) else []
    for target, constant, name in [*steps, (aten.mul.Tensor, 1 / s, "factor")]:
        assert constant is not None
        constant = constant.to(_dtype_of(tensor, constant.dtype)).reshape(shape)
        attribute = new_constant(model, first, f"{tensor.name}_{name}", constant)
        with model.graph.inserting_before(first):
            step = model.graph.call_function(target, (value, attribute))
        source = _unobserved(model, tensor)
        step.meta = {k: source.meta[k] for k in ("val", "tensor_meta") if k in source.meta}
        near = next(iter(first.users), first) if observer_of(model, first) is not None else first
        step.meta["nn_module_stack"] = near.meta.get("nn_module_stack", {})
        note(step, "unsupported", why)
        value = step
    for user in users:
        user.replace_input_with(tensor, value)


def _dtype_of(node: Node, default: torch.dtype) -> torch.dtype:
    """The dtype of a node's value, where the graph says it."""
    return getattr(node.meta.get("val"), "dtype", default)


def _unobserved(model: GraphModule, node: Node) -> Node:
    while observer_of(model, node) is not None:
        node = node.args[0]  # type: ignore[assignment]
    return node


def own_observer(model: GraphModule, observer: Node, users: Sequence[Node]) -> Node:
    """A copy of an observer, at the same place, for some of its users; for all of them, a module of its own."""
    name = passes.fresh_name(model, f"{str(observer.target).replace('.', '_')}_own")
    model.add_submodule(name, copy.deepcopy(model.get_submodule(str(observer.target))))
    if set(users) == set(observer.users):
        observer.target = name
        return observer
    with model.graph.inserting_after(observer):
        own = model.graph.call_module(name, observer.args)
    own.meta = dict(observer.meta)
    for user in users:
        user.replace_input_with(observer, own)
    return own


def tidy(model: GraphModule) -> None:
    """Drop what the graph reads no more, the replaced constants included, and make the graph runnable."""
    model.graph.eliminate_dead_code()
    model.graph.lint()
    model.recompile()
    passes.remove_dead_weights(model)


def set_constant(model: GraphModule, node: Node, position: int, value: torch.Tensor) -> None:
    """Put a new parameter behind an op's argument, under its observer if it has one."""
    is_bias = ops.op_name(node) != "embedding" and position == affine_positions(node)[1]
    kind = "bias" if is_bias else "weight"
    old = constant_at(model, node, position)
    value = value.to(_dtype_of(node, value.dtype) if old is None else old.dtype)
    source = ops.argument(node, position)
    if source is not None and observer_of(model, source) is not None:
        alone = len(source.users) == 1 and _callers(model, source) == 1
        observer = source if alone else own_observer(model, source, [node])
        observer.update_arg(0, new_constant(model, observer, f"{node.name}_{kind}", value))
        return
    args = [*node.args, *[None] * (position + 1 - len(node.args))]
    args[position] = new_constant(model, node, f"{node.name}_{kind}", value)
    node.args = tuple(args)


def _callers(model: GraphModule, observer: Node) -> int:
    return sum(n.op == "call_module" and n.target == observer.target for n in model.graph.nodes)


def new_constant(model: GraphModule, before: Node, name: str, value: torch.Tensor) -> Node:
    """A parameter of about this name, and the node that reads it, in front of `before`."""
    name = passes.fresh_name(model, name)
    model.register_parameter(name, torch.nn.Parameter(value.detach().contiguous(), requires_grad=False))
    with model.graph.inserting_before(before):
        attribute = model.graph.get_attr(name)
    attribute.meta["val"] = value.detach()
    return attribute
