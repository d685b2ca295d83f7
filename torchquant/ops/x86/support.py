"""Which ops the x86 kernels run, of those that they have a step for: sizes, layouts and weights decide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from torchquant.fx import ops
from torchquant.ops.x86 import matching, transposed
from torchquant.ops.x86.placement import Placement

__all__ = ["is_run", "multiplication"]


def _product(places: Placement, node: Node) -> matching.Weight | None:
    arguments = ops.arguments(node)
    source, weight = matching.quantize_behind(arguments["input"]), places.weight(node)
    if source is None or arguments["input"] not in places.known or weight is None:
        return None
    bias = arguments.get("bias")
    if bias is not None and not (isinstance(bias, Node) and ops.is_constant(bias)):
        return None
    terms = weight.codes[0].numel()
    return weight if terms * 255 * 128 < matching.ACCUMULATOR else None


def convolution(places: Placement, node: Node) -> bool:
    weight = _product(places, node)
    if weight is None or matching.window_of(node) is None:
        return False
    unbatched = len(matching.shape_of(node)) != weight.codes.dim()
    return not unbatched and places.layout.get(node.all_input_nodes[0]) == matching.IMAGE


def transposed_convolution(places: Placement, node: Node) -> bool:
    weight, source = _product(places, node), node.all_input_nodes[0]
    if weight is None or not matching.static(matching.shape_of(source)[1:]):
        return False
    unbatched = len(matching.shape_of(node)) != len(matching.shape_of(ops.arguments(node)["weight"]))
    return not unbatched and places.layout.get(source) == matching.IMAGE


def linear(places: Placement, node: Node) -> bool:
    return _product(places, node) is not None and places.layout.get(node.all_input_nodes[0]) != matching.IMAGE


def addition(places: Placement, node: Node) -> bool:
    if ops.arguments(node).get("alpha", 1) != 1 or not all(isinstance(a, Node) for a in node.args[:2]):
        return False
    pair: list[Any] = list(node.args[:2])
    same = all(matching.shape_of(a) == matching.shape_of(node) for a in pair)
    return same and all(matching.is_float32(a) and a not in places.constants for a in pair)


def multiplication(places: Placement, node: Node) -> bool:
    """Of the same shape, of an image by one number a channel, or of a product's results by constants."""
    if _scales_product(places, node):
        return True
    if not all(isinstance(a, Node) for a in node.args[:2]):
        return False
    pair: list[Any] = list(node.args[:2])
    if not all(matching.is_float32(a) and a not in places.constants for a in pair):
        return False
    shapes = [matching.shape_of(a) for a in pair]
    if shapes[0] == shapes[1] == matching.shape_of(node):
        return True
    gate = [s for s in shapes if s != matching.shape_of(node)]
    return places.layout[node] == matching.IMAGE and len(gate) == 1 and gate[0] == (*matching.shape_of(node)[:2], 1, 1)


def _scales_product(places: Placement, node: Node) -> bool:
    """Whether the constants of a multiplication can be multiplied into the scales of the product in front of it."""
    scaling = matching.factor_of(places.graph, node)
    if scaling is None:
        return False
    source, factor = scaling
    layout, shape = places.layout[node], matching.shape_of(node)
    channels = shape[1] if layout == matching.IMAGE else shape[-1]
    if matching.channels_of(factor, int(channels), layout, len(shape)) is None:
        return False
    while source in places.known and len(source.users) == 1:
        if ops.op_name(source) in matching.PRODUCTS:
            return ops.op_name(source) not in transposed.NAMES
        if ops.op_name(source) == "mul":
            return _scales_product(places, source)
        if not (places.turns(source) or ops.overload_of(source) in matching.ALIASES):
            return False
        source = source.all_input_nodes[0]
    return False


def global_pool(places: Placement, node: Node) -> bool:
    return (
        len(matching.shape_of(node)) == 4
        and tuple(matching.shape_of(node)[2:]) == (1, 1)
        and matching.static(matching.shape_of(node.args[0])[1:])
    )


def mean(places: Placement, node: Node) -> bool:
    arguments = ops.arguments(node)
    source, dims = arguments["self"], arguments.get("dim")
    layout = places.layout.get(source)
    if arguments.get("dtype") is not None or len(matching.shape_of(source)) != 4 or layout == matching.ROWS:
        return False
    if layout == matching.PIXELS and arguments.get("keepdim"):
        return False
    return (
        isinstance(dims, (list, tuple))
        and sorted(d % 4 for d in dims) == ([2, 3] if layout == matching.IMAGE else [1, 2])
        and matching.static(matching.shape_of(source)[1:])
    )


def max_pool(places: Placement, node: Node) -> bool:
    return (
        ops.overload_of(node) == "max_pool2d.default"
        and len(matching.shape_of(node)) == 4
        and matching.window_of(node) is not None
    )


def pad(places: Placement, node: Node) -> bool:
    """In front of convolutions alone, which read the zeros as their own padding."""
    if matching.padding_of(node) is None or len(matching.shape_of(node)) != 4:
        return False
    for user in node.users:
        if not ops.is_quantize(user):
            return False
        for read in user.users:
            if not all(ops.op_name(u) in matching.CONVOLUTIONS for u in read.users):
                return False
    return True


def layer_norm(places: Placement, node: Node) -> bool:
    arguments = ops.arguments(node)
    if ops.overload_of(node) != "layer_norm.default" or list(arguments["normalized_shape"]) != [
        matching.shape_of(node)[-1]
    ]:
        return False
    return all(arguments.get(k) is None or ops.is_constant(arguments[k]) for k in ("weight", "bias"))


def reshape(places: Placement, node: Node) -> bool:
    """(n, c, 1, 1) as (n, c), the other way, either by way of (n, c, 1), or no change of shape."""
    source = ops.argument(node, 0)
    if source is None:
        return False
    before, after = matching.shape_of(source), matching.shape_of(node)
    if before == after:
        return places.layout[source] == places.layout[node]
    long, short = sorted((before, after), key=len, reverse=True)
    images = all(places.layout[n] == matching.IMAGE for n in (source, node) if len(matching.shape_of(n)) > 2)
    ones = {*long[2:], *short[2:]} == {1} and len(long) <= 4
    return images and ones and len(short) >= 2 and long[:2] == short[:2]


_RUN: dict[str, Callable[[Placement, Node], bool]] = {
    "adaptive_avg_pool2d": global_pool,
    "add": addition,
    "conv1d": convolution,
    "conv2d": convolution,
    "layer_norm": layer_norm,
    "linear": linear,
    "max_pool2d": max_pool,
    "mean": mean,
    "mul": multiplication,
    "pad": pad,
    **dict.fromkeys(transposed.NAMES, transposed_convolution),
}


def is_run(places: Placement, node: Node) -> bool:
    """Whether the kernels run a float op whose inputs are laid out as it is."""
    name = ops.op_name(node)
    if name in _RUN:
        return _RUN[name](places, node)
    if name in matching.ACTIVATIONS:
        return matching.activation_of(node) is not None
    if ops.overload_of(node) in matching.ALIASES:
        return (
            matching.shape_of(node) == matching.shape_of(node.all_input_nodes[0])
            and not ops.arguments(node).get("train", False)
            and "memory_format" not in node.kwargs
        )
    return reshape(places, node) if ops.overload_of(node) in matching.RESHAPES else places.turns(node)
