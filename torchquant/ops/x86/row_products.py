"""Linears and lookups with weights of few bits as ops of ours, whose weights stay packed in the artefact."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from torchquant.fx import passes
from torchquant.fx.reading import GraphReading
from torchquant.fx.sites import marked
from torchquant.ops.x86 import few_bits, matching, native, rows
from torchquant.ops.x86.few_bits import Product

__all__ = ["Packed", "replace_float_lookups", "replace_row_products"]

aten = torch.ops.aten


class Packed:
    """What was replaced: the names of the kernels, and what the sites were marked with, see `fx.sites.mark_sites`."""

    def __init__(self, products: Sequence[Product]) -> None:
        self.products = [product.name for product in products]
        self.sites = [marked(product.node) for product in products]


def replace_row_products(graph: GraphModule) -> list[Packed]:
    """Put `native.ops().x86_linear` and `x86_lookup` in the place of what they compute; in place.

    Linears that read the same rows become one product, and slices of it. A table that is looked up and multiplied by is
    stored once.
    """
    reading = GraphReading(graph)
    products = [p for node in graph.graph.nodes if isinstance(p := few_bits.read(reading, node), Product)]
    if not products:
        return []
    native.load()
    stored, now = _Stored(graph), dict[Node, Node]()
    for group in _siblings(products):
        _replace(graph, group, stored, now)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
    passes.remove_dead_weights(graph)
    return [Packed(products)]


def replace_float_lookups(graph: GraphModule) -> int:
    """Lookups in float32 tables as an op of ours, which raises where an index is out of range; returns how many.

    What Inductor generates for them ends the process.
    """
    found = [n for n in graph.graph.nodes if n.target is aten.embedding.default and matching.is_float32(n)]
    if found:
        native.load()
    for node in found:
        node.target, node.args, node.kwargs = native.ops().x86_float_lookup.default, node.args[:2], {}
    graph.recompile()
    return len(found)


class _Stored:
    """Packed weights in the graph, each once."""

    def __init__(self, graph: GraphModule) -> None:
        self._graph, self._names = graph, dict[bytes, str]()

    def node(self, name: str, packed: torch.Tensor) -> Node:
        """Where it is read; to be called where a node may be inserted."""
        digest = hashlib.sha256(packed.numpy().data).digest()
        if digest in self._names:
            return self._graph.graph.get_attr(self._names[digest])
        node = passes.add_buffer(self._graph, f"{name}_packed", packed)
        self._names[digest] = str(node.target)
        return node


def _siblings(products: Sequence[Product]) -> list[list[Product]]:
    """Linears whose rows and groups are alike together, in graph order by the first of each."""
    alike: dict[object, list[Product]] = defaultdict(list)
    for product in products:
        grid = product.grid
        form = (grid.bits, grid.low, grid.codes.shape[1], grid.scale.shape[1])
        kind = (product.values, product.bits, product.least_scale, form) if product.bits else product.node
        alike[kind].append(product)
    return list(alike.values())


def _replace(graph: GraphModule, group: Sequence[Product], stored: _Stored, now: dict[Node, Node]) -> None:
    """Put one op in the place of a group, in graph order; `now` is what stands where other groups stood."""
    first, call = group[0], graph.graph.call_function
    values = now.get(first.values, first.values)
    with graph.graph.inserting_before(first.node):
        packed = stored.node(first.node.name, rows.pack(_joined(group), _bias_of(group)))
        sizes = [len(product.grid.codes) for product in group]
        if not first.bits:
            width = first.grid.codes.shape[1]
            parts = [call(native.ops().x86_lookup.default, (packed, values, width))]
        else:
            args = (packed, values, sum(sizes), first.bits, first.least_scale)
            parts = [call(native.ops().x86_linear.default, args)]
        if len(group) > 1:
            parts = _sliced(call, parts[0], sizes)
    for product, part in zip(group, parts, strict=True):
        part.meta = dict(product.node.meta)
        now[product.node] = part
        product.node.replace_all_uses_with(part)
        graph.graph.erase_node(product.node)
        for user in part.users if len(group) > 1 else ():
            if user.target is aten.view.default:
                user.target = aten.reshape.default  # a slice of rows is not contiguous


def _sliced(call: Callable[..., Node], whole: Node, sizes: Sequence[int]) -> list[Node]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        call(aten.slice.Tensor, (whole, -1, start, start + size)) for start, size in zip(starts, sizes, strict=True)
    ]


def _joined(group: Sequence[Product]) -> rows.Grid:
    """Their outputs one after the other."""
    grids = [product.grid for product in group]
    codes, scales, points = ([getattr(g, name) for g in grids] for name in ("codes", "scale", "zero_point"))
    return replace(grids[0], codes=torch.cat(codes), scale=torch.cat(scales), zero_point=torch.cat(points))


def _bias_of(group: Sequence[Product]) -> torch.Tensor | None:
    if all(product.bias is None for product in group):
        return None
    parts = [
        torch.zeros(len(product.grid.codes)) if product.bias is None else product.bias.detach().float()
        for product in group
    ]
    return torch.cat(parts)
