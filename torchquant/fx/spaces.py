"""Values whose features must be rotated together: ops that treat all features alike tie them to one another.

x (..., n size, ...)   a value whose axis holds n chunks of `size` features
x <- x R for each chunk     for all values of a space, if what makes them takes R in its rows, and what reads them
                            in its columns

A transformer's residual stream is such a space, and so are the values of an attention, chunk by chunk of a head.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree
from torchao.quantization.pt2e.observer import FixedQParamsObserver

from torchquant.fx import ops
from torchquant.fx.norms import CASTS, Norm, is_only_checked
from torchquant.fx.producers import LAYERS, channel_axis, has_constants, shape_behind
from torchquant.fx.reading import observer_of
from torchquant.fx.reshapes import chunk_axis

__all__ = ["Space", "Writer", "space_of"]

Link = tuple[Node, int]  # a value, and the axis of its features


@dataclass(frozen=True)
class Writer:
    """What makes values of a space: outputs `start` to `start + length` of a layer, a table's rows, or a constant.

    Args:
        node: a convolution, a linear, a lookup, or a node of a constant value.
        start, length: of the output features; of a constant, all along `axis`.
        axis: of the features in the node's value.
    """

    node: Node
    start: int
    length: int
    axis: int


@dataclass
class Space:
    """Values that are rotated together, or why they cannot be.

    Args:
        size: of a chunk of features.
        axes: the values, each with the axis of its features.
        writers: what makes them. readers: layers that read them. norms: normalizations over whole chunks.
        states: buffers that hold them between calls.
        reason: why there is no rotation of all these; empty if there is.
    """

    size: int
    axes: dict[Node, int] = field(default_factory=dict)
    writers: list[Writer] = field(default_factory=list)
    readers: list[Node] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    states: list[Node] = field(default_factory=list)
    reason: str = ""


def space_of(
    model: GraphModule, seed: Node, axis: int, size: int, norms: Mapping[Node, Norm], *, behind: Node | None = None
) -> Space:
    """The space that a value belongs to.

    Args:
        seed, axis: the value and the axis of its features. size: of a chunk.
        norms: node that reads a normalization's input, or makes its result -> the normalization.
        behind: a node (the seed itself), above which the space does not reach.
    """
    space = Space(size)
    todo: list[Link] = [(seed, axis % len(shape_behind(seed)))]
    while todo and not space.reason:
        node, at = todo.pop()
        if node in space.axes:
            if space.axes[node] != at:
                space.reason = f"{node.name} has its features on two axes"
            continue
        if not _holds_chunks(node, at, size):
            space.reason = f"{node.name} has no whole chunks of {size} features"
            continue
        space.axes[node] = at
        above = [] if node is behind else _above(model, space, node, at, norms)
        below = [] if isinstance(above, str) else _below(model, space, node, at, norms)
        for links in (above, below):
            if isinstance(links, str):
                space.reason = links
            else:
                todo += links
    return space


def _holds_chunks(node: Node, axis: int, size: int) -> bool:
    shape = shape_behind(node)
    width = shape[axis] if axis < len(shape) else 0
    return isinstance(width, int) and width > 0 and width % size == 0


# upwards ----------------------------------------------------------------------------------------------------------


def _above(model: GraphModule, space: Space, node: Node, axis: int, norms: Mapping[Node, Norm]) -> list[Link] | str:
    """The values that a value is made of, its writer noted instead where there is one; or why it takes no rotation."""
    if node.op == "get_attr" and ops.is_overwritten(node):
        space.states.append(node)
        return []
    if ops.is_constant(node):
        space.writers.append(Writer(node, 0, int(shape_behind(node)[axis]), axis))
        return []
    if node.op == "placeholder":
        return f"{node.name} is an input of the graph"
    if node in norms and norms[node].result is node:
        return f"{node.name} is a normalization's output, whose gain stands in front of what it is added to"
    writer = _writer(model, node, axis)
    if isinstance(writer, Writer):
        space.writers.append(writer)
        return []
    if window := _window(model, node, axis):
        if isinstance(window, Writer):
            space.writers.append(window)
            return []
        return window
    return writer or operands(model, node, axis, space.size)


def _writer(model: GraphModule, node: Node, axis: int) -> Writer | str | None:
    """The op that makes the features, why it cannot be one, or None where it is no such op."""
    name = ops.op_name(node)
    rank = len(shape_behind(node))
    if ops.overload_of(node) == "embedding.default":
        table = ops.argument(node, 0)
        is_table = table is not None and ops.is_constant(_unobserved(model, table))
        if axis != rank - 1 or not is_table:
            return f"the features of {node.name} are not those of a constant table"
        return Writer(node, 0, int(shape_behind(node)[axis]), axis)
    if name not in LAYERS:
        return None
    if not has_constants(model, node) or axis != channel_axis(node):
        return f"the features of {node.name} are not the outputs of a layer with constant weights"
    return Writer(node, 0, int(shape_behind(node)[axis]), axis)


def _window(model: GraphModule, node: Node, axis: int) -> Writer | str | None:
    """The layer of whose outputs a value is some neighbours (queries, keys and values of one linear), if it is."""
    piece = _piece(node, axis)
    if piece is None:
        return None
    whole, start, length = piece
    at, path = axis, dict[Node, int]()
    while True:
        writer = _writer(model, whole, at)
        if isinstance(writer, Writer):
            break
        links = writer or operands(model, whole, at, 1)
        if isinstance(links, str) or len(links) != 1 or _width(*links[0]) != _width(whole, at):
            return f"{node.name} is a part of {whole.name}, which is no layer's output as it is"
        path[whole] = at
        whole, at = links[0]
    for passed, place in {**path, whole: at}.items():
        for user in passed.users:
            is_other = user not in path and not is_only_checked(passed, user)
            if is_other and not _parts_off(user, place, start, length, node):
                return f"{user.name} reads the features of {node.name} too"
    return Writer(whole, start, length, at)


def _width(node: Node, axis: int) -> object:
    return shape_behind(node)[axis]


def _piece(node: Node, axis: int) -> tuple[Node, int, int] | None:
    """(the whole, start, length) of a value that is cut out of another along `axis`."""
    source, length = ops.argument(node, 0), shape_behind(node)[axis] if axis < len(shape_behind(node)) else None
    if source is None or not isinstance(length, int):
        return None
    if ops.overload_of(node) in ("slice.Tensor", "narrow.default"):
        arguments, rank = ops.arguments(node), len(shape_behind(node))
        start = arguments.get("start") or 0
        if arguments.get("dim", 0) % rank != axis or arguments.get("step", 1) != 1 or not isinstance(start, int):
            return None
        width = shape_behind(source)[axis]
        if length == width or not isinstance(width, int):
            return None
        return source, start % width, length
    pieces = source.meta.get("val") if node.target is operator.getitem else None
    whole = ops.argument(source, 0)
    if not isinstance(pieces, (list, tuple)) or ops.op_name(source) != "slice" or whole is None:
        return None
    if ops.arguments(source).get("dim", 0) % pieces[0].ndim != axis:
        return None
    index: Any = node.args[1]
    return whole, sum(int(p.shape[axis]) for p in pieces[:index]), length


def _parts_off(user: Node, axis: int, start: int, length: int, node: Node) -> bool:
    """Whether a user of the whole takes other features than those of `node`, or is how `node` takes its own."""
    takers = list(user.users) if isinstance(user.meta.get("val"), (list, tuple)) else [user]
    for taker in takers:
        piece = None if taker is node else _piece(taker, axis)
        if taker is not node and (piece is None or (piece[1] < start + length and start < piece[1] + piece[2])):
            return False
    return True


# downwards --------------------------------------------------------------------------------------------------------


def _below(model: GraphModule, space: Space, node: Node, axis: int, norms: Mapping[Node, Norm]) -> list[Link] | str:
    """The values made of a value; what reads it otherwise is noted."""
    links: list[Link] = []
    for user in node.users:
        if is_only_checked(node, user):
            continue
        norm = norms.get(user)
        if norm is not None and user in norm.inputs:
            if axis != len(shape_behind(node)) - 1 or norm.size != space.size:
                return f"{norm.result.name} normalizes other axes"
            if norm not in space.norms:
                space.norms.append(norm)
        elif ops.op_name(user) in LAYERS and user.args[0] is node:
            reason = _layer_refusal(model, user, axis)
            if reason:
                return reason
            space.readers.append(user)
        else:
            made = _made_of(model, user, node, axis, space.size)
            if isinstance(made, str):
                return made
            links += made
    return links


def _layer_refusal(model: GraphModule, layer: Node, axis: int) -> str:
    if not has_constants(model, layer):
        return f"the weight of {layer.name} is no constant"
    if ops.arguments(layer).get("groups", 1) != 1:
        return f"{layer.name} treats its input channels apart"
    return "" if axis == channel_axis(layer) else f"{layer.name} mixes another axis than that of the features"


def _made_of(model: GraphModule, user: Node, node: Node, axis: int, size: int) -> list[Link] | str:
    """The values that an op makes of a value without telling its features apart, or why it does not."""
    if user.op == "output":
        return f"{node.name} is an output of the graph"
    if isinstance(user.meta.get("val"), (list, tuple)):
        return _parts_made(user, node, axis)
    reason = f"{ops.op_name(user)} {user.name} tells the features of {node.name} apart"
    if ops.op_name(user) in ("linear", "embedding") or _piece(user, axis) is not None:
        return reason
    for at in range(max(1, len(shape_behind(user)))):
        links = operands(model, user, at, size)
        if not isinstance(links, str) and links.count((node, axis)) == _occurrences(user, node):
            return [(user, at)]
    return reason


def _occurrences(user: Node, node: Node) -> int:
    """How often an op reads a value: an attention may take one as keys and as values."""
    return sum(leaf is node for leaf in pytree.tree_leaves((user.args, user.kwargs)))


def _parts_made(split: Node, node: Node, axis: int) -> list[Link] | str:
    dim = ops.arguments(split).get("dim", 0)
    if ops.op_name(split) != "slice" or dim % len(shape_behind(node)) == axis:
        return f"{ops.op_name(split)} {split.name} tells the features of {node.name} apart"
    return [(part, axis) for part in split.users]


# ops that treat all features alike ---------------------------------------------------------------------------------


def operands(model: GraphModule, node: Node, axis: int, size: int) -> list[Link] | str:
    """The operands whose features an op's features on `axis` are, each with its axis; or why there are none."""
    refusal = f"{ops.op_name(node)} {node.name} tells features apart"
    source, observer = ops.argument(node, 0), observer_of(model, node)
    if observer is not None and source is not None:
        return refusal if isinstance(observer, FixedQParamsObserver) else [(source, axis)]
    if node.target is operator.getitem and source is not None:
        whole, dim = ops.argument(source, 0), ops.arguments(source).get("dim", 0)
        is_other = ops.op_name(source) == "slice" and whole is not None and dim % len(shape_behind(node)) != axis
        return [(whole, axis)] if is_other and whole is not None else refusal
    name = ops.op_name(node)
    rule = _RULES.get(name) or (_through_cast if name in CASTS else None)
    if rule is None:
        at = chunk_axis(node, axis, size) if name == "reshape" and source is not None else None
        return refusal if at is None or source is None else [(source, at)]
    links = rule(node, axis)
    return refusal if links is None else links


def _through_same(node: Node, axis: int) -> list[Link] | None:
    source = ops.argument(node, 0)
    return None if source is None else [(source, axis)]


def _through_sum(node: Node, axis: int) -> list[Link] | None:
    rank, width = len(shape_behind(node)), shape_behind(node)[axis]
    links = []
    for operand in node.args[:2]:
        at = axis - rank + len(shape_behind(operand)) if isinstance(operand, Node) else -1
        if not isinstance(operand, Node) or at < 0 or shape_behind(operand)[at] != width:
            return None  # a number, or one for all features
        links.append((operand, at))
    return links


def _through_cast(node: Node, axis: int) -> list[Link] | None:
    return _through_same(node, axis) if ops.is_float(node) else None


def _through_product(node: Node, axis: int) -> list[Link] | None:
    """A product with one number for all features of a row."""
    first, second = node.args[:2]
    rank = len(shape_behind(node))
    pairs = [(first, second), (second, first)] if ops.op_name(node) == "mul" else [(first, second)]
    for value, factor in pairs:
        at = axis - rank + len(shape_behind(factor)) if isinstance(factor, Node) else -1
        is_number = not isinstance(factor, Node) or at < 0 or shape_behind(factor)[at] == 1
        if isinstance(value, Node) and is_number and len(shape_behind(value)) == rank:
            return [(value, axis)]
    return None


def _through_cut(node: Node, axis: int) -> list[Link] | None:
    """A part along another axis."""
    source, arguments = ops.argument(node, 0), ops.arguments(node)
    rank = len(shape_behind(source))
    dim = arguments.get("dim", 0)
    if source is None or dim is None or ops.overload_of(node) in ("chunk.default", "split.Tensor"):
        return None
    at = axis + (ops.overload_of(node) == "select.int" and axis >= dim % rank)
    return None if dim % rank == at else [(source, at)]


def _through_cat(node: Node, axis: int) -> list[Link] | None:
    parts, dim = node.args[0], ops.arguments(node).get("dim", 0)
    if ops.overload_of(node) == "stack.default" or not isinstance(parts, (list, tuple)):
        return None
    is_other = dim % len(shape_behind(node)) != axis
    return [(p, axis) for p in parts if isinstance(p, Node)] if is_other else None


def _through_mean(node: Node, axis: int) -> list[Link] | None:
    source, arguments = ops.argument(node, 0), ops.arguments(node)
    rank, dims = len(shape_behind(source)), arguments.get("dim")
    if source is None or not isinstance(dims, (list, tuple)) or not dims:
        return None
    gone = {d % rank for d in dims}
    kept = list(range(rank)) if arguments.get("keepdim", False) else [a for a in range(rank) if a not in gone]
    at = kept[axis] if axis < len(kept) else None
    return None if at is None or at in gone else [(source, at)]


def _through_write(node: Node, axis: int) -> list[Link] | None:
    """Rows copied into others: into a cache."""
    rows = node.args[1] if ops.op_name(node) == "copy_" else node.args[3]
    dim = ops.arguments(node).get("dim")
    operand = ops.argument(node, 0)
    if operand is None or not isinstance(rows, Node) or len(shape_behind(rows)) != len(shape_behind(node)):
        return None
    is_feature = dim is not None and dim % len(shape_behind(node)) == axis
    return None if is_feature else [(operand, axis), (rows, axis)]


def _through_weighing(node: Node, axis: int) -> list[Link] | None:
    """Sums of rows of the second matrix, or of an attention's values."""
    value = ops.argument(node, 1 if ops.op_name(node) == "matmul" else 2)
    rank = len(shape_behind(node))
    if value is None or ops.is_constant(value) or axis != rank - 1 or len(shape_behind(value)) < 2:
        return None
    return [(value, len(shape_behind(value)) - 1)]


_RULES: dict[str, Callable[[Node, int], list[Link] | None]] = {
    "add": _through_sum,
    "sub": _through_sum,
    "mul": _through_product,
    "div": _through_product,
    "neg": _through_same,
    "slice": _through_cut,
    "index_select": _through_cut,
    "repeat_interleave": _through_cut,
    "cat": _through_cat,
    "mean": _through_mean,
    "index_copy": _through_write,
    "copy_": _through_write,
    "attention": _through_weighing,
    "matmul": _through_weighing,
}


def _unobserved(model: GraphModule, node: Node) -> Node:
    while observer_of(model, node) is not None:
        node = node.args[0]  # type: ignore[assignment]
    return node
