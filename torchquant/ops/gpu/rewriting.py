"""A converted graph with each quantized product as one op of `linears.py`, and with it what follows in its kernel."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

import torchquant.ops.gpu.linears  # noqa: F401 - registers the ops
from torchquant.fx import ops, passes
from torchquant.ops.gpu import packing
from torchquant.ops.gpu.reading import Input, Layer, read_input, read_layer

__all__ = ["OPS", "rewrite"]

aten = torch.ops.aten
OPS = ("weight_only_linear", "scaled_linear")


def rewrite(model: GraphModule, names: set[str]) -> int:
    """Replace the ops named by ops of ours, in place; returns how many ops of ours that makes.

    Linears that read the same values in the same way become one op. Quantize and dequantize ops around float ops stay,
    in a dialect that Inductor fuses.

    Raises:
        LoweringError: an op named has no kernel.
    """
    layers = [read_layer(model, n) for n in model.graph.nodes if n.name in names]
    work = _Rewriting(model)
    groups = _siblings(work, layers)
    for group in groups:
        if len(group) > 1:
            work.together(group)
        else:
            work.alone(group[0])
    _fusible_rounding(model)
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
        together = group[0].stride is None and not work.written(group[0].node, group[-1].node)
        groups += [group] if together else [[layer] for layer in group]
    return sorted(groups, key=lambda group: work.place[group[0].node])


@dataclass(frozen=True)
class _Ending:
    """What a kernel computes from a product on: the nodes, and their addend and activation."""

    nodes: tuple[Node, ...]
    residual: Node | None = None
    activation: str = "none"


class _Rewriting:
    """Nodes of a graph replaced one by one, in graph order."""

    def __init__(self, model: GraphModule) -> None:
        self.model, self.graph = model, model.graph
        self.place = {node: i for i, node in enumerate(model.graph.nodes)}
        self.writers = {n for n in self.place if (s := ops.schema_of(n)) is not None and s.is_mutable}
        self.new: dict[Node, Node] = {}
        self.codes: dict[Input, tuple[Node, Node, Node | None]] = {}

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
        in_place = user in self.writers and left is not node  # would write into the other addend
        if in_place or other is node or not isinstance(other, Node) or not ops.is_float(other):
            return None
        value, addend, total = (n.meta.get("val") for n in (node, other, user))
        if value is None or addend is None or total is None:
            return None
        alike = _same(addend.shape, value.shape) and _same(total.shape, value.shape)
        alike = alike and total.dtype == value.dtype  # a float32 addend makes a float32 sum
        return other if alike and self.place.get(other, len(self.place)) < self.place[node] else None

    # products --------------------------------------------------------------------------------------------------

    def _product(self, layers: Sequence[Layer], ending: _Ending) -> Node:
        lead, call = layers[0], self.graph.call_function
        x, x_scale, zero_point = self._operand(lead.input, lead.weight.codes.device)
        one_scale = lead.input.how == "static" or lead.input.axis is None
        x = self._rows(lead, x)
        if x_scale is not None and not one_scale:
            x_scale = self._rows(lead, x_scale)
            zero_point = None if zero_point is None else self._rows(lead, zero_point)
        residual = None if ending.residual is None else self._rows(lead, ending.residual, strided=False)
        dtype, name = lead.node.meta["val"].dtype, lead.node.name
        codes = torch.cat([layer.weight.codes for layer in layers])
        scale = torch.cat([layer.weight.scale for layer in layers])
        bias = self._bias(layers)
        if lead.scaled:
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
        return y if lead.stride is None else call(aten.permute.default, (y, _channels_second(len(lead.stride) + 2)))

    def _rows(self, layer: Layer, x: Node, *, strided: bool = True) -> Node:
        """An image as rows of channels; a linear's input as it is."""
        if layer.stride is None:
            return x
        for axis, step in enumerate(layer.stride, start=2):
            if strided and step != 1:
                x = self.graph.call_function(aten.slice.Tensor, (x, axis, 0, torch.iinfo(torch.int64).max, step))
        rank = len(layer.stride) + 2
        rows = self.graph.call_function(aten.permute.default, (x, [0, *range(2, rank), 1]))
        return self.graph.call_function(aten.contiguous.default, (rows,))  # by what makes x, not in the kernel's launch

    def _operand(self, given: Input, device: torch.device) -> tuple[Node, Node | None, Node | None]:
        """What the kernel reads: codes with scale and zero point, or floats that it quantizes by rows."""
        source = self._now(given.source)
        by_rows = given.how == "dynamic" and given.symmetric and given.axis is not None
        if given.how == "float" or by_rows:
            return source, None, None
        if given not in self.codes:
            self.codes[given] = _quantized(self.model, source, given, device)
        return self.codes[given]

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
    model: GraphModule, source: Node, given: Input, device: torch.device | None = None
) -> tuple[Node, Node, Node | None]:
    """Nodes of codes, scale and zero point (None: 0), in ops that Inductor fuses with what makes `source`."""
    call, dialect = model.graph.call_function, torch.ops.torchquant
    grid = (given.low, given.high)
    zero_point: Node | None = None
    if given.how == "static":
        scale = passes.add_buffer(model, f"{source.name}_scale", torch.tensor([given.scale], device=device))
        if given.zero_point:
            value = torch.tensor([given.zero_point], dtype=torch.int32, device=device)
            zero_point = passes.add_buffer(model, f"{source.name}_zero_point", value)
    elif given.symmetric:
        scale = call(dialect.choose_scale.default, (source, given.axis, *grid, given.eps))
    else:
        chosen = call(dialect.choose_affine.default, (source, given.axis, *grid, given.eps))
        scale, zero_point = (call(operator.getitem, (chosen, i)) for i in (0, 1))
    codes = call(dialect.quantize_scaled.default, (source, scale, *grid, given.dtype, zero_point))
    return codes, scale, zero_point


def _fusible_rounding(model: GraphModule) -> None:
    """Dynamic quantize and dequantize ops that stay, in our dialect: Inductor has no lowering of torch's."""

    def rewrite_one(model: GraphModule, node: Node) -> Node | None:
        given = read_input(model, node)
        if given.how != "dynamic":
            return None
        codes, scale, zero_point = _quantized(model, given.source, given)
        args: tuple[Any, ...] = (codes, scale, given.low, given.high, given.dtype, given.output_dtype, zero_point)
        return model.graph.call_function(torch.ops.torchquant.dequantize_scaled.default, args)

    def foreign(node: Node) -> bool:
        return ops.is_dequantize(node) and ops.qdq_name(node) != "dequantize_scaled" and not ops.is_constant(node)

    passes.replace_each(model, foreign, rewrite_one)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(statically_known_true(m == n) for m, n in zip(a, b, strict=True))


def _channels_second(rank: int) -> list[int]:
    return [0, rank - 1, *range(1, rank - 1)]


def _activation(node: Node) -> str | None:
    """The kernel's name of an activation, or None."""
    name, given = ops.op_name(node), ops.arguments(node)
    if name in ("relu", "silu"):
        return name
    if name == "gelu":
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(given.get("approximate", "none"))
    if name != "hardtanh":
        return None
    if "relu6" in ops.overload_of(node):
        return "relu6"
    default = (-1, 1) if "hardtanh" in ops.overload_of(node) else (None, None)
    low = given.get("min_val", given.get("min", default[0]))
    high = given.get("max_val", given.get("max", default[1]))
    return "relu6" if (low, high) == (0, 6) else "relu" if (low, high) == (0, None) else None
