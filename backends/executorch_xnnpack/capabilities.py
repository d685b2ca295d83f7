"""What ExecuTorch's XNNPACK delegate runs in int8, under which conditions, and why the rest stays float."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.fx import Node

from torchquant.formats.integer import INT8, INT8_NARROW
from torchquant.fx import ops
from torchquant.fx.windows import is_spatial_pad
from torchquant.lowering.target import Target
from torchquant.lowering.weight_schemes import weight_schemes
from torchquant.types import Capability, Scheme, TensorSpec

__all__ = [
    "CAPABILITIES",
    "FEW_BITS",
    "FOUR_BITS",
    "LEAST_GROUP",
    "LOOKUPS",
    "REQUANTIZATION_LIMIT",
    "SCHEMES",
    "TARGET",
    "inputs_of",
]

REQUANTIZATION_LIMIT = 2.0**8  # of input scale x weight scale / output scale, exclusive
_WEIGHT = TensorSpec(INT8_NARROW, symmetric=True, granularity="channel")
_BYTES_BY_TOKEN = TensorSpec(INT8, symmetric=False, granularity="token", dynamic=True)
FOUR_BITS = (-8, 7)  # the one range of codes that XNNPACK packs as 4 bits
LEAST_GROUP = 32  # XNNPACK's groups of 4-bit weights are multiples of this
_few_bits = partial(weight_schemes, group_sizes=(256, 128, 64, LEAST_GROUP), scale_dtype=torch.bfloat16)
_LINEARS = _few_bits((4,), activations=(_BYTES_BY_TOKEN,), symmetric=(True,))  # scales are stored in bfloat16
_TABLES = _few_bits((8, 4))
FEW_BITS, LOOKUPS = tuple(_LINEARS), tuple(_TABLES)  # names: of linears with 4-bit weights, and of tables
SCHEMES = {
    "static_int8": Scheme("static_int8", TensorSpec(INT8, symmetric=False), _WEIGHT),
    "dynamic_int8": Scheme("dynamic_int8", _BYTES_BY_TOKEN, _WEIGHT),
    **_LINEARS,
    **_TABLES,
}

_FUNCTION = "the delegate computes this function in float"
_GROWS = "XNNPACK's int8 mean goes wrong in a call that is larger than one before, so it is float where sizes vary"
_ALONE = "XNNPACK has no such op, so a portable kernel computes it in float, outside the delegate"
_FLOAT = {
    "conv3d": "XNNPACK has no 3-D convolution",
    "conv_transpose3d": "XNNPACK has no 3-D transposed convolution",
    **dict.fromkeys(
        ("matmul", "addmm", "einsum", "attention"), "the delegate multiplies two activations in float"
    ),
    "bilinear": "XNNPACK has no bilinear form of two activations",
    "recurrent": "XNNPACK has no recurrent layers",
    "recurrent_cell": "XNNPACK has no recurrent layers",
    "div": "the delegate divides in float",
    "avg_pool": "the delegate averages windows in float; only a mean over the whole image has an int8 kernel",
    "interpolate": "the delegate resizes images in float",
    "layer_norm": "rewritten as float arithmetic, which the delegate computes: a square root has no int8 kernel",
    **dict.fromkeys(
        ("softmax", "sigmoid", "tanh", "gelu", "silu", "hardswish", "hardsigmoid", "leaky_relu", "elu", "prelu"),
        _FUNCTION,
    ),
    **dict.fromkeys(("group_norm", "batch_norm"), "this normalization has no int8 kernel"),
    **dict.fromkeys(
        ("exp", "log", "sqrt", "rsqrt", "abs", "neg", "square", "pow", "floor", "ceil", "sin", "cos", "maximum",
         "minimum"),
        _FUNCTION,
    ),
    **dict.fromkeys(("repeat", "roll", "flip", "gather", "index", "cumsum", "where", "sum", "amax", "sort"), _ALONE),
}  # fmt: skip


def _weighted(node: Node, scheme: str) -> str | None:
    op, groups = ops.op_name(node), _argument(node, "groups", 1)
    if op == "linear":
        return None
    if scheme == "dynamic_int8":
        if op not in ("conv2d", "conv_transpose2d"):
            return "XNNPACK quantizes dynamically only linear and 2-D convolutions"
        return "XNNPACK runs no grouped or depthwise convolution with dynamic activations" if groups != 1 else None
    if op.startswith("conv_transpose") and groups != 1:
        return "XNNPACK takes no per-channel weights in a grouped transposed convolution"
    return None


def _two_tensors(node: Node, scheme: str) -> str | None:
    if not all(isinstance(a, Node) for a in node.args[:2]):
        return "its other operand is a number, and XNNPACK adds and multiplies numbers in float"
    return "XNNPACK adds and subtracts only with alpha = 1" if node.kwargs.get("alpha", 1) != 1 else None


def _spatial_mean(node: Node, scheme: str) -> str | None:
    shape, dims = ops.shape_of(node.args[0]), node.args[1] if len(node.args) > 1 else None  # type: ignore[arg-type]
    keep = len(node.args) > 2 and node.args[2]
    if shape is None or len(shape) != 4 or not keep or sorted(d % 4 for d in dims or ()) != [2, 3]:  # type: ignore
        return "XNNPACK averages in int8 only the last two axes of 4-D tensors"
    return None if _static(node.args[0]) else _GROWS  # type: ignore[arg-type]


def _global_pool(node: Node, scheme: str) -> str | None:
    size = _argument(node, "output_size", None)
    if list(size) != [1, 1]:
        return "XNNPACK pools only to 1 x 1"
    return None if _static(node.args[0]) else _GROWS  # type: ignore[arg-type]


def _plain_max_pool(node: Node, scheme: str) -> str | None:
    kernel, stride = (_pair(_argument(node, name, ())) for name in ("kernel_size", "stride"))
    if stride and any(s > k for s, k in zip(stride, kernel, strict=True)):
        return "XNNPACK's max pooling has no stride over its window"
    if _argument(node, "ceil_mode", False) and not _static(node):
        return "XNNPACK's max pooling has ceil_mode only for sizes known beforehand"
    return None


def _pair(value: Any) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values


def _zero_pad(node: Node, scheme: str) -> str | None:
    if not is_spatial_pad(node):
        return "XNNPACK pads in int8 only the sides of an image or a sequence, with zeros"
    if not all(_reads_padded(user) for user in node.users):
        return "XNNPACK pads in int8 only in front of a convolution, as part of it"
    return None


def _reads_padded(user: Node) -> bool:
    return ops.op_name(user) in ("conv1d", "conv2d")


_STATIC_RESHAPES = ("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze")
_PERMUTES = ("permute", "transpose", "t", "movedim", "numpy_T")
_COPIES = ("contiguous", "clone", "alias", "detach", "dropout")


def _moved(node: Node, scheme: str) -> str | None:
    op = _aten_name(node)
    if op in _PERMUTES or op in _COPIES:
        return None
    if op not in _STATIC_RESHAPES:
        return f"XNNPACK has no int8 {op}"
    unknown = [s for s in ops.shape_of(node) or () if not isinstance(s, int)]
    return None if len(unknown) <= 1 else f"XNNPACK has {op} with at most one size that varies"


def _sliced(node: Node, scheme: str) -> str | None:
    op = _aten_name(node)
    if op not in ("slice", "narrow"):
        return f"XNNPACK has no {op} of such sizes"
    if _argument(node, "step", 1) != 1:
        return "XNNPACK slices in int8 only with step 1"
    if not _static(node, *node.all_input_nodes):
        return "XNNPACK slices only tensors of sizes known beforehand"
    return None


def _aten_name(node: Node) -> str:
    return ops.overload_of(node).partition(".")[0]


def _static(*nodes: Node) -> bool:
    return all(all(isinstance(s, int) for s in ops.shape_of(n) or ()) for n in nodes)


def _argument(node: Node, name: str, default: Any) -> Any:
    return ops.arguments(node).get(name, default)


def inputs_of(node: Node) -> int:
    """How many input features the weight of a linear has, or a table columns; 0 if that is unknown."""
    kind = ops.kind_of(node)
    weight = None if kind is None or kind.weight is None else ops.argument(node, kind.weight)
    shape = () if weight is None else ops.shape_of(weight) or ()
    return shape[1] if len(shape) == 2 and isinstance(shape[1], int) else 0


def _looked_up(node: Node, scheme: str) -> str | None:
    if "embedding_bag" in ops.overload_of(node):
        return "ExecuTorch has no kernel for bags of lookups in a table of few bits"
    return None


_STATIC, _BOTH = ("static_int8",), ("static_int8", "dynamic_int8")
_CLAMPS = ("relu", "hardtanh")
_BETWEEN = "between int8 ops"
CAPABILITIES: tuple[Capability, ...] = (
    Capability("conv1d", _STATIC, "weighted", _CLAMPS, True),
    Capability("conv2d", _BOTH, "weighted", _CLAMPS, True, _weighted, "dynamic: not depthwise or grouped"),
    Capability("conv_transpose1d", _STATIC, "weighted", _CLAMPS, True, _weighted, "not grouped"),
    Capability("conv_transpose2d", _BOTH, "weighted", _CLAMPS, True, _weighted, "not grouped"),
    Capability("linear", (*_BOTH, *FEW_BITS), "weighted", _CLAMPS, True),
    Capability("embedding", LOOKUPS, "weighted", (), False, _looked_up, "lookups, not bags; by a portable kernel"),
    Capability("add", _STATIC, "activations", ("relu",), True, _two_tensors, "between int8 ops; alpha = 1"),
    Capability("sub", _STATIC, "activations", (), True, _two_tensors, "between int8 ops; alpha = 1"),
    Capability("mul", _STATIC, "activations", (), True, _two_tensors, _BETWEEN),
    Capability("mean", _STATIC, "activations", (), True, _spatial_mean, "4-D, last two axes"),
    Capability("adaptive_avg_pool2d", _STATIC, "activations", (), True, _global_pool, "to 1 x 1"),
    Capability("relu", _STATIC, "activations", (), True, reason=_BETWEEN),
    Capability("hardtanh", _STATIC, "activations", (), True, reason=_BETWEEN),
    Capability("max_pool2d", _STATIC, "shared", (), True, _plain_max_pool, "between int8 ops; stride <= window"),
    Capability("cat", _STATIC, "shared", (), True, reason=_BETWEEN),
    Capability("pad", _STATIC, "shared", (), True, _zero_pad, "zeros, in front of an int8 convolution"),
    Capability("reshape", _STATIC, "shared", (), True, _moved, "between int8 ops; not expand"),
    Capability("slice", _STATIC, "shared", (), True, _sliced, "between int8 ops; step 1"),
    *(Capability(op, reason=why) for op, why in _FLOAT.items()),
)

TARGET = Target(
    "executorch_xnnpack",
    "torchquant.backends.executorch_xnnpack",
    "torchquant.quantizers.xnnpack:XnnpackQuantizer",
    ".pte",
    SCHEMES,
    CAPABILITIES,
)
