"""Norms, attention and functions as the arithmetic that delegates take. Static shapes only, unless said otherwise."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from torchquant.fx import ops
from torchquant.fx.rewrites.builder import Builder, is_aliased, is_float32, is_last, is_static

aten = torch.ops.aten

_NEGATIVE = -1e9  # stands for minus infinity in an additive mask: softmax gives exactly 0, arithmetic stays finite
TENSOR_FORM: dict[Any, Any] = {
    aten.mul.Scalar: aten.mul.Tensor,
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.div.Scalar: aten.div.Tensor,
}


def layer_norm(b: Builder, node: Node) -> Node | None:
    """LayerNorm over the last axis: (x - mean) * rsqrt(mean((x - mean)^2) + eps) * weight + bias."""
    x, shape, weight, bias, eps = (*node.args, *(None, None, 1e-5)[len(node.args) - 2 :])[:5]
    if not is_static(x) or len(shape) != 1:  # type: ignore[arg-type]
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
    if not is_float32(x) or not by_input or x.meta["val"].ndim != 4:  # type: ignore[union-attr]
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
    if not is_float32(x) or len(shape) != 1 or not isinstance(x.meta["val"].shape[-1], int):  # type: ignore
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
    arguments = ops.arguments(node)
    q, k, v, mask = arguments["query"], arguments["key"], arguments["value"], arguments.get("attn_mask")
    if not is_static(q, k, v) or arguments.get("dropout_p") or q.meta["val"].ndim != 4 or arguments.get("enable_gqa"):
        return None
    assert isinstance(q, Node)
    assert isinstance(k, Node)
    assert isinstance(v, Node)
    batch, heads, length, features = q.meta["val"].shape
    source, values = k.meta["val"].shape[2], v.meta["val"].shape[3]
    if k.meta["val"].shape[:2] != (batch, heads) or v.meta["val"].shape[:2] != (batch, heads):
        return None
    scale = 1 / math.sqrt(features) if arguments.get("scale") is None else arguments["scale"]
    q = b.call(aten.mul.Tensor, q, b.scalar(float(scale)))
    q = b.call(aten.reshape.default, q, [batch * heads, length, features])
    k = b.call(aten.reshape.default, b.call(aten.permute.default, k, [0, 1, 3, 2]), [batch * heads, features, source])
    scores = b.call(aten.reshape.default, b.call(aten.bmm.default, q, k), [batch, heads, length, source])
    if isinstance(mask, Node):
        scores = b.call(aten.add.Tensor, scores, _additive(b, mask))
    if arguments.get("is_causal"):
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
    if not is_float32(x) or node.kwargs.get("dtype") or not is_last(dims, x):  # type: ignore[arg-type]
        return None
    shape, keeps = x.meta["val"].shape, len(node.args) > 2 and bool(node.args[2])  # type: ignore[union-attr]
    if (len(shape) > 3 or not keeps or not isinstance(shape[-1], int)) and not (is_static(x) and len(shape) <= 3):
        return None
    return b.shaped(b.mean_last(x), node)  # type: ignore[arg-type]


def total(b: Builder, node: Node) -> Node | None:
    """A sum over one axis: that axis moved last, then a linear with weights of one."""
    x, dims = node.args[0], node.args[1]
    if not is_static(x) or node.kwargs.get("dtype") or dims is None or len(dims) != 1:  # type: ignore[arg-type]
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
    if not is_static(x) or float(order) != 2 or not is_last(dims, x):  # type: ignore[arg-type]
        return None
    assert isinstance(x, Node)
    return b.shaped(b.call(aten.sqrt.default, b.sum_last(b.call(aten.mul.Tensor, x, x))), node)


def scalar_operand(b: Builder, node: Node) -> Node | None:
    """`x + 2` and its like with the number as a tensor."""
    x, number = node.args[0], node.args[1]
    if not is_float32(x) or isinstance(number, Node) or node.kwargs or x.meta["val"].ndim == 0:  # type: ignore
        return None
    return b.call(TENSOR_FORM.get(node.target, node.target), x, b.scalar(float(number)))  # type: ignore


def hard_sigmoid(b: Builder, node: Node) -> Node | None:
    """Hard sigmoid as relu6(x + 3) / 6 with the numbers as tensors of its own dtype."""
    x = node.args[0]
    if not is_float32(x) or x.meta["val"].ndim == 0:  # type: ignore[union-attr]
        return None
    clipped = b.call(aten.hardtanh.default, b.call(aten.add.Tensor, x, b.scalar(3.0)), 0.0, 6.0)
    return b.call(aten.mul.Tensor, clipped, b.scalar(1 / 6))


def softplus(b: Builder, node: Node) -> Node | None:
    """log(1 + exp(beta x)) / beta as (relu(z) + log(1 + exp(-|z|))) / beta with z = beta x, which overflows nowhere.

    PyTorch takes x itself above the threshold; from 15 on the difference is below float32's resolution.
    """
    arguments = ops.arguments(node)
    x, beta, threshold = arguments["self"], arguments.get("beta", 1), arguments.get("threshold", 20)
    if not is_float32(x) or x.meta["val"].ndim == 0 or threshold < 15 or beta <= 0:
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
    if not is_float32(x) or x.meta["val"].ndim == 0:  # type: ignore[union-attr]
        return None
    return b.call(aten.mul.Tensor, x, b.call(aten.tanh.default, _softplus(b, x)))  # type: ignore[arg-type]


def log_sigmoid(b: Builder, node: Node) -> Node | None:
    """-softplus(-x)."""
    x = node.args[0]
    if not is_float32(x) or x.meta["val"].ndim == 0:  # type: ignore[union-attr]
        return None
    return b.call(aten.neg.default, _softplus(b, b.call(aten.neg.default, x)))


def bilinear(b: Builder, node: Node) -> Node | None:
    """x1 W x2 as a linear of x2, times x1, summed over the features of x1."""
    x1, x2, weight, bias = (*node.args, None)[:4]
    leading = [s if isinstance(s, int) else -1 for s in node.meta["val"].shape[:-1]]
    if not (is_float32(x1) and is_float32(x2)) or not isinstance(weight, Node) or not ops.is_constant(weight):
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
    if not is_float32(x) or isinstance(number, Node) or len(node.args) > 2 or x.meta["val"].ndim == 0:  # type: ignore
        return None
    return b.call(aten.sub.Tensor, b.scalar(float(number)), x)  # type: ignore[arg-type]


def clamp(b: Builder, node: Node) -> Node | None:
    """A clamp by numbers as ReLU or hardtanh, which delegates compute in the kernel of the op before."""
    arguments = ops.arguments(node)
    x, low, high = arguments["self"], arguments.get("min"), arguments.get("max")
    numbers = all(v is None or isinstance(v, (int, float)) for v in (low, high))
    if not isinstance(x, Node) or not ops.is_float(x) or not ops.is_float(node) or not numbers or is_aliased(node):
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
    arguments = ops.arguments(node)
    x = arguments["self"]
    if not is_static(x) or x.meta["val"].ndim != 4 or arguments.get("divisor_override"):
        return None
    height, width = _pair(arguments["kernel_size"])
    whole = (height, width) == tuple(x.meta["val"].shape[2:]) and not any(_pair(arguments.get("padding", 0)))
    return b.call(aten.mean.dim, x, [2, 3], True) if whole else None


def _pair(value: Any) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return (values[0], values[-1]) if values else (0, 0)
