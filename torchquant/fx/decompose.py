"""Composite ops rewritten, function unchanged, into the arithmetic that delegates take.

A delegate that knows linear, bmm, softmax and elementwise ops, yet neither attention, LayerNorm nor a mean over
the last axis, otherwise cuts a transformer into dozens of pieces. All rewrites need static shapes; what has
dynamic ones is left as it is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from torchquant.fx import ops

aten = torch.ops.aten
_LAST = torch.iinfo(torch.int64).max  # as the end of a slice: all there is
_NEGATIVE = -1e9  # stands for minus infinity in an additive mask: softmax gives exactly 0, arithmetic stays finite


class Builder:
    """Creates nodes in front of `at`, with their fake values, and buffers by value."""

    def __init__(self, model: GraphModule, at: Node) -> None:
        self.model, self.at = model, at
        self.made: set[Node] = set()

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        with self.model.graph.inserting_before(self.at):
            node = self.model.graph.call_function(target, args, kwargs)
        self.made.add(node)
        node.meta = {k: v for k, v in self.at.meta.items() if k in ("nn_module_stack", "stack_trace", "custom")}
        fakes = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
        mode = next((t.fake_mode for t in pytree.tree_leaves(fakes) if hasattr(t, "fake_mode")), None)
        with mode or torch.no_grad(), enable_python_dispatcher():  # without it some ops fix dynamic sizes
            node.meta["val"] = target(*fakes, **kwargs)
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


def _is_float32(node: Any) -> bool:
    """Whether it is a node of a float32 tensor, of whatever shape."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _is_last(dims: Any, x: Node) -> bool:
    rank = x.meta["val"].ndim
    dims = [dims] if isinstance(dims, int) else list(dims or [])
    return len(dims) == 1 and dims[0] % rank == rank - 1


def layer_norm(b: Builder, node: Node) -> Node | None:
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


def batch_norm(b: Builder, node: Node) -> Node | None:
    """BatchNorm by the batch's own statistics, in inference too (`track_running_stats=False`), as arithmetic.

    torchao folds every BatchNorm behind a convolution into it, and fails where there are no statistics to fold.
    """
    x, weight, bias, mean, _, _, _, eps = node.args[:8]
    if not isinstance(x, Node) or mean is not None:
        return None
    dtype = x.meta["val"].dtype
    wide = b.call(aten.to.dtype, x, torch.float32) if dtype in (torch.float16, torch.bfloat16) else x
    dims = [d for d in range(x.meta["val"].ndim) if d != 1]
    variance = b.call(aten.var.correction, wide, dims, correction=0, keepdim=True)
    centred = b.call(aten.sub.Tensor, wide, b.call(aten.mean.dim, wide, dims, True))
    y = b.call(aten.mul.Tensor, centred, b.call(aten.rsqrt.default, b.call(aten.add.Tensor, variance, eps)))
    y = _by_channel(b, y, weight, bias)
    return b.call(aten.to.dtype, y, dtype) if wide is not x else y


def instance_norm(b: Builder, node: Node) -> Node | None:
    """InstanceNorm of images by their own statistics: means over the two last axes, which delegates know."""
    x, weight, bias, _, _, by_input, _, eps = node.args[:8]
    if not _is_float32(x) or not by_input or x.meta["val"].ndim != 4:  # type: ignore[union-attr]
        return None
    centred = b.call(aten.sub.Tensor, x, b.call(aten.mean.dim, x, [2, 3], True))
    variance = b.call(aten.mean.dim, b.call(aten.mul.Tensor, centred, centred), [2, 3], True)
    shifted = b.call(aten.add.Tensor, variance, b.scalar(float(eps)))  # type: ignore[arg-type]
    y = b.call(aten.mul.Tensor, centred, b.call(aten.rsqrt.default, shifted))
    return _by_channel(b, y, weight, bias)


def _by_channel(b: Builder, y: Node, weight: Any, bias: Any) -> Node:
    """y (batch, channels, ...) times a weight plus a bias for each channel, where there are any."""
    shape = [-1, *[1] * (y.meta["val"].ndim - 2)]
    for op, factor in ((aten.mul.Tensor, weight), (aten.add.Tensor, bias)):
        if isinstance(factor, Node):
            y = b.call(op, y, b.call(aten.reshape.default, factor, shape))
    return y


def rms_norm(b: Builder, node: Node) -> Node | None:
    """RMSNorm over the last axis: x * rsqrt(mean(x^2) + eps) * weight."""
    x, shape, weight, eps = (*node.args, *(None, None)[len(node.args) - 2 :])[:4]
    if not _static(x) or len(shape) != 1:  # type: ignore[arg-type]
        return None
    assert isinstance(x, Node)
    square = b.mean_last(b.call(aten.mul.Tensor, x, x))
    shifted = b.call(aten.add.Tensor, square, b.scalar(torch.finfo(torch.float32).eps if eps is None else float(eps)))  # type: ignore[arg-type]
    y = b.call(aten.mul.Tensor, x, b.call(aten.rsqrt.default, shifted))
    return y if weight is None else b.call(aten.mul.Tensor, y, weight)


def attention(b: Builder, node: Node) -> Node | None:
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


def _additive(b: Builder, mask: Node) -> Node:
    if mask.meta["val"].dtype != torch.bool:
        return b.call(aten.clamp.default, mask, _NEGATIVE)  # minus infinity would make a masked row NaN
    return b.call(aten.where.self, mask, b.scalar(0.0), b.scalar(_NEGATIVE))


def mean(b: Builder, node: Node) -> Node | None:
    """A mean over the last axis, as in RMSNorm."""
    x, dims = node.args[0], node.args[1]
    if not _static(x) or node.kwargs.get("dtype") or x.meta["val"].ndim > 3 or not _is_last(dims, x):  # type: ignore
        return None
    return b.shaped(b.mean_last(x), node)  # type: ignore[arg-type]


def total(b: Builder, node: Node) -> Node | None:
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


def vector_norm(b: Builder, node: Node) -> Node | None:
    """The Euclidean norm over the last axis."""
    x, order, dims = (*node.args, *(2, None)[len(node.args) - 1 :])[:3]
    if not _static(x) or float(order) != 2 or not _is_last(dims, x):  # type: ignore[arg-type]
        return None
    assert isinstance(x, Node)
    return b.shaped(b.call(aten.sqrt.default, b.sum_last(b.call(aten.mul.Tensor, x, x))), node)


def scalar_operand(b: Builder, node: Node) -> Node | None:
    """`x + 2` and its like with the number as a tensor."""
    x, number = node.args[0], node.args[1]
    if not _is_float32(x) or isinstance(number, Node) or node.kwargs or x.meta["val"].ndim == 0:  # type: ignore
        return None
    return b.call(_TENSOR_FORM.get(node.target, node.target), x, b.scalar(float(number)))  # type: ignore


def hard_sigmoid(b: Builder, node: Node) -> Node | None:
    """Hard sigmoid as relu6(x + 3) / 6 with the numbers as tensors of its own dtype."""
    x = node.args[0]
    if not _is_float32(x) or x.meta["val"].ndim == 0:  # type: ignore[union-attr]
        return None
    clipped = b.call(aten.hardtanh.default, b.call(aten.add.Tensor, x, b.scalar(3.0)), 0.0, 6.0)
    return b.call(aten.mul.Tensor, clipped, b.scalar(1 / 6))


def softplus(b: Builder, node: Node) -> Node | None:
    """log(1 + exp(beta x)) / beta as (relu(z) + log(1 + exp(-|z|))) / beta with z = beta x, which overflows nowhere.

    PyTorch takes x itself above the threshold; from 15 on the difference is below float32's resolution.
    """
    given = ops.arguments(node)
    x, beta, threshold = given["self"], given.get("beta", 1), given.get("threshold", 20)
    if not _is_float32(x) or x.meta["val"].ndim == 0 or threshold < 15 or beta <= 0:
        return None
    if beta == 1:
        return _softplus(b, x)
    scaled = b.call(aten.mul.Tensor, x, b.scalar(float(beta)))
    return b.call(aten.mul.Tensor, _softplus(b, scaled), b.scalar(1 / beta))


def _softplus(b: Builder, x: Node) -> Node:
    decay = b.call(aten.exp.default, b.call(aten.neg.default, b.call(aten.abs.default, x)))
    tail = b.call(aten.log.default, b.call(aten.add.Tensor, decay, b.scalar(1.0)))
    return b.call(aten.add.Tensor, b.call(aten.relu.default, x), tail)


def mish(b: Builder, node: Node) -> Node | None:
    """x tanh(softplus(x))."""
    x = node.args[0]
    if not _is_float32(x) or x.meta["val"].ndim == 0:  # type: ignore[union-attr]
        return None
    return b.call(aten.mul.Tensor, x, b.call(aten.tanh.default, _softplus(b, x)))  # type: ignore[arg-type]


def log_sigmoid(b: Builder, node: Node) -> Node | None:
    """-softplus(-x)."""
    x = node.args[0]
    if not _is_float32(x) or x.meta["val"].ndim == 0:  # type: ignore[union-attr]
        return None
    return b.call(aten.neg.default, _softplus(b, b.call(aten.neg.default, x)))


def bilinear(b: Builder, node: Node) -> Node | None:
    """x1 W x2 as a linear of x2, times x1, summed over the features of x1."""
    x1, x2, weight, bias = (*node.args, None)[:4]
    leading = [s if isinstance(s, int) else -1 for s in node.meta["val"].shape[:-1]]
    if not (_is_float32(x1) and _is_float32(x2)) or not isinstance(weight, Node) or not ops.is_constant(weight):
        return None
    if leading.count(-1) > 1:
        return None
    value = ops.constant_value(b.model, weight)
    outputs, features = value.shape[:2]
    rows = b.constant(value.flatten(0, 1).contiguous(), f"bilinear_{node.name}")
    products = b.call(aten.reshape.default, b.call(aten.linear.default, x2, rows), [*leading, outputs, features])
    left = b.call(aten.reshape.default, x1, [*leading, 1, features])
    total_ = b.call(aten.reshape.default, b.sum_last(b.call(aten.mul.Tensor, products, left)), [*leading, outputs])
    return total_ if bias is None else b.call(aten.add.Tensor, total_, bias)


def reversed_subtraction(b: Builder, node: Node) -> Node | None:
    """`2 - x` with the number as a tensor."""
    x, number = node.args[0], node.args[1]
    if not _is_float32(x) or isinstance(number, Node) or len(node.args) > 2 or x.meta["val"].ndim == 0:  # type: ignore
        return None
    return b.call(aten.sub.Tensor, b.scalar(float(number)), x)  # type: ignore[arg-type]


def reshaped(b: Builder, node: Node) -> Node | None:
    """Axes of size one added or removed, as a reshape."""
    return b.call(aten.reshape.default, node.args[0], list(node.meta["val"].shape)) if _static(node) else None


def select(b: Builder, node: Node) -> Node | None:
    """One position of an axis, as a slice and a reshape."""
    x, axis, index = node.args
    if not _static(x, node) or not isinstance(index, int):
        return None
    size = x.meta["val"].shape[axis]  # type: ignore[union-attr]
    part = b.call(aten.slice.Tensor, x, axis, index % size, index % size + 1)
    return b.call(aten.reshape.default, part, list(node.meta["val"].shape))


def stack(b: Builder, node: Node) -> Node | None:
    """Tensors stacked on a new axis, as a concatenation of reshaped ones."""
    tensors = list(node.args[0])  # type: ignore[arg-type]
    if not _static(node, *tensors):
        return None
    shape = list(node.meta["val"].shape)
    axis = int(ops.arguments(node).get("dim", 0)) % len(shape)
    shape[axis] = 1
    return b.call(aten.cat.default, [b.call(aten.reshape.default, t, shape) for t in tensors], axis)


def single(b: Builder, node: Node) -> Node | None:
    """A concatenation of one tensor."""
    tensors = node.args[0]
    return tensors[0] if isinstance(tensors, (list, tuple)) and len(tensors) == 1 else None  # type: ignore[return-value]


def clamp(b: Builder, node: Node) -> Node | None:
    """A clamp by numbers as ReLU or hardtanh, which delegates compute in the kernel of the op before."""
    given = ops.arguments(node)
    x, low, high = given["self"], given.get("min"), given.get("max")
    numbers = all(v is None or isinstance(v, (int, float)) for v in (low, high))
    if not isinstance(x, Node) or not ops.is_float(x) or not ops.is_float(node) or not numbers or _is_aliased(node):
        return None
    if low == 0 and high is None:
        return b.call(aten.relu.default, x)
    limit = torch.finfo(x.meta["val"].dtype).max
    low, high = -limit if low is None else float(low), limit if high is None else float(high)
    return b.call(aten.hardtanh.default, x, low, high) if -limit <= low <= high <= limit else None


def spatial_mean(b: Builder, node: Node) -> Node | None:
    """A mean over the two last axes of an image, with these axes kept for the pooling kernel."""
    x, dims = node.args[0], node.args[1]
    if not isinstance(x, Node) or not ops.is_float(x) or x.meta["val"].ndim != 4 or node.kwargs.get("dtype"):
        return None
    keep = len(node.args) > 2 and bool(node.args[2])
    channels = x.meta["val"].shape[1]
    if sorted(d % 4 for d in dims or ()) != [2, 3] or keep or not isinstance(channels, int):  # type: ignore
        return None
    return b.call(aten.reshape.default, b.call(aten.mean.dim, x, [2, 3], True), [-1, channels])


def whole_pool(b: Builder, node: Node) -> Node | None:
    """An average pool whose window is the whole image, as a mean."""
    given = ops.arguments(node)
    x = given["self"]
    if not _static(x) or x.meta["val"].ndim != 4 or given.get("divisor_override"):
        return None
    height, width = _pair(given["kernel_size"])
    whole = (height, width) == tuple(x.meta["val"].shape[2:]) and not any(_pair(given.get("padding", 0)))
    return b.call(aten.mean.dim, x, [2, 3], True) if whole else None


def _is_aliased(node: Node) -> bool:
    """Whether a write in place is seen by others than the users of its result."""
    schema, x = ops.schema_of(node), node.args[0]
    if schema is None or not schema.is_mutable:
        return False
    made_here = isinstance(x, Node) and x.op == "call_function" and len(x.users) == 1
    return not made_here or ops.schema_of(x) is None or any(r.alias_info for r in ops.schema_of(x).returns)  # type: ignore


def _needs_copies(model: GraphModule) -> bool:
    """Whether an op writes in place or reads strides, so that copies may not be left out."""
    schemas = [ops.schema_of(n) for n in model.graph.nodes]
    strided = any(n.target in (aten.as_strided.default, aten.view.dtype) for n in model.graph.nodes)
    return strided or any(schema is not None and schema.is_mutable for schema in schemas)


def viewed(b: Builder, node: Node) -> Node | None:
    """A view to the same shape left out, and any other as a reshape, whatever the strides are by then."""
    return needless(b, node) or b.call(aten.reshape.default, *node.args)


def _pair(value: Any) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return (values[0], values[-1]) if values else (0, 0)


def shuffle(b: Builder, node: Node) -> Node | None:
    """Pixels or channels moved around: a reshape, a permute and a reshape."""
    x = node.args[0]
    if not _static(x, node) or x.meta["val"].ndim != 4:  # type: ignore[union-attr]
        return None
    n, c, h, w = x.meta["val"].shape  # type: ignore[union-attr]
    r: Any = node.args[1]
    if node.target is aten.pixel_shuffle.default:
        inner, order = [n, c // r**2, r, r, h, w], [0, 1, 4, 2, 5, 3]
    elif node.target is aten.pixel_unshuffle.default:
        inner, order = [n, c, h // r, r, w // r, r], [0, 1, 3, 5, 2, 4]
    else:
        inner, order = [n, r, c // r, h, w], [0, 2, 1, 3, 4]
    moved = b.call(aten.permute.default, b.call(aten.reshape.default, x, inner), order)
    return b.call(aten.reshape.default, moved, list(node.meta["val"].shape))


def cropped(b: Builder, node: Node) -> Node | None:
    """A pad with negative sizes: slices, then a pad of what is left."""
    given = ops.arguments(node)
    x, sizes = given["self"], list(given["pad"])
    if not _is_float32(x) or all(s >= 0 for s in sizes) or given.get("mode", "constant") != "constant":
        return None
    rank = x.meta["val"].ndim
    for i in range(len(sizes) // 2):
        axis, before, behind = rank - 1 - i, max(-sizes[2 * i], 0), max(-sizes[2 * i + 1], 0)
        size = x.meta["val"].shape[axis]
        if before or behind:
            end = size - behind if isinstance(size, int) else -behind or _LAST
            x = b.call(aten.slice.Tensor, x, axis, before, end)
    left = [max(s, 0) for s in sizes]
    return b.call(aten.constant_pad_nd.default, x, left, float(given.get("value") or 0.0)) if any(left) else x


def needless(b: Builder, node: Node) -> Node | None:
    """What leaves its input as it is: a copy, a dropout in eval mode, a reshape or a slice to the same shape."""
    x = node.args[0]
    if not isinstance(x, Node) or not isinstance(x.meta.get("val"), torch.Tensor):
        return None
    before, behind = x.meta["val"], node.meta.get("val")
    if (
        not isinstance(behind, torch.Tensor)
        or before.dtype != behind.dtype
        or any(u.op == "output" for u in node.users)
    ):
        return None
    if node.target is aten.dropout.default:
        return None if node.args[2] else x
    if node.target in _COPIES and _needs_copies(b.model):
        return None
    return x if _static(x, node) and before.shape == behind.shape else None


def transpose(b: Builder, node: Node) -> Node | None:
    """Two axes swapped, as a permute."""
    x, i, j = node.args
    if not _static(x):
        return None
    order = list(range(node.meta["val"].ndim))
    order[i], order[j] = order[j], order[i]  # type: ignore[index]
    return b.call(aten.permute.default, x, order)


def expand(b: Builder, node: Node) -> Node | None:
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
Rule = Callable[[Builder, Node], "Node | tuple[Node, ...] | None"]
_COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default)
_NEEDLESS = (
    *_COPIES,
    aten.dropout.default,
    aten.slice.Tensor,
    aten.reshape.default,
)
_RESHAPES = (
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
# forms that are one and the same to a Quantizer: applied before it annotates
FORMS: dict[Any, Rule] = {
    **dict.fromkeys((aten.clamp.default, aten.clamp_.default, aten.clamp_min.default, aten.clamp_max.default), clamp),
    **dict.fromkeys(_RESHAPES, reshaped),
    **dict.fromkeys(_NEEDLESS, needless),
    **dict.fromkeys((aten.pixel_shuffle.default, aten.pixel_unshuffle.default, aten.channel_shuffle.default), shuffle),
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), cropped),
    aten.view.default: viewed,
    aten.select.int: select,
    aten.stack.default: stack,
    aten.cat.default: single,
    aten.mean.dim: spatial_mean,
    aten.avg_pool2d.default: whole_pool,
}
RULES: dict[Any, Rule] = {
    **FORMS,
    aten.layer_norm.default: layer_norm,
    aten.rms_norm.default: rms_norm,
    aten.instance_norm.default: instance_norm,
    aten.scaled_dot_product_attention.default: attention,
    aten.mean.dim: lambda b, node: spatial_mean(b, node) or mean(b, node),
    aten.sum.dim_IntList: total,
    aten.linalg_vector_norm.default: vector_norm,
    aten.rsub.Scalar: reversed_subtraction,
    aten.hardsigmoid.default: hard_sigmoid,
    aten.bilinear.default: bilinear,
    aten.softplus.default: softplus,
    aten.mish.default: mish,
    aten.log_sigmoid.default: log_sigmoid,
    aten.transpose.int: transpose,
    aten.expand.default: expand,
    aten.expand_as.default: expand,
    **dict.fromkeys((*_TENSOR_FORM, *_TENSOR_FORM.values()), scalar_operand),
}


def decompose(model: GraphModule) -> int:
    """Apply every rule where it fits, fold what depends on constants alone; returns how many nodes changed."""
    _fill_values(model)
    fold_constants(model)
    return rewrite(model, RULES)


def normalize(model: GraphModule) -> int:
    """Write ops that have several forms in the one that a Quantizer and its target know; returns how many changed.

    A clamp becomes a ReLU or a hardtanh, a chunk slices, a select or squeeze a reshape, a pixel shuffle reshapes and a
    permute; copies and dropout vanish. The last node that stands for another keeps its name.
    """
    return rewrite(model, FORMS)


def expand_batch_norms(model: GraphModule) -> int:
    """Write every BatchNorm without statistics of its own as arithmetic; returns how many there were."""
    return _apply(model, {aten.batch_norm.default: batch_norm})


def rewrite(model: GraphModule, rules: Mapping[Any, Rule]) -> int:
    return _split_chunks(model) + _apply(model, rules)


def _apply(model: GraphModule, rules: Mapping[Any, Rule]) -> int:
    done = 0
    for node in list(model.graph.nodes):
        rule = rules.get(node.target) if node.op == "call_function" else None
        builder = Builder(model, node)
        replacement = rule(builder, node) if rule is not None else None
        if replacement is None:
            continue
        if isinstance(replacement, Node):
            _replace(model, node, replacement, builder)
        else:
            for user in list(node.users):
                if user.users:
                    _replace(model, user, replacement[user.args[1]], builder)
                else:
                    model.graph.erase_node(user)
            model.graph.erase_node(node)
        done += 1
    model.graph.eliminate_dead_code()
    model.graph.lint()
    model.recompile()
    return done


def _replace(model: GraphModule, node: Node, by: Node, builder: Builder) -> None:
    node.replace_all_uses_with(by)
    model.graph.erase_node(node)
    if by in builder.made:
        by.name = node.name


def used_parts(node: Node) -> set[int]:
    """Which results of an op with several are read."""
    return {user.args[1] for user in node.users if user.users}  # type: ignore[misc]


def _fill_values(model: GraphModule) -> None:
    """Give dequantize nodes, which `convert_pt2e` makes without a fake value, that of what they stand for."""
    for node in model.graph.nodes:
        source = node.args[0] if ops.is_dequantize(node) and "val" not in node.meta else None
        if isinstance(source, Node) and source.op != "get_attr" and source.args:
            value = source.args[0].meta.get("val") if isinstance(source.args[0], Node) else None
            if value is not None:
                node.meta["val"] = value


_SPLITS = (
    aten.chunk.default,
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.unsafe_chunk.default,
    aten.unsafe_split.Tensor,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
    aten.unbind.int,
)


def _split_chunks(model: GraphModule) -> int:
    """Each used part of a chunk, split or unbind as a slice."""
    done = 0
    for node in [n for n in model.graph.nodes if n.op == "call_function" and n.target in _SPLITS]:
        parts, x = node.meta.get("val"), node.args[0]
        axis = ops.arguments(node).get("dim", 0)
        if (
            not isinstance(parts, (list, tuple))
            or not isinstance(axis, int)
            or not isinstance(x.meta.get("val"), torch.Tensor)
        ):
            continue
        unbound = node.target is aten.unbind.int
        sizes = [1 if unbound else p.shape[axis] for p in parts]
        if not all(isinstance(size, int) for size in sizes) or (unbound and not _static(x)):
            continue
        ends = torch.tensor(sizes).cumsum(0).tolist()
        for user in [u for u in node.users if u.target is operator.getitem]:
            i = user.args[1]
            b = Builder(model, user)
            part = b.call(aten.slice.Tensor, x, axis, ends[i] - sizes[i], ends[i])
            if unbound:
                part = b.call(aten.reshape.default, part, list(parts[i].shape))
            user.replace_all_uses_with(part)
            model.graph.erase_node(user)
            part.name = user.name
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
