"""What ExecuTorch's XNNPACK delegate runs in int8, under which conditions, and why the rest stays float."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from torchquant.formats import INT8, INT8_NARROW
from torchquant.fx import ops
from torchquant.types import Capability, Scheme, TensorSpec

__all__ = ["CAPABILITIES", "REQUANTIZATION_LIMIT", "SCHEMES", "TARGET"]

TARGET = "executorch_xnnpack"
REQUANTIZATION_LIMIT = 2.0**8  # of input scale x weight scale / output scale, exclusive
_WEIGHT = TensorSpec(INT8_NARROW, symmetric=True, granularity="channel")
SCHEMES = {
    "static_int8": Scheme("static_int8", TensorSpec(INT8, symmetric=False), _WEIGHT),
    "dynamic_int8": Scheme(
        "dynamic_int8", TensorSpec(INT8, symmetric=False, granularity="token", dynamic=True), _WEIGHT
    ),
}

_EMBEDDING = "embedding tables stay float: the delegate has no embedding, and the portable kernel would run outside it"
_FLOAT = {
    "conv3d": "XNNPACK has no 3-D convolution",
    "conv_transpose1d": "XNNPACK has no 1-D transposed convolution",
    "conv_transpose3d": "XNNPACK has no 3-D transposed convolution",
    "matmul": "the delegate multiplies two activations in float",
    "addmm": "the delegate multiplies two activations in float",
    "einsum": "the delegate multiplies two activations in float",
    "attention": "the delegate multiplies two activations in float",
    "embedding": _EMBEDDING,
    "recurrent": "XNNPACK has no recurrent layers",
    "div": "the delegate divides in float",
    **dict.fromkeys(
        ("softmax", "sigmoid", "tanh", "gelu", "silu", "hardswish", "hardsigmoid", "leaky_relu", "elu"),
        "the delegate computes this function in float",
    ),
    **dict.fromkeys(
        ("prelu", "layer_norm", "group_norm", "batch_norm", "interpolate", "avg_pool"),
        "the delegate computes this in float",
    ),
}


def _weighted(node: Node, scheme: str) -> str | None:
    if ops.op_name(node) == "linear":
        return None
    groups = _argument(node, "groups", 1)
    if scheme == "dynamic_int8":
        if ops.op_name(node) != "conv2d":
            return "XNNPACK quantizes dynamically only linear and conv2d"
        return "XNNPACK runs no depthwise convolution with dynamic activations" if groups != 1 else None
    if ops.op_name(node) == "conv_transpose2d" and groups != 1:
        return "XNNPACK takes no per-channel weights in a grouped transposed convolution"
    return None


def _unscaled(node: Node, scheme: str) -> str | None:
    return "XNNPACK adds and subtracts only with alpha = 1" if node.kwargs.get("alpha", 1) != 1 else None


def _spatial_mean(node: Node, scheme: str) -> str | None:
    shape, dims = ops.shape_of(node.args[0]), node.args[1] if len(node.args) > 1 else None  # type: ignore[arg-type]
    keep = len(node.args) > 2 and node.args[2]
    if shape is None or len(shape) != 4 or not keep or sorted(d % 4 for d in dims or ()) != [2, 3]:  # type: ignore
        return "XNNPACK averages only 4-D tensors over their last two axes, kept"
    return None


def _global_pool(node: Node, scheme: str) -> str | None:
    return None if list(node.args[1]) == [1, 1] else "XNNPACK pools only to 1 x 1"  # type: ignore[arg-type]


def _plain_max_pool(node: Node, scheme: str) -> str | None:
    ceil_mode = node.args[5] if len(node.args) > 5 else False
    return "XNNPACK's max pooling has no ceil_mode" if ceil_mode else None


def _zero_pad(node: Node, scheme: str) -> str | None:
    value = node.args[3] if len(node.args) > 3 else 0
    mode = node.args[2] if len(node.args) > 2 else "constant"
    return None if mode == "constant" and not value else "XNNPACK pads only with a constant zero in int8"


def _argument(node: Node, name: str, default: Any) -> Any:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}.get(name, default)


_STATIC, _BOTH = ("static_int8",), ("static_int8", "dynamic_int8")
_CLAMPS = ("relu", "hardtanh")
CAPABILITIES: tuple[Capability, ...] = (
    Capability("conv1d", _STATIC, "weighted", _CLAMPS, True),
    Capability("conv2d", _BOTH, "weighted", _CLAMPS, True, _weighted, "dynamic: not depthwise or grouped"),
    Capability("conv_transpose2d", _STATIC, "weighted", _CLAMPS, True, _weighted, "not grouped"),
    Capability("linear", _BOTH, "weighted", _CLAMPS, True),
    Capability("add", _STATIC, "activations", _CLAMPS, True, _unscaled, "between int8 ops; alpha = 1"),
    Capability("sub", _STATIC, "activations", _CLAMPS, True, _unscaled, "between int8 ops; alpha = 1"),
    Capability("mul", _STATIC, "activations", _CLAMPS, True, reason="between int8 ops"),
    Capability("mean", _STATIC, "activations", (), True, _spatial_mean, "4-D, last two axes, kept"),
    Capability("adaptive_avg_pool2d", _STATIC, "activations", (), True, _global_pool, "to 1 x 1"),
    Capability("relu", _STATIC, "activations", (), True, reason="between int8 ops"),
    Capability("hardtanh", _STATIC, "activations", (), True, reason="between int8 ops"),
    Capability("max_pool2d", _STATIC, "shared", (), True, _plain_max_pool, "between int8 ops; no ceil_mode"),
    Capability("cat", _STATIC, "shared", (), True, reason="between int8 ops"),
    Capability("pad", _STATIC, "shared", (), True, _zero_pad, "between int8 ops; constant zero"),
    Capability("reshape", _STATIC, "shared", (), True, reason="between int8 ops"),
    Capability("slice", _STATIC, "shared", (), True, reason="between int8 ops"),
    *(Capability(op, reason=why) for op, why in _FLOAT.items()),
)
