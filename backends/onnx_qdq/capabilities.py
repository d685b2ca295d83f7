"""What ONNX Runtime computes in integers on CPUs, under which conditions, and why the rest stays float."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.fx import Node

from torchquant.formats.integer import FLOAT8, INT7_NARROW, INT8, INT8_NARROW, UINT8
from torchquant.fx import ops
from torchquant.fx.windows import is_spatial_pad
from torchquant.lowering.target import Target
from torchquant.lowering.weight_schemes import weight_schemes
from torchquant.ops.x86.cpu import has_vnni
from torchquant.types import Capability, Scheme, TensorSpec

__all__ = ["CAPABILITIES", "REDUCED", "SCHEMES", "TARGET", "TENSORRT", "is_global_pool"]

REDUCED = "_reduced_range"  # ending of the schemes with weights of 7 bits
TENSORRT = ("tensorrt_int8", "tensorrt_fp8")
_BYTES, _CODES = TensorSpec(UINT8, symmetric=False), TensorSpec(INT8_NARROW, symmetric=True, granularity="channel")
_BALANCED, _FLOATS = TensorSpec(INT8, symmetric=True), TensorSpec(FLOAT8, symmetric=True)
_SEVEN_BITS = replace(_CODES, format=INT7_NARROW)
_FEW_BITS = weight_schemes((8, 4, 2), (128, 64, 32, 16))
SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("static_int8", _BYTES, _CODES),
        Scheme(f"static_int8{REDUCED}", _BYTES, _SEVEN_BITS),
        Scheme("dynamic_int8", replace(_BYTES, dynamic=True), _CODES),
        Scheme(f"dynamic_int8{REDUCED}", replace(_BYTES, dynamic=True), _SEVEN_BITS),
        Scheme("tensorrt_int8", _BALANCED, _CODES),
        Scheme("tensorrt_fp8", _FLOATS, replace(_FLOATS, granularity="channel")),
        *_FEW_BITS.values(),
    )
}
_STATIC = ("static_int8", f"static_int8{REDUCED}")
_DYNAMIC = ("dynamic_int8", f"dynamic_int8{REDUCED}")
_WEIGHTS = tuple(_FEW_BITS)
_CLAMPS = ("relu", "hardtanh")
_BETWEEN = "between int8 ops"

_TRANSPOSED = "ONNX Runtime has no integer transposed convolution on CPUs"
_TWO = "a product of two activations is more accurate in float, and is a small part of the work"
_FUNCTION = "ONNX Runtime computes this function in float"
_FLOAT = {
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _TRANSPOSED),
    **dict.fromkeys(("matmul", "addmm", "einsum", "attention"), _TWO),
    "bilinear": "ONNX has no bilinear form",
    **dict.fromkeys(("recurrent", "recurrent_cell"), "torch writes a recurrent layer with float weights"),
    "relu": "behind an integer convolution or sum the codes imply it; elsewhere it is float",
    "hardtanh": "behind an integer convolution or sum the codes imply it; elsewhere it is float",
    "avg_pool": "ONNX Runtime's integer average rounds in another way, and costs 40 dB",
    "sub": "ONNX Runtime has no integer subtraction",
}


def _two_tensors(node: Node, scheme: str) -> str | None:
    if not all(isinstance(a, Node) for a in node.args[:2]):
        return "its other operand is a number"
    return "its alpha is not 1" if node.kwargs.get("alpha", 1) != 1 else None


def is_global_pool(node: Node) -> bool:
    """Whether an op averages each channel of images (n, c, h, w) to one pixel."""
    name, arguments, rank = ops.op_name(node), ops.arguments(node), len(ops.shape_of(node) or ())
    if name == "adaptive_avg_pool2d":
        return rank == 4 and list(arguments["output_size"]) == [1, 1]
    if name != "mean" or arguments.get("dtype") is not None or rank != (4 if arguments.get("keepdim") else 2):
        return False
    return sorted(d % 4 for d in arguments.get("dim") or ()) == [2, 3]


def _pooled(node: Node, scheme: str) -> str | None:
    return None if is_global_pool(node) else "only a mean over whole images has an integer kernel"


def _padded(node: Node, scheme: str) -> str | None:
    known = is_spatial_pad(node) and all(ops.op_name(user) in ("conv1d", "conv2d") for user in node.users)
    return None if known else "only zeros in front of a convolution are padded in integers, as part of it"


def _looked_up(node: Node, scheme: str) -> str | None:
    return "a bag of lookups decodes its whole table" if "embedding_bag" in ops.overload_of(node) else None


def _convolved(node: Node, scheme: str) -> str | None:
    shape, weight = (ops.shape_of(n) for n in node.args[:2])  # type: ignore[arg-type]
    same = shape is None or weight is None or len(shape) == len(weight)
    return None if same else "its input has no batch dimension"


_KERNELS = ("static_int8", f"static_int8{REDUCED}", *TENSORRT)
CAPABILITIES: tuple[Capability, ...] = (
    *(
        Capability(f"conv{rank}d", _KERNELS, "weighted", _CLAMPS, True, _convolved, "with a batch dimension")
        for rank in (1, 2, 3)
    ),
    Capability("linear", (*_KERNELS, *_DYNAMIC, *_WEIGHTS), "weighted"),
    Capability("embedding", _WEIGHTS, "weighted", (), False, _looked_up, "lookups, not bags of them"),
    Capability("add", _STATIC, "activations", _CLAMPS, True, _two_tensors, _BETWEEN),
    Capability("mul", _STATIC, "activations", _CLAMPS, True, _two_tensors, _BETWEEN),
    Capability("mean", _STATIC, "activations", (), True, _pooled, "of whole images, between int8 ops"),
    Capability("adaptive_avg_pool2d", _STATIC, "activations", (), True, _pooled, "to 1 x 1, between int8 ops"),
    Capability("sigmoid", _STATIC, "activations", (), True, reason=_BETWEEN),
    Capability("leaky_relu", _STATIC, "activations", (), True, reason=_BETWEEN),
    Capability("max_pool2d", _STATIC, "shared", (), True, reason=_BETWEEN),
    Capability("cat", _STATIC, "shared", (), True, reason=_BETWEEN),
    Capability("pad", _STATIC, "shared", (), True, _padded, "zeros, in front of an int8 convolution"),
    Capability("reshape", _STATIC, "shared", (), True, reason=_BETWEEN),
    Capability("slice", _STATIC, "shared", (), True, reason=_BETWEEN),
    *(Capability(op, reason=why) for op, why in _FLOAT.items()),
)
_NAMED = {row.op for row in CAPABILITIES}
CAPABILITIES += tuple(Capability(k.name, reason=_FUNCTION) for k in ops.KINDS if k.name not in _NAMED)


def _here() -> tuple[dict[str, Any], str]:
    if has_vnni():  # others add products of bytes in 16 bits, which overflow
        return {}, ""
    return {}, f"this CPU has no VNNI, where 8-bit weights overflow: take --scheme static_int8{REDUCED}"


TARGET = Target(
    "onnx_qdq",
    "torchquant.backends.onnx_qdq",
    "torchquant.quantizers.onnx:OnnxQuantizer",
    ".onnx",
    SCHEMES,
    CAPABILITIES,
    here=_here,
)
