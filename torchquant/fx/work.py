"""What the matrix products of a converted graph compute and move."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from torchquant.fx import ops
from torchquant.fx.sites import read_sites
from torchquant.types import Site

__all__ = ["KINDS", "Work", "resident_bytes", "work"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """What one op computes and moves.

    Args:
        node: its name in the converted graph.
        kind: `1x1 conv`, `depthwise`, `other conv`, `linear`, `attention` or `matmul`.
        precision: `int8` (integer products), `weights` (float products of weights that are stored as codes) or `fp32`.
        macs: multiply-accumulates, those with padding too.
        weight_bytes: the codes alone, without scales and bias.
        input_bytes, output_bytes: in the precision of the op's activations: what follows it up to the next quantize op
            counts as fused into it.
    """

    node: str
    kind: str
    precision: str
    macs: int
    weight_bytes: int
    input_bytes: int
    output_bytes: int

    @property
    def bytes_(self) -> int:
        """All that it moves, each byte once."""
        return self.weight_bytes + self.input_bytes + self.output_bytes


def work(graph: GraphModule) -> list[Work]:
    """Convolutions, linears, attention and matrix products of a converted graph, at the example's sizes."""
    sites = {site.node: site for site in read_sites(graph)}
    return [
        _work(node, sites.get(node.name), graph)
        for node in graph.graph.nodes
        if ops.op_name(node) in KINDS and node.op == "call_function"
    ]


def _work(node: Node, site: Site | None, graph: GraphModule) -> Work:
    kind = ops.kind_of(node)
    assert kind is not None
    weight = ops.argument(node, kind.weight) if kind.weight is not None else None
    shapes = [_shape(n, graph) for n in (*ops.data_inputs(node, kind), *([weight] if weight is not None else ()))]
    data = shapes[:-1] if weight is not None else shapes
    output = _shape(node, graph)
    name, macs = KINDS[kind.name](output, *shapes)
    integer = site is not None and site.status == "quantized" and site.activation is not None
    coded = site is not None and site.weight is not None
    width = 1 if integer else _width(node)
    bits = 8 * _width(weight) if weight is not None else 0
    if site is not None and site.weight is not None and site.weight.quant_max is not None:
        bits = max(1, int(site.weight.quant_max - site.weight.quant_min).bit_length())
    return Work(
        node.name,
        name,
        "int8" if integer else "weights" if coded else "fp32",
        macs,
        weight_bytes=-(-bits * math.prod(shapes[-1]) // 8) if weight is not None else 0,
        input_bytes=width * sum(map(math.prod, data)),
        output_bytes=width * math.prod(output),
    )


def _width(node: Node) -> int:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return int(value.element_size())
    return 4


def _shape(node: Node, graph: GraphModule) -> Shape:
    """The shape of a value; quantize and dequantize ops, which may carry none, leave it as it is."""
    if ops.is_constant(node) and ops.is_dequantize(node) and ops.shape_of(node) is None:
        return tuple(ops.constant_value(graph, node).shape)
    while ops.shape_of(node) is None and (ops.is_quantize(node) or ops.is_dequantize(node)):
        node = node.all_input_nodes[0]
    shape = ops.constant_value(graph, node).shape if node.op == "get_attr" else ops.shape_of(node)
    return tuple(s if isinstance(s, int) else int(s.node.hint or 2) for s in shape or ())


def _convolution(output: Shape, data: Shape, weight: Shape) -> tuple[str, int]:
    depthwise = weight[1] == 1 and data[1] > 1
    kind = "depthwise" if depthwise else "1x1 conv" if math.prod(weight[2:]) == 1 else "other conv"
    return kind, math.prod(output) * math.prod(weight[1:])


def _transposed(output: Shape, data: Shape, weight: Shape) -> tuple[str, int]:
    return "other conv", math.prod(data) * math.prod(weight[1:])


def _linear(output: Shape, data: Shape, weight: Shape) -> tuple[str, int]:
    return "linear", math.prod(output) * weight[-1]


def _attention(output: Shape, query: Shape, key: Shape, value: Shape) -> tuple[str, int]:
    """Every query with every key, those a mask hides too."""
    return "attention", math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _matmul(output: Shape, left: Shape, right: Shape) -> tuple[str, int]:
    return "matmul", math.prod(output) * left[-1]


# Op -> its kind and MACs from the shapes of its output, of its data inputs, and of its weight.
KINDS: Mapping[str, Callable[..., tuple[str, int]]] = {
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "conv_transpose1d": _transposed,
    "conv_transpose2d": _transposed,
    "linear": _linear,
    "attention": _attention,
    "matmul": _matmul,
}


def resident_bytes(op_work: Sequence[Work]) -> int:
    """What stays in the caches from call to call at best: all weights, and the activations of the largest op."""
    return sum(w.weight_bytes for w in op_work) + max((w.input_bytes + w.output_bytes for w in op_work), default=0)
