"""Ops that ExecuTorch runs nowhere, or fails on, written as those that it runs; each keeps its function."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchquant.backends.executorch_xnnpack.recurrent import gru, gru_cell, lstm_cell, rnn_cell
from torchquant.backends.executorch_xnnpack.tables import looked_up, lookup
from torchquant.backends.executorch_xnnpack.values import is_float32, reshaped, value_of, varying
from torchquant.backends.executorch_xnnpack.varying_sizes import attention, last_axis_parts
from torchquant.fx import ops, passes
from torchquant.fx.rewrites.builder import Builder, Rule, used_parts
from torchquant.fx.rewrites.decompose import rewrite

__all__ = ["RULES", "other_branches", "rewrite_branches"]

aten = torch.ops.aten


def prelu(b: Builder, node: Node) -> Node | None:
    """relu(x) - w relu(-x), where x is no image, for which the delegate has a kernel."""
    x, weight = node.args
    if not is_float32(x) or x.meta["val"].ndim == 4 or not isinstance(weight, Node):  # type: ignore[union-attr]
        return None
    assert isinstance(x, Node)
    rank, count = x.meta["val"].ndim, weight.meta["val"].numel()
    shape = [1, count, *[1] * (rank - 2)] if rank > 1 else [count]
    if ops.is_constant(weight):
        slope = b.constant(ops.constant_value(b.model, weight).reshape(shape), f"{weight.name}_slope_{rank}")
    else:
        slope = b.call(aten.reshape.default, weight, shape)
    below = b.call(aten.relu.default, b.call(aten.neg.default, x))
    return b.call(aten.sub.Tensor, b.call(aten.relu.default, x), b.call(aten.mul.Tensor, below, slope))


def largest(b: Builder, node: Node) -> tuple[Node, ...] | None:
    """The values of a maximum over an axis, whose places nobody reads.

    The partitioner takes it for any axis of an image, and the delegate's compiler fails but for two of them.
    """
    x, axis, *keep = node.args
    if used_parts(node) != {0} or not is_float32(x, 4):
        return None
    return (b.call(aten.amax.default, x, [axis], bool(keep and keep[0])),)


# pools ---------------------------------------------------------------------------------------------------------------


def _three(value: Any, default: Any = 0) -> tuple[int, int, int]:
    values = (value,) if isinstance(value, int) else tuple(value if value is not None else ())
    values = values or ((default,) if isinstance(default, int) else tuple(default))
    return (values * 3 if len(values) == 1 else values)[:3]


def pool3d(b: Builder, node: Node) -> Node | None:
    """A pool over three axes: one over the two last axes, then one over the first of them."""
    arguments = ops.arguments(node)
    x = arguments["self"]
    if not is_float32(x) or x.meta["val"].ndim not in (4, 5) or arguments.get("divisor_override"):
        return None
    kernel = _three(arguments["kernel_size"])
    stride, padding = _three(arguments.get("stride"), kernel), _three(arguments.get("padding", 0))
    *leading, depth, height, width = x.meta["val"].shape
    if varying(leading) > 1 or varying((depth, height, width)):
        return None
    average = node.target is aten.avg_pool3d.default
    ceil, dilation = bool(arguments.get("ceil_mode", False)), _three(arguments.get("dilation", 1))
    options: list[Any] = [ceil, bool(arguments.get("count_include_pad", True))] if average else [ceil]
    pool = aten.avg_pool2d.default if average else aten.max_pool2d.default

    def pooled(images: Node, axes: tuple[int, int], at: Sequence[bool]) -> Node:
        """Pools (n, c, rows, columns) over rows and columns, with the sizes of `axes`; an axis only if `at` says so."""
        sizes = [
            [v[a] if is_pooled else neutral for a, is_pooled in zip(axes, at, strict=True)]
            for v, neutral in ((kernel, 1), (stride, 1), (padding, 0), (dilation, 1))
        ]
        return b.call(pool, images, *(sizes[:3] if average else sizes), *options)

    count = -1 if varying(leading) else int(torch.Size(leading).numel())
    flat = pooled(b.call(aten.reshape.default, x, [-1, depth, height, width]), (1, 2), (True, True))
    height, width = flat.meta["val"].shape[-2:]
    deep = pooled(b.call(aten.reshape.default, flat, [count, 1, depth, height * width]), (0, 0), (True, False))
    return reshaped(b, deep, [*leading, deep.meta["val"].shape[2], height, width])


def _windows(size: int, parts: int) -> list[tuple[int, int]]:
    """Where the windows of an adaptive pool begin and end."""
    return [(i * size // parts, -(-(i + 1) * size // parts)) for i in range(parts)]


def adaptive_pool(b: Builder, node: Node) -> Node | tuple[Node, ...] | None:
    """An adaptive maximum or average over the last axes, axis by axis: of each window its largest value or mean."""
    x, sizes = node.args
    several = "max" in ops.overload_of(node)
    if not is_float32(x) or (several and used_parts(node) != {0}):
        return None
    assert isinstance(x, Node)
    output_sizes, rank = list(sizes), x.meta["val"].ndim  # type: ignore[arg-type]
    axes = range(rank - len(output_sizes), rank)
    if not all(isinstance(x.meta["val"].shape[axis], int) for axis in axes):
        return None
    for axis, parts in zip(axes, output_sizes, strict=True):
        size = x.meta["val"].shape[axis]
        if parts is None or parts == size:
            continue
        windows = [
            x if (start, end) == (0, size) else b.call(aten.slice.Tensor, x, axis, start, end)
            for start, end in _windows(size, parts)
        ]
        reduce = aten.amax.default if several else aten.mean.dim
        values = [b.call(reduce, window, [axis], True) for window in windows]
        x = values[0] if parts == 1 else b.call(aten.cat.default, values, axis)
    return (x,) if several else x


def circular_pad(b: Builder, node: Node) -> Node | None:
    """A pad with what stands at the other end, as a concatenation; torch's own form of it would fix the batch."""
    arguments = ops.arguments(node)
    x, sizes = arguments["self"], list(arguments["pad"])
    if arguments.get("mode") != "circular" or value_of(x) is None:
        return None
    for i in range(len(sizes) // 2):
        axis, before, behind = x.meta["val"].ndim - 1 - i, sizes[2 * i], sizes[2 * i + 1]
        size = x.meta["val"].shape[axis]
        if not all(isinstance(s, int) for s in (size, before, behind)) or min(before, behind) < 0:
            return None
        parts = [b.call(aten.slice.Tensor, x, axis, size - before, size)] if before else []
        parts += [x]
        parts += [b.call(aten.slice.Tensor, x, axis, 0, behind)] if behind else []
        x = b.call(aten.cat.default, parts, axis) if len(parts) > 1 else x
    return x


# tables --------------------------------------------------------------------------------------------------------------


def embedding_bag(b: Builder, node: Node) -> tuple[Node, ...] | None:
    """Rows of a table, summed, averaged or maximized by bags of one size (as indices of two axes make them)."""
    arguments = ops.arguments(node)
    table, indices, mode = arguments["weight"], arguments["indices"], arguments.get("mode", 0)
    size = _bag_size(b, arguments["offsets"], arguments.get("include_last_offset", False), value_of(indices))
    padding = arguments.get("padding_idx")
    if used_parts(node) != {0} or size is None or (padding is not None and padding >= 0) or not is_float32(table, 2):
        return None
    rows = looked_up(b, table, indices) or b.call(aten.embedding.default, table, indices)
    if (weights := arguments.get("per_sample_weights")) is not None:
        rows = b.call(aten.mul.Tensor, rows, b.call(aten.reshape.default, weights, [-1, 1]))
    bags = b.call(aten.reshape.default, rows, [-1, size, table.meta["val"].shape[1]])
    if mode == 2:
        return (b.call(aten.amax.default, bags, [1]),)
    total = b.call(aten.sum.dim_IntList, bags, [1])
    return (total if mode == 0 else b.call(aten.mul.Tensor, total, b.scalar(1 / size)),)


def _bag_size(b: Builder, offsets: Any, last: bool, indices: torch.Tensor | None) -> int | None:
    """How many indices each bag has, where that is one number known beforehand; else None."""
    if not isinstance(offsets, Node) or indices is None or last:
        return None
    if ops.op_name(offsets) == "arange":
        arguments = ops.arguments(offsets)
        step = arguments.get("step", 1)
        return step if isinstance(step, int) and step > 0 and arguments.get("start", 0) == 0 else None
    if not ops.is_constant(offsets) or not isinstance(indices.shape[0], int):
        return None
    starts = [*ops.constant_value(b.model, offsets).tolist(), indices.shape[0]]
    sizes = {after - before for before, after in itertools.pairwise(starts)}
    return sizes.pop() if len(sizes) == 1 and min(sizes) > 0 and starts[0] == 0 else None


def sorted_place(b: Builder, node: Node) -> Node | None:
    """searchsorted and bucketize: how many elements of the sorted row are smaller than each value, or not larger."""
    arguments = ops.arguments(node)
    row = arguments.get("sorted_sequence", arguments.get("boundaries"))
    x = arguments["self"]
    value = value_of(row)
    if value is None or value.ndim != 1 or value_of(x) is None or arguments.get("sorter") is not None:
        return None
    right = bool(arguments.get("right")) or arguments.get("side") == "right"
    column = b.call(aten.unsqueeze.default, x, -1)
    behind = b.call(aten.gt.Tensor if right else aten.ge.Tensor, row, column)
    dtype = torch.int32 if arguments.get("out_int32") else torch.int64
    before = b.call(aten._to_copy.default, b.call(aten.logical_not.default, behind), dtype=dtype)
    return b.call(aten.sum.dim_IntList, before, [-1], dtype=dtype)


_MOST_RANKED = 256  # of a row whose values are all compared with each other


def sort(b: Builder, node: Node) -> Node | tuple[Node, ...] | None:
    """A sort, its indices or values: values as the top k of all of them, indices by comparing all pairs.

    The portable kernel that gives the largest values leaves open which of equal ones comes first, and quantized values
    often are equal.
    """
    arguments = ops.arguments(node)
    x, name = arguments["self"], ops.overload_of(node).partition(".")[0]
    value = value_of(x)
    axis = 0 if name == "msort" else int(arguments.get("dim", -1))
    if value is None or not value.ndim or not isinstance(value.shape[axis], int):
        return None
    axis, descending = axis % value.ndim, bool(arguments.get("descending", False))
    if name == "msort" or (name == "sort" and used_parts(node) == {0}):
        best = b.call(aten.topk.default, x, value.shape[axis], axis, descending, True)
        values = b.call(operator.getitem, best, 0)
        return values if name == "msort" else (values,)
    if value.shape[axis] <= _MOST_RANKED and value.is_floating_point():
        places = _places(b, x, axis, descending)
        return places if name == "argsort" else (b.call(aten.gather.default, x, axis, places), places)
    if arguments.get("stable"):
        return None
    best = b.call(aten.topk.default, x, value.shape[axis], axis, descending, True)
    values, places = (b.call(operator.getitem, best, i) for i in (0, 1))
    return places if name == "argsort" else (values, places)


def _places(b: Builder, x: Node, axis: int, descending: bool) -> Node:
    """Where the values of a sorted row stood, of equal ones in their order; NaN counts as the largest, as in torch."""

    def both(first: Node, second: Node) -> Node:
        return b.call(aten.logical_and.default, first, second)

    def either(first: Node, second: Node) -> Node:
        return b.call(aten.logical_or.default, first, second)

    count, rank = x.meta["val"].shape[axis], x.meta["val"].ndim
    one, other = b.call(aten.unsqueeze.default, x, axis + 1), b.call(aten.unsqueeze.default, x, axis)
    nan, other_nan = b.call(aten.isnan.default, one), b.call(aten.isnan.default, other)
    before, behind = (nan, other_nan) if not descending else (other_nan, nan)
    ahead = b.call(aten.gt.Tensor if descending else aten.lt.Tensor, other, one)
    ahead = either(ahead, both(before, b.call(aten.logical_not.default, behind)))
    earlier = torch.ones(count, count).tril(-1).bool().reshape(count, count, *[1] * (rank - 1 - axis))
    equal = either(b.call(aten.eq.Tensor, other, one), both(nan, other_nan))
    ahead = either(ahead, both(equal, b.constant(earlier, f"earlier_{count}_{rank - axis}")))
    ahead = b.call(aten._to_copy.default, ahead, dtype=torch.int64)
    ranks = b.call(aten.sum.dim_IntList, ahead, [axis + 1], dtype=torch.int64)
    zeros = b.call(aten.mul.Scalar, ranks, 0)
    own = b.constant(torch.arange(count).reshape(count, *[1] * (rank - 1 - axis)), f"places_{count}_{rank - axis}")
    return b.call(aten.scatter.src, zeros, axis, ranks, b.call(aten.add.Tensor, zeros, own))


def mean_slope(b: Builder, node: Node) -> Node | None:
    """A randomized leaky ReLU outside of training: one with the mean slope."""
    arguments = ops.arguments(node)
    if arguments.get("training") or not is_float32(arguments["self"]):
        return None
    slope = (arguments.get("lower", 1 / 8) + arguments.get("upper", 1 / 3)) / 2
    return b.call(aten.leaky_relu.default, arguments["self"], slope)


# graphs of conditions and maps ---------------------------------------------------------------------------------------


def _branch_linear(b: Builder, node: Node) -> Node:
    x, weight, *bias = node.args
    product = b.call(aten.matmul.default, x, b.call(aten.permute.default, weight, [1, 0]))
    return b.call(aten.add.Tensor, product, bias[0]) if bias and bias[0] is not None else product


def _branch_prelu(b: Builder, node: Node) -> Node:
    x, weight = node.args
    rank = x.meta["val"].ndim  # type: ignore[union-attr]
    slope = b.call(aten.reshape.default, weight, [1, -1, *[1] * (rank - 2)] if rank > 1 else [-1])
    return b.call(aten.where.self, b.call(aten.gt.Scalar, x, 0), x, b.call(aten.mul.Tensor, x, slope))


def _branch_hardswish(b: Builder, node: Node) -> Node:
    x = node.args[0]
    clipped = b.call(aten.hardtanh.default, b.call(aten.add.Scalar, x, 3), 0.0, 6.0)
    return b.call(aten.mul.Scalar, b.call(aten.mul.Tensor, x, clipped), 1 / 6)


def _branch_max_pool(b: Builder, node: Node) -> Node:
    both = b.call(aten.max_pool2d_with_indices.default, *node.args)
    return b.call(operator.getitem, both, 0)


_BRANCH_RULES: dict[Any, Rule] = {
    aten.linear.default: _branch_linear,
    aten.prelu.default: _branch_prelu,
    aten.hardswish.default: _branch_hardswish,
    aten.max_pool2d.default: _branch_max_pool,
}


def rewrite_branches(model: GraphModule) -> None:
    """Write the ops that ExecuTorch keeps for its delegate, which sees no graph inside another, as portable ones."""
    for node in model.graph.nodes:
        if (inner := ops.body_of(node)) is not None:
            rewrite(inner, _BRANCH_RULES)
            rewrite_branches(inner)


def other_branches(model: GraphModule) -> GraphModule | None:
    """The graph with its conditions the other way round, so that what was not taken is; None if it has none."""
    other = passes.copy_graph(model)
    conditions = [n for n in other.graph.nodes if n.target is torch.ops.higher_order.cond]
    conditions = [n for n in conditions if value_of(n.args[0]) is not None]
    for node in conditions:
        b = Builder(other, node)
        node.update_arg(0, b.call(aten.logical_not.default, node.args[0]))
    other.recompile()
    return other if conditions else None


def float_transposed_conv(b: Builder, node: Node) -> Node | None:
    """A float transposed convolution of rows as one of images of one row: the delegate takes the first in int8 only."""
    arguments = ops.arguments(node)
    x, weight = arguments["input"], arguments["weight"]
    if not is_float32(x, 3) or ops.is_dequantize(weight):
        return None
    names, neutral = ("stride", "padding", "output_padding", "dilation"), (1, 0, 0, 1)
    sizes = [arguments.get(name) for name in names]
    last = [n if s is None else s if isinstance(s, int) else s[0] for s, n in zip(sizes, neutral, strict=True)]
    stride, padding, output_padding, dilation = ([n, v] for n, v in zip(neutral, last, strict=True))
    image, kernel = b.call(aten.unsqueeze.default, x, 2), b.call(aten.unsqueeze.default, weight, 2)
    rest = (stride, padding, output_padding, arguments.get("groups", 1), dilation)
    return b.call(aten.squeeze.dim, b.call(aten.conv_transpose2d.input, image, kernel, arguments.get("bias"), *rest), 2)


def last_axis(b: Builder, node: Node) -> Node | None:
    """An axis added behind others of which several vary, as a reshape, which a portable kernel computes.

    The delegate takes the axis and then fails, for its own reshape infers one size only.
    """
    x, shape = node.args[0], node.meta["val"].shape
    if ops.arguments(node)["dim"] % len(shape) != len(shape) - 1 or varying(shape) < 2:
        return None
    return _with_last_axis(b, x)  # type: ignore[arg-type]


def stack_last(b: Builder, node: Node) -> Node | None:
    """Tensors stacked on a last axis behind others of which several vary, as a concatenation of reshaped ones."""
    arguments, shape = ops.arguments(node), node.meta["val"].shape
    if arguments.get("dim", 0) % len(shape) != len(shape) - 1 or varying(shape) < 2:
        return None
    return b.call(aten.cat.default, [_with_last_axis(b, t) for t in arguments["tensors"]], -1)


def _with_last_axis(b: Builder, x: Node) -> Node:
    sizes = [s if isinstance(s, int) else b.call(aten.sym_size.int, x, i) for i, s in enumerate(x.meta["val"].shape)]
    return b.call(aten.reshape.default, x, [*sizes, 1])


RULES: dict[Any, Rule] = {
    aten.conv_transpose1d.default: float_transposed_conv,
    aten.gru_cell.default: gru_cell,
    aten.lstm_cell.default: lstm_cell,
    aten.rnn_tanh_cell.default: rnn_cell,
    aten.rnn_relu_cell.default: rnn_cell,
    aten.prelu.default: prelu,
    aten.max.dim: largest,
    aten.avg_pool3d.default: pool3d,
    aten.max_pool3d.default: pool3d,
    aten.adaptive_avg_pool3d.default: adaptive_pool,
    aten.adaptive_max_pool1d.default: adaptive_pool,
    aten.adaptive_max_pool2d.default: adaptive_pool,
    aten.adaptive_max_pool3d.default: adaptive_pool,
    aten.pad.default: circular_pad,
    aten.embedding.default: lookup,
    aten.embedding_bag.default: embedding_bag,
    aten.embedding_bag.padding_idx: embedding_bag,
    aten.gru.input: gru,
    aten.rrelu.default: mean_slope,
    aten.argsort.default: sort,
    aten.argsort.stable: sort,
    aten.msort.default: sort,
    aten.sort.default: sort,
    aten.sort.stable: sort,
    aten.searchsorted.Tensor: sorted_place,
    aten.bucketize.Tensor: sorted_place,
    aten.unsqueeze.default: last_axis,
    aten.stack.default: stack_last,
    aten.cat.default: last_axis_parts,
    aten.scaled_dot_product_attention.default: attention,
}
