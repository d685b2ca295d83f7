"""What our kernels multiply on NVIDIA GPUs, and why the rest stays float."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from torchquant.formats.integer import FLOAT8, INT4, INT8, INT8_NARROW
from torchquant.fx import ops
from torchquant.fx.windows import window_of
from torchquant.lowering.target import Target
from torchquant.types import Capability, Scheme, TensorSpec

__all__ = ["CAPABILITIES", "FLOATS", "SCHEMES", "TARGET"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
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

_NO_CONVOLUTION = "neither torch nor torchquant has an int8 or float8 kernel of this convolution for GPUs"
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
    "bilinear": "it multiplies two activations; there is no int8 or float8 kernel for it",
    **dict.fromkeys(("recurrent", "recurrent_cell"), "there is no int8 or float8 kernel for recurrent layers"),
}
_ELEMENTWISE = "in float, fused by Inductor"


def _whole_groups(node: Node, scheme: str) -> str | None:
    """The input axis must be whole groups."""
    weight, shape = SCHEMES[scheme].weight, ops.shape_of(node.args[1])  # type: ignore[arg-type]
    size = weight.group_size if weight is not None else None
    if size is None or shape is None or shape[1] % size == 0:
        return None
    return f"its {shape[1]} input features are no multiple of the group size {size} nor of 32; choose w8a16"


def _has_kernel(node: Node, scheme: str) -> str | None:
    """A convolution of one group multiplies codes by codes; with weights alone only where it is a matrix product."""
    kernel, image = (ops.shape_of(n) for n in node.args[:2][::-1])  # type: ignore[arg-type]
    if kernel is None or image is None or len(image) != len(kernel):
        return "its input has no batch dimension"
    if ops.arguments(node).get("groups", 1) != 1:
        return "a grouped convolution is bound by memory, and no matrix product"
    if SCHEMES[scheme].activation is None and not window_of(node, kernel[2:]).one_pixel:  # type: ignore[arg-type]
        return "only a matrix product (kernel size 1, no padding) has a kernel that unpacks weights: quantize both"
    return _whole_groups(node, scheme)


_ALL = tuple(SCHEMES)
_ONE_GROUP = "one group; kernel size 1 and no padding where weights alone are quantized"
CAPABILITIES: tuple[Capability, ...] = (
    Capability("linear", _ALL, "weighted", condition=_whole_groups, reason="whole groups of input features"),
    Capability("conv1d", _ALL, "weighted", condition=_has_kernel, reason=_ONE_GROUP),
    Capability("conv2d", _ALL, "weighted", condition=_has_kernel, reason=_ONE_GROUP),
    *(Capability(op, reason=why) for op, why in _FLOAT.items()),
    *(Capability(k.name, reason=_ELEMENTWISE) for k in ops.KINDS if not (k.compute or k.moves)),
)


def _here() -> tuple[dict[str, Any], str]:
    if torch.cuda.is_available():
        return {}, ""
    return {"device": "cpu"}, "torch sees no GPU here, so the program is checked with reference kernels on the CPU"


TARGET = Target(
    "inductor_cuda",
    "torchquant.backends.inductor_cuda",
    "torchquant.quantizers.cuda:CudaQuantizer",
    ".pt2",
    SCHEMES,
    CAPABILITIES,
    FLOATS,
    here=_here,
)
