"""NVIDIA GPUs: packed weights and int8 or float8 products as opaque ops of ours, the rest compiled by Inductor."""

from __future__ import annotations

from torch.fx import Node

from torchquant.formats import FLOAT8, INT4, INT8, INT8_NARROW
from torchquant.fx import ops
from torchquant.types import Capability, Scheme, TensorSpec

__all__ = ["CAPABILITIES", "SCHEMES", "TARGET"]

TARGET = "inductor_cuda"
_INT8_CHANNEL = TensorSpec(INT8_NARROW, symmetric=True, granularity="channel")
_INT8_TOKEN = TensorSpec(INT8_NARROW, symmetric=True, granularity="token", dynamic=True)
_FLOAT8_CHANNEL = TensorSpec(FLOAT8, symmetric=True, granularity="channel")
_FLOAT8_TOKEN = TensorSpec(FLOAT8, symmetric=True, granularity="token", dynamic=True)
_FLOAT8_TENSOR = TensorSpec(FLOAT8, symmetric=True)
_FLOAT8_DYNAMIC = TensorSpec(FLOAT8, symmetric=True, dynamic=True)


def _int4(group_size: int, symmetric: bool) -> TensorSpec:
    return TensorSpec(INT4, symmetric=symmetric, granularity="group", group_size=group_size)


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("w4a16", None, _int4(128, symmetric=True)),
        Scheme("w4a16_g64", None, _int4(64, symmetric=True)),
        Scheme("w4a16_g32", None, _int4(32, symmetric=True)),
        Scheme("w4a16_asymmetric", None, _int4(128, symmetric=False)),
        Scheme("w4a16_asymmetric_g64", None, _int4(64, symmetric=False)),
        Scheme("w4a16_asymmetric_g32", None, _int4(32, symmetric=False)),
        Scheme("w8a16", None, _INT8_CHANNEL),
        Scheme("dynamic_int8", _INT8_TOKEN, _INT8_CHANNEL),
        Scheme("static_int8", TensorSpec(INT8, symmetric=False), _INT8_CHANNEL),
        Scheme("dynamic_fp8", _FLOAT8_TOKEN, _FLOAT8_CHANNEL),
        Scheme("dynamic_fp8_tensor", _FLOAT8_DYNAMIC, _FLOAT8_TENSOR),
        Scheme("static_fp8", _FLOAT8_TENSOR, _FLOAT8_CHANNEL),
        Scheme("static_fp8_tensor", _FLOAT8_TENSOR, _FLOAT8_TENSOR),
    )
}

_NO_CONVOLUTION = "torch exposes no int8 or float8 convolution on GPUs"
_TWO_ACTIVATIONS = "it multiplies two activations; float16 and bfloat16 run on tensor cores as they are"
_FLOAT = {
    "conv3d": _NO_CONVOLUTION,
    "conv_transpose1d": _NO_CONVOLUTION,
    "conv_transpose2d": _NO_CONVOLUTION,
    "conv_transpose3d": _NO_CONVOLUTION,
    "matmul": _TWO_ACTIVATIONS,
    "addmm": _TWO_ACTIVATIONS,
    "einsum": _TWO_ACTIVATIONS,
    "attention": "attention runs in its own float kernel",
    "embedding": "a lookup reads a few rows of its table only, so there is nothing to gain",
    "recurrent": "there is no int8 or float8 kernel for recurrent layers",
}
_ELEMENTWISE = "in float, fused by Inductor"


def _whole_groups(node: Node, scheme: str) -> str | None:
    """The input axis must be whole groups."""
    weight, shape = SCHEMES[scheme].weight, ops.shape_of(node.args[1])  # type: ignore[arg-type]
    size = weight.group_size if weight is not None else None
    if size is None or shape is None or shape[1] % size == 0:
        return None
    return f"its {shape[1]} input features are no multiple of the group size {size}; choose smaller groups, or w8a16"


def _is_product(node: Node, scheme: str) -> str | None:
    """A convolution of kernel size 1 is a matrix product; no other is."""
    kernel, image = (ops.shape_of(n) for n in node.args[:2][::-1])  # type: ignore[arg-type]
    given = ops.arguments(node)
    if kernel is None or any(size != 1 for size in kernel[2:]):
        return f"{_NO_CONVOLUTION}, only a matrix product for a kernel of size 1"
    if given.get("groups", 1) != 1:
        return "a grouped convolution is bound by memory, and no matrix product"
    padding = given.get("padding", 0)
    if padding not in ("same", "valid") and any(padding if isinstance(padding, (list, tuple)) else [padding]):
        return "a padded convolution of kernel size 1 is no matrix product"
    if image is None or len(image) != len(kernel):
        return "its input has no batch dimension"
    return _whole_groups(node, scheme)


_ALL = tuple(SCHEMES)
_KERNEL_1 = "kernel size 1, one group, no padding: a matrix product"
CAPABILITIES: tuple[Capability, ...] = (
    Capability("linear", _ALL, "weighted", condition=_whole_groups, reason="whole groups of input features"),
    Capability("conv1d", _ALL, "weighted", condition=_is_product, reason=_KERNEL_1),
    Capability("conv2d", _ALL, "weighted", condition=_is_product, reason=_KERNEL_1),
    *(Capability(op, reason=why) for op, why in _FLOAT.items()),
    *(Capability(k.name, reason=_ELEMENTWISE) for k in ops.KINDS if not (k.compute or k.moves)),
)
