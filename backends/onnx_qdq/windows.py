"""What stands around a convolution: clamps that the codes imply, zeros in front of it, means over whole images."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from torchquant.backends.onnx_qdq.capabilities import is_global_pool
from torchquant.backends.onnx_qdq.dialect import OPS
from torchquant.fx import ops, passes
from torchquant.fx.reading import GraphReading, stored_shape
from torchquant.fx.windows import is_spatial_pad, window_of

__all__ = ["absorb_pads", "fold_clamps", "pool_globally", "shield_clamps"]

aten = torch.ops.aten
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


def fold_clamps(graph: GraphModule, reading: GraphReading) -> int:
    """Drop each ReLU, ReLU6 and clamp all of whose users quantize to a grid that ends where it does, or before."""
    done = 0
    for node in [n for n in graph.graph.nodes if ops.op_name(n) in ("relu", "hardtanh")]:
        limits = _limits(node)
        if limits is not None and node.users and all(_implies(reading, user, limits) for user in node.users):
            node.replace_all_uses_with(node.args[0])
            done += 1
    return passes.finished(graph, done)


def shield_clamps(graph: GraphModule, reading: GraphReading) -> int:
    """Write a ReLU in front of float8 codes as a maximum: ONNX Runtime drops ReLUs in front of zero points of 0."""
    done = 0
    for node in [n for n in graph.graph.nodes if ops.op_name(n) in ("relu", "hardtanh")]:
        limits = _limits(node)
        if limits is None or not any(_is_float8(reading, user) for user in node.users):
            continue
        value = node.args[0]
        with graph.graph.inserting_before(node):
            for op, limit in zip((aten.maximum.default, aten.minimum.default), limits, strict=True):
                if limit is not None:
                    bound = passes.add_buffer(graph, f"{node.name}_bound", torch.tensor(float(limit)))
                    value = graph.graph.call_function(op, (value, bound))
        node.replace_all_uses_with(value)
        done += 1
    return passes.finished(graph, done)


def _is_float8(reading: GraphReading, user: Node) -> bool:
    quantized = reading.op(user) if ops.is_quantize(user) else None
    return quantized is not None and quantized.qparams.dtype.is_floating_point


def _limits(node: Node) -> tuple[float | None, float | None] | None:
    """The least and the largest value that a clamp lets through, None where there is none."""
    arguments, name = ops.arguments(node), ops.overload_of(node)
    if ops.op_name(node) == "relu":
        return 0.0, None
    if name.startswith("relu6"):
        return 0.0, 6.0
    lower = ("min_val", -1.0) if name.startswith("hardtanh") else ("min", None)
    upper = ("max_val", 1.0) if name.startswith("hardtanh") else ("max", None)
    low, high = (arguments.get(*bound) for bound in (lower, upper))
    return None if isinstance(low, Node) or isinstance(high, Node) else (low, high)


def _implies(reading: GraphReading, user: Node, limits: tuple[float | None, float | None]) -> bool:
    """Whether a value beyond the limits has the same code as the limit."""
    quantized = reading.op(user) if ops.is_quantize(user) else None
    if quantized is None or quantized.qparams.scale is None or quantized.qparams.scale.numel() != 1:
        return False
    q = quantized.qparams
    scale, zero = float(q.scale), 0.0 if q.zero_point is None else float(q.zero_point)  # type: ignore[arg-type]
    low, high = limits
    below = low is None or round(low / scale) + zero <= q.quant_min
    return below and (high is None or round(high / scale) + zero >= q.quant_max)


def absorb_pads(graph: GraphModule, reading: GraphReading) -> int:
    """Let integer convolutions pad the zeros that stand in front of them: they pad with the code of zero."""
    done = 0
    for node in [n for n in graph.graph.nodes if is_spatial_pad(n)]:
        convolutions = _padded(node, reading)
        for convolution in convolutions:
            _pad_by_itself(graph, reading, convolution, list(ops.arguments(node)["pad"]))
        if convolutions:
            node.replace_all_uses_with(node.args[0])
            done += 1
    return passes.finished(graph, done)


def _padded(pad: Node, reading: GraphReading) -> list[Node]:
    """The convolutions that read nothing but a pad's codes, and all that do; empty if anything else does."""
    read = [d for q in pad.users for d in q.users]
    if not read or not all(ops.is_quantize(q) and _has_zero(reading, q) for q in pad.users):
        return []
    users = [user for d in read for user in d.users]
    fits = all(ops.is_dequantize(d) for d in read) and all(_is_integer(reading, u) and u.args[0] in read for u in users)
    return users if fits else []


def _is_integer(reading: GraphReading, node: Node) -> bool:
    return ops.op_name(node) in _CONVOLUTIONS and _kernel(reading, node) is not None


def _kernel(reading: GraphReading, node: Node) -> list[int] | None:
    """The kernel size of a convolution with stored codes."""
    weight = ops.argument(node, 1)
    quantized = None if weight is None else reading.op(weight)
    shape = None if quantized is None else stored_shape(reading.model, quantized.codes)
    return None if shape is None else list(shape[2:])


def _has_zero(reading: GraphReading, quantize: Node) -> bool:
    """Whether the value 0 has a code of its own in a static grid."""
    quantized = reading.op(quantize)
    if quantized is None or quantized.qparams.scale is None or quantized.qparams.axis is not None:
        return False
    q = quantized.qparams
    return q.zero_point is None or q.quant_min <= int(q.zero_point) <= q.quant_max


def _pad_by_itself(graph: GraphModule, reading: GraphReading, node: Node, sides: list[int]) -> None:
    kernel = _kernel(reading, node)
    assert kernel is not None
    window = window_of(node, kernel)
    rank = len(window.kernel)
    more = [
        (sides[2 * i], sides[2 * i + 1]) for i in reversed(range(len(sides) // 2))
    ]  # aten names the last axis first
    more = [(0, 0)] * (rank - len(more)) + more[-rank:]
    pads = [own[side] + extra[side] for side in (0, 1) for own, extra in zip(window.padding, more, strict=True)]
    arguments = ops.arguments(node)
    args = (*node.args[:2], arguments.get("bias"), list(window.stride), pads, list(window.dilation))
    with graph.graph.inserting_before(node):
        new = graph.graph.call_function(OPS.conv.default, (*args, arguments.get("groups", 1)))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)


def pool_globally(graph: GraphModule) -> int:
    """Means over whole images as the op that runtimes know an integer kernel of."""

    def rewritten(_: GraphModule, node: Node) -> Node:
        pooled = graph.graph.call_function(OPS.global_average_pool.default, (node.args[0],))
        flat = len(ops.shape_of(node) or ()) == 2
        return graph.graph.call_function(aten.flatten.using_ints, (pooled, 1)) if flat else pooled

    return passes.replace_each(graph, is_global_pool, rewritten)
