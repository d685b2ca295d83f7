"""Composite ops rewritten, function unchanged, into the arithmetic that delegates take.

A delegate that knows linear, bmm, softmax and elementwise ops, yet neither attention, LayerNorm nor a mean over
the last axis, otherwise cuts a transformer into dozens of pieces. All rewrites need static shapes; what has
dynamic ones is left as it is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from torchquant.fx import ops

aten = torch.ops.aten
_NEGATIVE = -1e9  # stands for minus infinity in an additive mask: softmax gives exactly 0, arithmetic stays finite


class _Builder:
    """Creates nodes in front of `at`, with their fake values, and buffers by value."""

    def __init__(self, model: GraphModule, at: Node) -> None:
        self.model, self.at = model, at

    def call(self, target: Any, *args: Any) -> Node:
        with self.model.graph.inserting_before(self.at):
            node = self.model.graph.call_function(target, args)
        node.meta = {k: v for k, v in self.at.meta.items() if k in ("nn_module_stack", "stack_trace", "custom")}
        fakes = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
        mode = next((t.fake_mode for t in pytree.tree_leaves(fakes) if hasattr(t, "fake_mode")), None)
        with mode or torch.no_grad():
            node.meta["val"] = target(*fakes)
        return node

    def constant(self, value: torch.Tensor, name: str) -> Node:
        name = f"_tq_{name}"
        while hasattr(self.model, name) and not torch.equal(getattr(self.model, name), value):
            name += "_"
        if not hasattr(self.model, name):
            self.model.register_buffer(name, value)
        with self.model.graph.inserting_before(self.at):
            node = self.model.graph.get_attr(name)
        mode = getattr(self.at.meta["val"], "fake_mode", None)
        node.meta["val"] = mode.from_tensor(value, static_shapes=True) if mode is not None else value
        return node

    def scalar(self, value: float) -> Node:
        return self.constant(torch.tensor([value]), f"scalar_{value:g}".replace(".", "_").replace("-", "m"))

    def mean_last(self, x: Node) -> Node:
        """Mean over the last axis, kept: a linear with one output and weights 1/N."""
        n = x.meta["val"].shape[-1]
        return self.call(aten.linear.default, x, self.constant(torch.full((1, n), 1.0 / n), f"mean_{n}"))

    def sum_last(self, x: Node) -> Node:
        n = x.meta["val"].shape[-1]
        return self.call(aten.linear.default, x, self.constant(torch.ones(1, n), f"ones_{n}"))

    def shaped(self, x: Node, like: Node) -> Node:
        """`x` reshaped to the shape of `like`, if it differs."""
        shape = list(like.meta["val"].shape)
        return x if list(x.meta["val"].shape) == shape else self.call(aten.reshape.default, x, shape)


def _static(*nodes: Any) -> bool:
    """Whether all are nodes of float32 tensors with static shapes."""
    return all(
        isinstance(n, Node)
        and isinstance(v := n.meta.get("val"), torch.Tensor)
        and v.dtype == torch.float32
        and all(isinstance(s, int) for s in v.shape)
        for n in nodes
    )


def _is_last(dims: Any, x: Node) -> bool:
    rank = x.meta["val"].ndim
    dims = [dims] if isinstance(dims, int) else list(dims or [])
    return len(dims) == 1 and dims[0] % rank == rank - 1


def layer_norm(b: _Builder, node: Node) -> Node | None:
    """LayerNorm over the last axis: (x - mean) * rsqrt(mean((x - mean)^2) + eps) * weight + bias."""
    x, shape, weight, bias, eps = (*node.args, *(None, None, 1e-5)[len(node.args) - 2 :])[:5]
    if not _static(x) or len(shape) != 1:  # type: ignore[arg-type]
        return None
    assert isinstance(x, Node)
    centred = b.call(aten.sub.Tensor, x, b.mean_last(x))
    variance = b.mean_last(b.call(aten.mul.Tensor, centred, centred))
    shifted = b.call(aten.add.Tensor, variance, b.scalar(float(eps)))  # type: ignore[arg-type]
    y = b.call(aten.mul.Tensor, centred, b.call(aten.rsqrt.default, shifted))
    y = y if weight is None else b.call(aten.mul.Tensor, y, weight)
    return y if bias is None else b.call(aten.add.Tensor, y, bias)


def rms_norm(b: _Builder, node: Node) -> Node | None:
    """RMSNorm over the last axis: x * rsqrt(mean(x^2) + eps) * weight."""
    x, shape, weight, eps = (*node.args, *(None, None)[len(node.args) - 2 :])[:4]
    if not _static(x) or len(shape) != 1:  # type: ignore[arg-type]
        return None
    assert isinstance(x, Node)
    square = b.mean_last(b.call(aten.mul.Tensor, x, x))
    shifted = b.call(aten.add.Tensor, square, b.scalar(torch.finfo(torch.float32).eps if eps is None else float(eps)))  # type: ignore[arg-type]
    y = b.call(aten.mul.Tensor, x, b.call(aten.rsqrt.default, shifted))
    return y if weight is None else b.call(aten.mul.Tensor, y, weight)


def attention(b: _Builder, node: Node) -> Node | None:
    """Scaled dot-product attention as bmm, mask, softmax, bmm on (batch * heads, length, features).

    A row whose keys are all masked gives their mean here, where PyTorch's safe softmax gives zero.
    """
    given = ops.arguments(node)
    q, k, v, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    if not _static(q, k, v) or given.get("dropout_p") or q.meta["val"].ndim != 4 or given.get("enable_gqa"):
        return None
    assert isinstance(q, Node)
    assert isinstance(k, Node)
    assert isinstance(v, Node)
    batch, heads, length, features = q.meta["val"].shape
    source, values = k.meta["val"].shape[2], v.meta["val"].shape[3]
    if k.meta["val"].shape[:2] != (batch, heads) or v.meta["val"].shape[:2] != (batch, heads):
        return None
    scale = 1 / math.sqrt(features) if given.get("scale") is None else given["scale"]
    q = b.call(aten.mul.Tensor, q, b.scalar(float(scale)))
    q = b.call(aten.reshape.default, q, [batch * heads, length, features])
    k = b.call(aten.reshape.default, b.call(aten.permute.default, k, [0, 1, 3, 2]), [batch * heads, features, source])
    scores = b.call(aten.reshape.default, b.call(aten.bmm.default, q, k), [batch, heads, length, source])
    if isinstance(mask, Node):
        scores = b.call(aten.add.Tensor, scores, _additive(b, mask))
    if given.get("is_causal"):
        later = torch.full((length, source), _NEGATIVE).triu(1)[None, None]
        scores = b.call(aten.add.Tensor, scores, b.constant(later, f"causal_{length}_{source}"))
    weights = b.call(aten.reshape.default, b.call(aten.softmax.int, scores, -1), [batch * heads, length, source])
    v = b.call(aten.reshape.default, v, [batch * heads, source, values])
    return b.call(aten.reshape.default, b.call(aten.bmm.default, weights, v), [batch, heads, length, values])


def _additive(b: _Builder, mask: Node) -> Node:
    if mask.meta["val"].dtype != torch.bool:
        return b.call(aten.clamp.default, mask, _NEGATIVE)  # minus infinity would make a masked row NaN
    return b.call(aten.where.self, mask, b.scalar(0.0), b.scalar(_NEGATIVE))


def mean(b: _Builder, node: Node) -> Node | None:
    """A mean over the last axis, as in RMSNorm."""
    x, dims = node.args[0], node.args[1]
    if not _static(x) or node.kwargs.get("dtype") or x.meta["val"].ndim > 3 or not _is_last(dims, x):  # type: ignore
        return None
    return b.shaped(b.mean_last(x), node)  # type: ignore[arg-type]


def total(b: _Builder, node: Node) -> Node | None:
    """A sum over one axis: that axis moved last, then a linear with weights of one."""
    x, dims = node.args[0], node.args[1]
    if not _static(x) or node.kwargs.get("dtype") or dims is None or len(dims) != 1:  # type: ignore[arg-type]
        return None
    assert isinstance(x, Node)
    rank = x.meta["val"].ndim
    axis = dims[0] % rank  # type: ignore
    order = [i for i in range(rank) if i != axis] + [axis]
    moved = x if axis == rank - 1 else b.call(aten.permute.default, x, order)
    return b.shaped(b.sum_last(moved), node)


def vector_norm(b: _Builder, node: Node) -> Node | None:
    """The Euclidean norm over the last axis."""
    x, order, dims = (*node.args, *(2, None)[len(node.args) - 1 :])[:3]
    if not _static(x) or float(order) != 2 or not _is_last(dims, x):  # type: ignore[arg-type]
        return None
    assert isinstance(x, Node)
    return b.shaped(b.call(aten.sqrt.default, b.sum_last(b.call(aten.mul.Tensor, x, x))), node)


def scalar_operand(b: _Builder, node: Node) -> Node | None:
    """`x + 2` and its like with the number as a tensor."""
    x, number = node.args[0], node.args[1]
    if not _static(x) or isinstance(number, Node) or node.kwargs or x.meta["val"].ndim == 0:  # type: ignore[union-attr]
        return None
    return b.call(_TENSOR_FORM.get(node.target, node.target), x, b.scalar(float(number)))  # type: ignore


def reversed_subtraction(b: _Builder, node: Node) -> Node | None:
    """`2 - x` with the number as a tensor."""
    x, number = node.args[0], node.args[1]
    if not _static(x) or isinstance(number, Node) or len(node.args) > 2 or x.meta["val"].ndim == 0:  # type: ignore
        return None
    return b.call(aten.sub.Tensor, b.scalar(float(number)), x)  # type: ignore[arg-type]


def unsqueeze(b: _Builder, node: Node) -> Node | None:
    """A new axis as a reshape."""
    return b.call(aten.reshape.default, node.args[0], list(node.meta["val"].shape)) if _static(node) else None


def transpose(b: _Builder, node: Node) -> Node | None:
    """Two axes swapped, as a permute."""
    x, i, j = node.args
    if not _static(x):
        return None
    order = list(range(node.meta["val"].ndim))
    order[i], order[j] = order[j], order[i]  # type: ignore[index]
    return b.call(aten.permute.default, x, order)


def expand(b: _Builder, node: Node) -> Node | None:
    """An expansion that its users' broadcasting does anyway."""
    x = node.args[0]
    broadcasting = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor)
    needless = _static(x) and all(
        user.target in broadcasting
        and user.args[0] is not node
        and isinstance(user.args[0], Node)
        and user.args[0].meta["val"].shape == user.meta["val"].shape
        for user in node.users
    )
    return x if needless else None  # type: ignore[return-value]


_TENSOR_FORM: dict[Any, Any] = {
    aten.mul.Scalar: aten.mul.Tensor,
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.div.Scalar: aten.div.Tensor,
}
RULES: dict[Any, Callable[[_Builder, Node], Node | None]] = {
    aten.layer_norm.default: layer_norm,
    aten.rms_norm.default: rms_norm,
    aten.scaled_dot_product_attention.default: attention,
    aten.mean.dim: mean,
    aten.sum.dim_IntList: total,
    aten.linalg_vector_norm.default: vector_norm,
    aten.rsub.Scalar: reversed_subtraction,
    aten.unsqueeze.default: unsqueeze,
    aten.transpose.int: transpose,
    aten.expand.default: expand,
    aten.expand_as.default: expand,
    **dict.fromkeys((*_TENSOR_FORM, *_TENSOR_FORM.values()), scalar_operand),
}


def decompose(model: GraphModule) -> int:
    """Apply every rule where it fits, fold what depends on constants alone; returns how many nodes changed."""
    _fill_values(model)
    fold_constants(model)
    done = 0
    for node in list(model.graph.nodes):
        rule = RULES.get(node.target) if node.op == "call_function" else None
        replacement = rule(_Builder(model, node), node) if rule is not None else None
        if replacement is not None:
            node.replace_all_uses_with(replacement)
            model.graph.erase_node(node)
            done += 1
    done += _split_chunks(model)
    model.graph.eliminate_dead_code()
    model.graph.lint()
    model.recompile()
    return done


def _fill_values(model: GraphModule) -> None:
    """Give dequantize nodes, which `convert_pt2e` makes without a fake value, that of what they stand for."""
    for node in model.graph.nodes:
        source = node.args[0] if ops.is_dequantize(node) and "val" not in node.meta else None
        if isinstance(source, Node) and source.op != "get_attr" and source.args:
            value = source.args[0].meta.get("val") if isinstance(source.args[0], Node) else None
            if value is not None:
                node.meta["val"] = value


def _split_chunks(model: GraphModule) -> int:
    """Each used part of a chunk or split as a slice."""
    targets = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
    done = 0
    for node in [n for n in model.graph.nodes if n.op == "call_function" and n.target in targets]:
        parts = node.meta.get("val")
        if not _static(node.args[0]) or not isinstance(parts, (list, tuple)):
            continue
        axis = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        ends = torch.tensor([p.shape[axis] for p in parts]).cumsum(0).tolist()
        for user in [u for u in node.users if u.target is operator.getitem]:
            end = ends[user.args[1]]
            b = _Builder(model, user)
            part = b.call(aten.slice.Tensor, node.args[0], axis, end - parts[user.args[1]].shape[axis], end)
            user.replace_all_uses_with(part)
            model.graph.erase_node(user)
        done += 1
    return done


def fold_constants(model: GraphModule, limit: int = 1 << 20) -> int:
    """Replace by buffers what is computed from attributes, `arange` and the like alone, up to `limit` elements."""
    values: dict[Node, Any] = {}
    for node in model.graph.nodes:
        if node.op == "get_attr":
            found: Any = operator.attrgetter(str(node.target))(model)
            if isinstance(found, torch.Tensor):
                values[node] = found.detach()
        elif _foldable(node, values):
            args, kwargs = (torch.fx.node.map_arg(a, values.__getitem__) for a in (node.args, node.kwargs))
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
    done = 0
    for node, value in values.items():
        used = any(user not in values for user in node.users)
        if node.op == "call_function" and used and isinstance(value, torch.Tensor) and value.numel() <= limit:
            name = f"_tq_folded_{done}"
            while hasattr(model, name):
                name += "_"
            model.register_buffer(name, value.contiguous().clone())
            with model.graph.inserting_before(node):
                constant = model.graph.get_attr(name)
            constant.meta = {"val": node.meta.get("val", value)}
            node.replace_all_uses_with(constant)
            done += 1
    if done:
        model.graph.eliminate_dead_code()
        model.recompile()
    return done


def _foldable(node: Node, values: dict[Node, Any]) -> bool:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    if not node.all_input_nodes:
        return ops.op_name(node) in ("arange", "full", "zeros", "ones", "scalar_tensor", "eye")
    return all(n in values for n in node.all_input_nodes)
