"""A converted graph with each quantized product as one op of ours, and with it what follows in its kernel."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

import torchquant.ops.gpu.convolutions  # noqa: F401 - registers the ops, as does linears.py that it imports
from torchquant.fx import ops, passes
from torchquant.fx.reading import GraphReading
from torchquant.fx.windows import Window
from torchquant.ops.gpu import packing
from torchquant.ops.gpu.reading import Input, Layer, read_input, read_layer

__all__ = ["OPS", "rewrite"]

aten = torch.ops.aten
OPS = ("weight_only_linear", "scaled_linear", "scaled_conv2d")


def rewrite(model: GraphModule, names: set[str]) -> int:
    """Replace the ops named by ops of ours, in place; returns how many ops of ours that makes.

    Linears that read the same values in the same way become one op. Quantize and dequantize ops around float ops stay,
    in a dialect that Inductor fuses.

    Raises:
        LoweringError: an op named has no kernel.
    """
    reading = GraphReading(model)
    layers = [read_layer(reading, n) for n in model.graph.nodes if n.name in names]
    work = _Rewriting(model)
    groups = _siblings(work, layers)
    for group in groups:
        if len(group) > 1:
            work.together(group)
        else:
            work.alone(group[0])
    _fusible_rounding(model)
    _reshapes(model)
    model.graph.eliminate_dead_code()
    model.graph.lint()
    model.recompile()
    passes.remove_dead_weights(model)
    return len(groups)


def _siblings(work: _Rewriting, layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers in graph order, with linears that read the same input in the same way in one group, at the first."""
    alike = defaultdict(list)
    for layer in layers:
        alike[layer.kind()].append(layer)
    groups = []
    for group in alike.values():
        together = group[0].window is None and not work.written(group[0].node, group[-1].node)
        groups += [group] if together else [[layer] for layer in group]
    return sorted(groups, key=lambda group: work.place[group[0].node])


@dataclass(frozen=True)
class _Ending:
    """What a kernel computes from a product on: the nodes, and their addend and activation."""

    nodes: tuple[Node, ...]
    residual: Node | None = None
    activation: str = "none"


_Operand = tuple[Node, Node | None, Node | None]  # values, and of codes their scale and zero point (None: 0)


class _Rewriting:
    """Nodes of a graph replaced one by one, in graph order."""

    def __init__(self, model: GraphModule) -> None:
        self.model, self.graph = model, model.graph
        self.place = {node: i for i, node in enumerate(model.graph.nodes)}
        self.writers = {n for n in self.place if (s := ops.schema_of(n)) is not None and s.is_mutable}
        self.new: dict[Node, Node] = {}
        self.operands: dict[
            tuple[Input, tuple[int, ...] | None], tuple[Node, _Operand]
        ] = {}  # and the first node that reads it

    def written(self, first: Node, last: Node, apart_from: Sequence[Node] = ()) -> bool:
        """Whether something is written in place between two nodes, so that neither may move to the other."""
        return any(self.place[first] < self.place[n] < self.place[last] for n in self.writers.difference(apart_from))

    def alone(self, layer: Layer) -> None:
        """One layer with its ending."""
        ending = self._ending(layer.node)
        with self.graph.inserting_before(layer.node):
            y = self._product([layer], ending)
        self._replace(ending, y)

    def together(self, layers: Sequence[Layer]) -> None:
        """Several linears as one, and a slice for each; activations stay behind the slices unless they are alike."""
        endings = [self._ending(layer.node, addend=False) for layer in layers]
        if len({ending.activation for ending in endings}) > 1:
            endings = [_Ending((layer.node,)) for layer in layers]
        start = 0
        with self.graph.inserting_before(layers[0].node):
            y = self._product(layers, endings[0])
            y.meta = {k: v for k, v in layers[0].node.meta.items() if k != "val"}
            parts = []
            for layer in layers:
                stop = start + layer.weight.codes.shape[0]
                parts.append(self.graph.call_function(aten.slice.Tensor, (y, -1, start, stop)))
                start = stop
        for ending, part in zip(endings, parts, strict=True):
            self._replace(ending, part, place=self.place[layers[0].node])

    def _replace(self, ending: _Ending, new: Node, place: int | None = None) -> None:
        last = ending.nodes[-1]
        new.meta = dict(last.meta)
        self.place[new] = self.place[ending.nodes[0]] if place is None else place
        self.new[last] = new
        last.replace_all_uses_with(new)
        for node in reversed(ending.nodes):
            self.writers.discard(node)
            self.graph.erase_node(node)

    def _now(self, node: Node) -> Node:
        """The node that stands where `node` stood."""
        while node in self.new:
            node = self.new[node]
        return node

    # endings ---------------------------------------------------------------------------------------------------

    def _ending(self, node: Node, *, addend: bool = True) -> _Ending:
        nodes, residual = [node], self._residual(node) if addend else None
        if residual is not None:
            nodes += node.users
        activation = _activation(user) if (user := _only_user(nodes[-1])) is not None else None
        if activation is not None:
            nodes.append(user)  # type: ignore[arg-type]
        if self.written(node, nodes[-1], nodes):
            return _Ending((node,))
        return _Ending(tuple(nodes), residual, activation or "none")

    def _residual(self, node: Node) -> Node | None:
        """The other addend, if all that follows is its sum with a value of the same shape that is there already."""
        user = _only_user(node)
        if user is None or ops.op_name(user) != "add" or user.kwargs.get("alpha", 1) != 1:
            return None
        left, right = user.args[:2]
        other = right if left is node else left
        if other is node or not isinstance(other, Node) or not ops.is_float(other):
            return None
        if user in self.writers and left is not node and not (other in self.new.values() and _only_user(other)):
            return None  # an in-place addition into the other addend, which other nodes may read
        value, addend, total = (n.meta.get("val") for n in (node, other, user))
        if value is None or addend is None or total is None:
            return None
        alike = _same(addend.shape, value.shape) and _same(total.shape, value.shape)
        alike = alike and total.dtype == value.dtype  # a float32 addend makes a float32 sum
        return other if alike and self.place.get(other, len(self.place)) < self.place[node] else None

    # products --------------------------------------------------------------------------------------------------

    def _product(self, layers: Sequence[Layer], ending: _Ending) -> Node:
        lead, call = layers[0], self.graph.call_function
        dtype, name, window = lead.node.meta["val"].dtype, lead.node.name, lead.window
        x, x_scale, zero_point = self._operand(lead)
        residual = ending.residual
        if residual is not None and window is not None:
            residual = self._channels_last(residual)
        codes = torch.cat([layer.weight.codes for layer in layers])
        scale = torch.cat([layer.weight.scale for layer in layers])
        bias = self._bias(layers)
        if window is not None and not window.one_pixel:
            y = self._convolution(lead, window.planar(), (x, x_scale, zero_point), bias, residual, ending.activation)
        elif lead.scaled:
            total = codes.sum(1, dtype=torch.int32) if zero_point is not None else None
            grid = (float(lead.input.low), float(lead.input.high), lead.input.eps)
            stored = (self._stored(f"{name}_weight", codes), self._stored(f"{name}_scale", scale.flatten()))
            sums = self._stored(f"{name}_sum", total)
            factors = (x_scale, zero_point, sums, bias, residual, *grid, ending.activation, dtype)
            y = call(torch.ops.torchquant.scaled_linear.default, (x, *stored, *factors))
        else:
            weight, points = lead.weight, [layer.weight.zero_point for layer in layers]
            offsets = None if weight.zero_point is None else torch.cat([p for p in points if p is not None])
            packed = self._stored(f"{name}_packed", packing.pack_weight(codes, weight.bits))
            params = self._stored(f"{name}_params", packing.pack_params(scale.to(dtype), offsets))
            form = (weight.bits, weight.group_size, offsets is not None, ending.activation)
            y = call(torch.ops.torchquant.weight_only_linear.default, (x, packed, params, bias, residual, *form))
        return y if window is None else call(aten.permute.default, (y, _channels_second(len(window.kernel) + 2)))

    def _convolution(
        self, layer: Layer, window: Window, x: _Operand, bias: Node | None, residual: Node | None, activation: str
    ) -> Node:
        """Codes behind windows on an image, channels last; a line is an image of height 1."""
        call, name, weight = self.graph.call_function, layer.node.name, layer.weight
        line = layer.window is not window
        values, x_scale, zero_point = x
        if line:
            values = call(aten.unsqueeze.default, (values, 1))
            residual = None if residual is None else call(aten.unsqueeze.default, (residual, 1))
        codes = weight.codes.reshape(len(weight.codes), *window.kernel, -1)
        total = codes.sum(-1, dtype=torch.int32).flatten(1) if zero_point is not None else None
        stored = (self._stored(f"{name}_weight", codes), self._stored(f"{name}_scale", weight.scale.flatten()))
        factors = (x_scale, zero_point, self._stored(f"{name}_sum", total), bias, residual)
        padding = [min(pair) for pair in window.padding]  # `_read` has added the rest
        form = (list(window.stride), padding, list(window.dilation), activation, layer.node.meta["val"].dtype)
        y = call(torch.ops.torchquant.scaled_conv2d.default, (values, *stored, *factors, *form))
        return call(aten.squeeze.dim, (y, 1)) if line else y

    def _operand(self, layer: Layer) -> _Operand:
        """What the kernel reads, of an image channels last: codes, or floats that it quantizes by rows."""
        activations, window = layer.input, layer.window
        uneven = None if window is None else window.uneven
        known = self.operands.get((activations, uneven))
        if known is None or self.written(known[0], layer.node):
            known = layer.node, self._read(activations, uneven, layer.weight.codes.device)
            self.operands[activations, uneven] = known
        x, scale, zero_point = known[1]
        if window is None or not window.one_pixel:
            return x, scale, zero_point
        if scale is None or activations.how == "static" or activations.axis is None:
            return self._strided(x, window), scale, zero_point
        points = None if zero_point is None else self._strided(zero_point, window)
        return self._strided(x, window), self._strided(scale, window), points

    def _read(self, activations: Input, uneven: tuple[int, ...] | None, device: torch.device) -> _Operand:
        """The operand of every layer with these activations; ops of an image see it channels last, as they write it."""
        x, call = self._now(activations.source), self.graph.call_function
        if uneven is not None:
            x = call(aten.permute.default, (x, [0, *range(2, len(uneven) + 2), 1]))
            activations = replace(activations, axis=None if activations.axis is None else -1)
            if any(uneven):
                x = call(aten.constant_pad_nd.default, (x, [0, 0, *(n for more in uneven[::-1] for n in (0, more))]))
        scale = zero_point = None
        by_rows = activations.how == "dynamic" and activations.symmetric and activations.axis is not None
        if activations.how != "float" and not by_rows:
            x, scale, zero_point = _quantized(self.model, x, activations, device)
        return x if uneven is None else call(aten.contiguous.default, (x,)), scale, zero_point

    def _strided(self, x: Node, window: Window) -> Node:
        """The pixels that a convolution of one pixel each reads."""
        for axis, step in enumerate(window.stride, start=1):
            if step != 1:
                x = self.graph.call_function(aten.slice.Tensor, (x, axis, 0, torch.iinfo(torch.int64).max, step))
        return x if set(window.stride) == {1} else self.graph.call_function(aten.contiguous.default, (x,))

    def _channels_last(self, image: Node) -> Node:
        """The image channels last: a copy in the graph, which Inductor fuses, instead of one at each launch."""
        rank = len(ops.shape_of(image) or ())
        rows = self.graph.call_function(aten.permute.default, (image, [0, *range(2, rank), 1]))
        return self.graph.call_function(aten.contiguous.default, (rows,))

    def _bias(self, layers: Sequence[Layer]) -> Node | None:
        if all(layer.bias is None for layer in layers):
            return None
        dtype = next(layer.bias.dtype for layer in layers if layer.bias is not None)
        zeros = [layer.weight.scale.new_zeros(len(layer.weight.scale), dtype=dtype) for layer in layers]
        parts = [zero if layer.bias is None else layer.bias for layer, zero in zip(layers, zeros, strict=True)]
        return self._stored(f"{layers[0].node.name}_bias", torch.cat(parts))

    def _stored(self, name: str, value: torch.Tensor | None) -> Node | None:
        return None if value is None else passes.add_buffer(self.model, name, value)


def _quantized(
    model: GraphModule, source: Node, activations: Input, device: torch.device | None = None
) -> tuple[Node, Node, Node | None]:
    """Nodes of codes, scale and zero point (None: 0), in ops that Inductor fuses with what makes `source`."""
    call, dialect = model.graph.call_function, torch.ops.torchquant
    grid = (activations.low, activations.high)
    zero_point: Node | None = None
    if activations.how == "static":
        scale = passes.add_buffer(model, f"{source.name}_scale", torch.tensor([activations.scale], device=device))
        if activations.zero_point:
            value = torch.tensor([activations.zero_point], dtype=torch.int32, device=device)
            zero_point = passes.add_buffer(model, f"{source.name}_zero_point", value)
    elif activations.symmetric:
        scale = call(dialect.choose_scale.default, (source, activations.axis, *grid, activations.eps))
    else:
        chosen = call(dialect.choose_affine.default, (source, activations.axis, *grid, activations.eps))
        scale, zero_point = (call(operator.getitem, (chosen, i)) for i in (0, 1))
    codes = call(dialect.quantize_scaled.default, (source, scale, *grid, activations.dtype, zero_point))
    return codes, scale, zero_point


def _fusible_rounding(model: GraphModule) -> None:
    """Dynamic quantize and dequantize ops that stay, in our dialect: Inductor has no lowering of torch's."""

    reading = GraphReading(model)

    def rewrite_one(model: GraphModule, node: Node) -> Node | None:
        activations = read_input(reading, node)
        if activations.how != "dynamic":
            return None
        codes, scale, zero_point = _quantized(model, activations.source, activations)
        grid, dtypes = (activations.low, activations.high), (activations.dtype, activations.output_dtype)
        args: tuple[Any, ...] = (codes, scale, *grid, *dtypes, zero_point)
        return model.graph.call_function(torch.ops.torchquant.dequantize_scaled.default, args)

    def foreign(node: Node) -> bool:
        return ops.is_dequantize(node) and ops.qdq_name(node) != "dequantize_scaled" and not ops.is_constant(node)

    passes.replace_each(model, foreign, rewrite_one)


def _reshapes(model: GraphModule) -> None:
    """Views as reshapes, which may copy: what is channels last now was not when the graph was exported."""
    for node in model.graph.nodes:
        if node.target is aten.view.default and not _is_written(node) and not _is_written(node.args[0]):
            node.target = aten.reshape.default


def _is_written(node: Node) -> bool:
    """Whether an op writes into the node's value."""
    schemas = [ops.schema_of(user) for user in node.users if user.args[0] is node]
    return any(schema is not None and schema.is_mutable for schema in schemas)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(statically_known_true(m == n) for m, n in zip(a, b, strict=True))


def _channels_second(rank: int) -> list[int]:
    return [0, rank - 1, *range(1, rank - 1)]


def _activation(node: Node) -> str | None:
    """The kernel's name of an activation, or None."""
    name, arguments = ops.op_name(node), ops.arguments(node)
    if name in ("relu", "silu"):
        return name
    if name == "gelu":
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(arguments.get("approximate", "none"))
    if name != "hardtanh":
        return None
    if "relu6" in ops.overload_of(node):
        return "relu6"
    default = (-1, 1) if "hardtanh" in ops.overload_of(node) else (None, None)
    low = arguments.get("min_val", arguments.get("min", default[0]))
    high = arguments.get("max_val", arguments.get("max", default[1]))
    return "relu6" if (low, high) == (0, 6) else "relu" if (low, high) == (0, None) else None
