"""Normalizations over the last axis in a graph: as one op, or as the ops that an RMSNorm written in Python leaves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from torchquant.fx import ops
from torchquant.fx.reading import observer_of

__all__ = ["CASTS", "Norm", "is_only_checked", "norms_of"]

CASTS = ("to", "_to_copy", "alias", "detach", "clone", "contiguous", "type_as")  # each value stays what and where it is
_LIKE = ("new_ones", "new_zeros", "new_full", "new_empty", "ones_like", "zeros_like", "full_like", "empty_like")
_ASKING = ("sym_size", "_assert_tensor_metadata", *_LIKE)


@dataclass(frozen=True)
class Norm:
    """y = n(x) * gain + offset, where n divides each row by its root mean square, less its mean if it is `centred`.

    Args:
        inputs: the nodes that read x.
        result: the node that makes y.
        size: of the axis.
        centred: LayerNorm, not RMSNorm.
        gain, offset: where the constants stand among the arguments of `result`, or None where there are none.
    """

    inputs: tuple[Node, ...]
    result: Node
    size: int
    centred: bool
    gain: int | None
    offset: int | None


def norms_of(model: GraphModule) -> Iterator[Norm]:
    """In graph order; those over several axes, or over one of a size that changes, are left out."""
    for node in model.graph.nodes:
        norm = _as_one_op(node) if ops.op_name(node) == "layer_norm" else _as_ops(model, node)
        if norm is not None:
            yield norm


def is_only_checked(node: Node, user: Node) -> bool:
    """Whether a user asks a value for its sizes or dtype only."""
    name = ops.op_name(user)
    asks = name in _ASKING or (name == "type_as" and user.args[0] is not node)
    return asks or (user.op == "call_module" and not user.users)


def _as_one_op(node: Node) -> Norm | None:
    shape, size = node.args[1], _last_size(ops.argument(node, 0))
    is_whole = isinstance(shape, (list, tuple)) and list(shape) == [size]
    if size is None or not is_whole or ops.overload_of(node) == "native_layer_norm.default":
        return None
    centred = ops.overload_of(node) == "layer_norm.default"
    gain, offset = ops.argument(node, 2), ops.argument(node, 3) if centred else None
    if not all(constant is None or ops.is_constant(constant) for constant in (gain, offset)):
        return None
    return Norm((node,), node, size, centred, None if gain is None else 2, None if offset is None else 3)


def _as_ops(model: GraphModule, core: Node) -> Norm | None:
    """x * rsqrt(mean(x^2) + eps) or x / sqrt(...), and the gain behind it."""
    if ops.op_name(core) not in ("mul", "div") or len(core.args) < 2:
        return None
    for x, root in ((core.args[0], core.args[1]), (core.args[1], core.args[0])):
        square = _squared(model, root, "rsqrt" if ops.op_name(core) == "mul" else "sqrt")
        if square is None or not isinstance(x, Node) or _origin(model, x) is not _origin(model, square.args[0]):
            continue
        size = _last_size(_origin(model, x))
        if size is None:
            return None
        gain = _gain(model, core, size)
        result, position = (core, None) if gain is None else gain
        return Norm((square, core), result, size, False, position, None)
    return None


def _squared(model: GraphModule, root: object, name: str) -> Node | None:
    """The op that squares x, behind the root of the mean square."""
    node = _behind(model, root)
    if node is None or ops.op_name(node) != name:
        return None
    shifted = _behind(model, node.args[0])
    if shifted is None or ops.op_name(shifted) != "add":
        return None
    mean = _behind(model, shifted.args[0])
    if mean is None or ops.op_name(mean) != "mean" or not _is_over_rows(mean):
        return None
    square = _behind(model, mean.args[0])
    if square is None or not square.args:
        return None
    same = ops.op_name(square) == "mul" and square.args[0] is square.args[1]
    power = ops.op_name(square) == "pow" and square.args[1] == 2
    return square if same or power or ops.op_name(square) == "square" else None


def _is_over_rows(mean: Node) -> bool:
    arguments, source = ops.arguments(mean), ops.argument(mean, 0)
    rank = len(ops.shape_of(mean) or ())
    dims = arguments.get("dim")
    return (
        source is not None
        and bool(arguments.get("keepdim"))
        and isinstance(dims, (list, tuple))
        and [d % rank for d in dims] == [rank - 1]
    )


def _gain(model: GraphModule, core: Node, size: int) -> tuple[Node, int] | None:
    """The multiplication by a constant for each feature that alone reads a normalized value, and its position."""
    node = core
    while True:
        users = [u for u in node.users if not is_only_checked(node, u)]
        if len(users) != 1:
            return None
        user = users[0]
        if ops.op_name(user) not in CASTS and observer_of(model, user) is None:
            break
        node = user
    if ops.op_name(user) != "mul":
        return None
    for position in (0, 1):
        constant = ops.argument(user, position)
        if constant is not None and constant is not node and ops.is_constant(constant):
            stored = _origin(model, constant)
            return (user, position) if stored is not None and ops.shape_of(stored) == (size,) else None
    return None


def _behind(model: GraphModule, value: object) -> Node | None:
    """What an observer passes on."""
    while isinstance(value, Node) and observer_of(model, value) is not None:
        value = value.args[0]
    return value if isinstance(value, Node) else None


def _origin(model: GraphModule, value: object) -> Node | None:
    """The same behind casts, too."""
    node = _behind(model, value)
    while node is not None and ops.op_name(node) in CASTS:
        node = _behind(model, node.args[0])
    return node


def _last_size(node: Node | None) -> int | None:
    while node is not None and node.op == "call_module":
        node = ops.argument(node, 0)
    shape = ops.shape_of(node) if node is not None else None
    return shape[-1] if shape and isinstance(shape[-1], int) else None
