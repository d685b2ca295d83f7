"""The first step of each kind of op in a plan, before what follows it is fused into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from torchquant.fx import ops
from torchquant.ops.x86 import matching, packing, transposed
from torchquant.ops.x86.plan import Step, Value
from torchquant.ops.x86.region import Region

__all__ = ["max_pool", "step_of"]


def max_pool(region: Region, node: Node, source: Value | None = None) -> Step:
    window = matching.window_of(node)
    assert window is not None
    operand = source or region.number(node.all_input_nodes[0])
    return Step("max_pool", operand, label=node.name, numbers=dict(window))


def convolution(region: Region, node: Node) -> Step:
    arguments = ops.arguments(node)
    weight, window = region.finder.weight(node), matching.window_of(node)
    assert weight is not None
    assert window is not None
    quantize = matching.quantize_behind(arguments["input"])
    assert quantize is not None
    source = quantize.all_input_nodes[0]
    if ops.op_name(source) == "pad" and source in region.inside:
        top, left, _, _ = matching.padding_of(source) or [0] * 4
        window["pt"], window["pl"] = window["pt"] + top, window["pl"] + left
    return _windows(region, node, weight, window, arguments.get("groups", 1))


def _windows(region: Region, node: Node, weight: matching.Weight, window: dict[str, int], groups: int) -> Step:
    """A product of the pixels under a window."""
    quantize = matching.quantize_behind(ops.arguments(node)["input"])
    assert quantize is not None
    n, c = weight.codes.shape[:2]
    deep = matching.is_depthwise(weight.codes, groups)
    numbers = {**window, "channels": n, "depth": 0 if deep else -(-c // 4) * 4}
    codes = weight.codes.unsqueeze(2) if weight.codes.dim() == 3 else weight.codes
    if groups > 1 and not deep:
        cut = packing.Groups.of(groups, c, n // groups)
        numbers |= {"depth": cut.depth, "group_in": c, "group_out": n // groups, "group_panel": cut.panel}
        codes = cut.pack(codes)
    step = Step("depthwise" if deep else "conv", region.bytes_of(quantize), label=node.name, numbers=numbers)
    region.products[step] = matching.Weight(codes, weight.scale), region.bias(node, n)
    return step


def transposed_convolution(region: Region, node: Node) -> Step:
    weight, phases = region.finder.weight(node), transposed.phases_of(node)
    assert weight is not None
    assert phases is not None
    step = _windows(region, node, weight, phases.window, phases.groups)
    region.phases[step] = phases
    return step


def linear(region: Region, node: Node) -> Step:
    arguments = ops.arguments(node)
    weight, quantize = region.finder.weight(node), matching.quantize_behind(arguments["input"])
    assert weight is not None
    assert quantize is not None
    n, c = weight.codes.shape
    numbers = {"channels": n, "depth": -(-c // 4) * 4}
    step = Step("conv", region.bytes_of(quantize), label=node.name, numbers=numbers)
    region.products[step] = matching.Weight(weight.codes[:, :, None, None], weight.scale), region.bias(node, n)
    return step


def global_mean(region: Region, node: Node) -> Step:
    return Step("mean", region.bytes_or_floats(node.args[0]), label=node.name)


def binary(region: Region, node: Node) -> Step:
    pair: list[Any] = list(node.args[:2])
    if matching.shape_of(pair[0]) != matching.shape_of(node):
        pair.reverse()
    broadcast = int(matching.shape_of(pair[1]) != matching.shape_of(node))
    other = region.number(pair[1]) if broadcast else region.bytes_or_floats(pair[1])
    numbers = {"binary": ops.op_name(node), "other_broadcast": broadcast}
    return Step("elementwise", region.bytes_or_floats(pair[0]), other=other, label=node.name, numbers=numbers)


def layer_norm(region: Region, node: Node) -> Step:
    arguments = ops.arguments(node)
    c = int(matching.shape_of(node)[-1])
    numbers: dict[str, Any] = {"factor": float(arguments.get("eps", 1e-5))}
    for field_name, key, fill in (("scale", "weight", 1.0), ("bias", "bias", 0.0)):
        padded = torch.zeros(-(-c // 16) * 16)
        parameter = arguments.get(key)
        padded[:c] = torch.full((c,), fill) if parameter is None else ops.constant_value(region.graph, parameter)
        numbers[field_name] = region.plan.constant(padded)
    return Step("layer_norm", region.bytes_or_floats(node.args[0]), label=node.name, numbers=numbers)


def elementwise(region: Region, node: Node) -> Step:
    """An activation with nothing in front of it to be fused with."""
    activation = matching.activation_of(node)
    assert activation is not None
    numbers = {"before": activation["name"], "before_low": activation["low"], "before_high": activation["high"]}
    return Step("elementwise", region.bytes_or_floats(node.args[0]), label=node.name, numbers=numbers)


_STEPS: dict[str, Callable[[Region, Node], Step]] = {
    "adaptive_avg_pool2d": global_mean,
    "add": binary,
    "conv1d": convolution,
    "conv2d": convolution,
    "layer_norm": layer_norm,
    "linear": linear,
    "max_pool2d": max_pool,
    "mean": global_mean,
    "mul": binary,
    **dict.fromkeys(transposed.NAMES, transposed_convolution),
}


def step_of(region: Region, node: Node) -> Step:
    """The step that computes a node; what is none of the others is an activation."""
    return _STEPS.get(ops.op_name(node), elementwise)(region, node)
