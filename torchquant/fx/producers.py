"""Which op produces a tensor's channels, so that its constants can take a factor per channel, and the nodes between."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import FixedQParamsObserver

from torchquant.fx import ops
from torchquant.fx.reading import observer_of

__all__ = [
    "LAYERS",
    "ROW_MAJOR",
    "Producer",
    "affine_positions",
    "channel_axis",
    "has_constants",
    "is_padded",
    "producer_of",
    "readers",
    "runs",
    "shape_behind",
]

LAYERS = ("conv1d", "conv2d", "conv3d", "linear")
# argument positions of (factor, offset) of the ops that end in an affine map of their channels
_AFFINE = {
    "layer_norm.default": (2, 3),
    "native_layer_norm.default": (2, 3),
    "rms_norm.default": (2, None),
    "batch_norm.default": (1, 2),
    "_native_batch_norm_legit_no_training.default": (1, 2),
    "group_norm.default": (2, 3),
}
ROW_MAJOR = (
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("contiguous", "clone", "alias", "detach", "dropout"),
)
Shape = tuple[int | torch.SymInt, ...]


@dataclass(frozen=True)
class Producer:
    """The op that makes a tensor's channels.

    Args:
        node: a conv, a linear, a normalization or a multiplication by a constant.
        path: the nodes passed on the way up, the tensor itself first, `node` not among them.
        repeat: how many neighbouring channels of the tensor come from one channel of the op.
        start, total: the tensor's channels are those from `start` on, of the op's `total`.
        shift: whether an offset for each channel may be moved too, not only a positive factor.
        axis: the channel axis of the op's output.
    """

    node: Node
    path: tuple[Node, ...]
    repeat: int
    start: int
    total: int
    shift: bool
    axis: int


@dataclass(frozen=True)
class _Step:
    """A node on the way up: `axes` of its output hold the channels, row-major, each for `repeat` of the tensor."""

    node: Node
    axes: tuple[int, ...]
    shift: bool = True
    start: int = 0
    total: int | None = None
    repeat: int = 1


def producer_of(model: GraphModule, tensor: Node, axis: int) -> Producer | str:
    """What makes the channels on `axis` of a tensor, or why a factor cannot be moved there.

    The way up leads through observers, ReLU and its leaky forms (a positive factor commutes with them), pooling,
    reshapes and transposes that keep the channels in order, and the value path of attention. Every node on it has one
    reader. ReLU6 and other saturating functions end it: they do not commute with a factor.
    """
    step, path = _Step(tensor, (axis % len(shape_behind(tensor)),)), []
    while not _is_producer(model, step.node):
        above = _above(model, step)
        if above is None:
            return f"a factor does not pass {_describe(step.node)}"
        others = [n for n in readers(above.node) if n is not step.node]
        if others and not _only_slices(above.node):
            return f"{above.node.name} is read by {others[0].name} too"
        path.append(step.node)
        step = replace(above, shift=above.shift and step.shift)
    return _ending(step, tuple(path))


def readers(node: Node) -> list[Node]:
    """The users that read the node's values: not those that ask for its sizes only, nor an export's input checks."""
    return [n for n in node.users if ops.op_name(n) != "sym_size" and (n.users or n.op != "call_module")]


def channel_axis(node: Node) -> int:
    """The axis of a layer's or a normalization's output that holds its channels."""
    name = ops.op_name(node)
    rank = len(shape_behind(ops.argument(node, 0)))  # a native_layer_norm has several outputs
    if name.startswith("conv"):
        return rank - int(name[-2]) - 1
    return 1 if name in ("batch_norm", "group_norm") else rank - 1


def affine_positions(node: Node) -> tuple[int, int | None]:
    """Argument positions of a producer's factor (a layer's weight) and offset (its bias)."""
    if ops.op_name(node) in LAYERS:
        return 1, 2
    if ops.op_name(node) == "mul":
        return int(ops.is_constant(node.args[1])), None  # type: ignore[arg-type]
    return _AFFINE[_overload(node)]


def is_padded(node: Node) -> bool:
    """Whether a convolution reads zeros around its input."""
    padding = ops.arguments(node).get("padding", 0)
    if isinstance(padding, str):
        return padding == "same" and any(k != 1 for k in shape_behind(ops.argument(node, 1))[2:])
    return any(padding) if isinstance(padding, (list, tuple)) else bool(padding)


def shape_behind(node: Node | None) -> Shape:
    """The shape of a node's value, which an observer passes on."""
    while node is not None and node.op == "call_module":
        node = ops.argument(node, 0)
    return (ops.shape_of(node) if node is not None else None) or ()


def _is_producer(model: GraphModule, node: Node) -> bool:
    """Whether the node's channels come out of an affine map with constants."""
    name = ops.op_name(node)
    if name in LAYERS:
        return has_constants(model, node)
    if name == "mul":
        return sum(isinstance(a, Node) and ops.is_constant(a) for a in node.args[:2]) == 1
    if _overload(node) not in _AFFINE or (name == "layer_norm" and len(node.args[1]) != 1):  # type: ignore[arg-type]
        return False
    training = ops.arguments(node).get("training", False)
    return not training and all(a is None or ops.is_constant(a) for p in affine_positions(node) if (a := _at(node, p)))


def has_constants(model: GraphModule, layer: Node) -> bool:
    """Whether a layer's weight and bias are constants, observed or not."""
    sources = [ops.argument(layer, p) for p in (1, 2)]
    inner = [s.args[0] if s is not None and observer_of(model, s) is not None else s for s in sources]
    return inner[0] is not None and all(s is None or (isinstance(s, Node) and ops.is_constant(s)) for s in inner)


def _at(node: Node, position: int | None) -> Node | None:
    return None if position is None else ops.argument(node, position)


def _ending(step: _Step, path: tuple[Node, ...]) -> Producer | str:
    node, name = step.node, ops.op_name(step.node)
    shape = shape_behind(ops.argument(node, 0)) if name == "layer_norm" else shape_behind(node)
    sizes = [shape[a] for a in step.axes]
    if not all(isinstance(s, int) for s in sizes):
        return f"the channels of {node.name} lie on an axis of changing size"
    axis = step.axes[0] if name == "mul" else channel_axis(node)
    if step.axes[0] != axis or list(step.axes) != sorted(step.axes) or (name == "mul" and not _fits(step)):
        return f"the channels are not those of {node.name}"
    shift = step.shift and affine_positions(node)[1] is not None
    repeat = step.repeat * math.prod(map(int, sizes[1:]))
    return Producer(node, path, repeat, step.start, step.total or int(sizes[0]), shift, axis)


def _fits(step: _Step) -> bool:
    """Whether the constant of a multiplication may hold one factor for each channel without growing the output."""
    constant = ops.argument(step.node, affine_positions(step.node)[0])
    return len(step.axes) == 1 and len(shape_behind(constant)) <= len(shape_behind(step.node))


def _describe(node: Node) -> str:
    return f"{ops.op_name(node)} {node.name}" if node.op == "call_function" else f"{node.op} {node.name}"


def _only_slices(node: Node) -> bool:
    """Whether the readers of a split each take another piece."""
    taken = [n.args[1] for n in node.users if n.target is operator.getitem]
    return ops.op_name(node) in ("slice", "layer_norm") and len(taken) == len(set(taken)) == len(node.users)


def _overload(node: Node) -> str:
    schema = ops.schema_of(node)
    return f"{schema.name.split('::')[-1]}.{schema.overload_name or 'default'}" if schema is not None else ""


# one rule for each kind of node: which axes of its input hold the channels ----------------------------------------


def _above(model: GraphModule, step: _Step) -> _Step | None:
    node = step.node
    observer, source = observer_of(model, node), ops.argument(node, 0)
    if source is None or isinstance(observer, FixedQParamsObserver):
        return None
    if observer is not None:
        return replace(step, node=source)
    if node.target is operator.getitem:
        return _through_split(step, source)
    rule = _RULES.get(ops.op_name(node))
    return rule(step, source) if rule is not None else None


def _through_relu(step: _Step, source: Node) -> _Step | None:
    return replace(step, node=source, shift=False)


def _through_prelu(step: _Step, source: Node) -> _Step | None:
    slope = ops.argument(step.node, 1)
    return _through_relu(step, source) if slope is not None and shape_behind(slope) in ((), (1,)) else None


def _through_pool(step: _Step, source: Node) -> _Step | None:
    rank = len(shape_behind(source))
    name = _overload(step.node)
    pooled = int(name[name.index("d.") - 1])
    kept = tuple(a for a in step.axes if a < rank - pooled)
    sizes = [_size(step.node, a) for a in step.axes[len(kept) :]]
    if step.axes[: len(kept)] != kept or not all(sizes):
        return None
    return replace(step, node=source, axes=kept, repeat=step.repeat * math.prod(sizes), shift=False)


def _size(node: Node, axis: int) -> int:
    """The size of an axis, or zero if it changes."""
    size = shape_behind(node)[axis]
    return size if isinstance(size, int) else 0


def _through_mean(step: _Step, source: Node) -> _Step | None:
    arguments, rank = ops.arguments(step.node), len(shape_behind(source))
    dims = arguments.get("dim")
    if not isinstance(dims, (list, tuple)) or not dims:
        return None
    gone = {d % rank for d in dims}
    kept = list(range(rank)) if arguments.get("keepdim", False) else [a for a in range(rank) if a not in gone]
    axes = tuple(kept[a] for a in step.axes)
    return None if gone & set(axes) else replace(step, node=source, axes=axes, shift=False)


def _through_reshape(step: _Step, source: Node) -> _Step | None:
    name, arguments = _overload(step.node).split(".")[0], ops.arguments(step.node)
    rank = len(shape_behind(source))
    if name == "permute":
        order = [d % rank for d in arguments["dims"]]
    elif name in ("transpose", "t"):
        order = list(range(rank))
        first, second = (arguments["dim0"] % rank, arguments["dim1"] % rank) if name == "transpose" else (0, rank - 1)
        order[first], order[second] = second, first
    elif name in ROW_MAJOR:
        axes = _axes_before(shape_behind(source), shape_behind(step.node), step.axes)
        return replace(step, node=source, axes=axes) if axes is not None else None
    else:
        return None
    return replace(step, node=source, axes=tuple(order[a] for a in step.axes))


def _axes_before(before: Shape, after: Shape, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes that the channels ran over before a row-major reshape, or None if they were mixed with others."""
    sources: dict[int, list[int]] = {}
    for old, new in runs(before, after):
        mine = [a for a in new if a in axes]
        whole = [a for a in new if after[a] != 1 or a in axes]
        if mine and len(old) + len(new) > 2 and mine != whole:
            return None
        sources.update(dict.fromkeys(mine, [a for a in old if before[a] != 1] or list(old)[:1]))
    if any(a not in sources for a in axes):
        return None
    return tuple(dict.fromkeys(a for axis in axes for a in sources[axis]))


def runs(before: Shape, after: Shape) -> Iterator[tuple[range, range]]:
    """Cut both shapes, from the right, into the smallest runs of axes of equal size."""
    i, j = len(before), len(after)
    while i and j:
        low, high = i - 1, j - 1
        left, right = before[low], after[high]
        while str(left) != str(right):  # a symbolic size equals itself
            if not isinstance(left, int) or not isinstance(right, int):
                return
            low, high = (low - 1, high) if left < right else (low, high - 1)
            if min(low, high) < 0:
                return
            left, right = (left * before[low], right) if left < right else (left, right * after[high])
        yield range(low, i), range(high, j)
        i, j = low, high


def _through_attention(step: _Step, source: Node) -> _Step | None:
    """The value path: rows of the output are sums of the values' rows, head by head."""
    value = ops.argument(step.node, 1 if ops.op_name(step.node) == "matmul" else 2)
    mine, theirs = shape_behind(step.node), shape_behind(value)
    if value is None or len(mine) != len(theirs) or len(mine) < 3:
        return None
    exact = all(a != len(mine) - 2 and mine[a] == theirs[a] for a in step.axes)
    return replace(step, node=value, shift=False) if exact and not ops.is_constant(value) else None


def _through_split(step: _Step, source: Node) -> _Step | None:
    index = step.node.args[1]
    if ops.op_name(source) == "layer_norm":
        return replace(step, node=source) if index == 0 else None
    pieces = source.meta.get("val")
    whole = ops.argument(source, 0)
    if ops.op_name(source) != "slice" or not isinstance(pieces, (list, tuple)) or whole is None or step.total:
        return None
    dim = ops.arguments(source).get("dim", 0) % pieces[0].ndim
    if step.axes != (dim,) or not isinstance(index, int):
        return None
    sizes = [p.shape[dim] for p in pieces]
    return replace(step, node=source, start=sum(sizes[:index]), total=sum(sizes))


def _through_slices(step: _Step, source: Node) -> _Step | None:
    return replace(step, node=source) if step.total else None


_RULES: dict[str, Callable[[_Step, Node], _Step | None]] = {
    "relu": _through_relu,
    "leaky_relu": _through_relu,
    "prelu": _through_prelu,
    "max_pool2d": _through_pool,
    "avg_pool": _through_pool,
    "adaptive_avg_pool2d": _through_pool,
    "mean": _through_mean,
    "reshape": _through_reshape,
    "attention": _through_attention,
    "matmul": _through_attention,
    "slice": _through_slices,
}
