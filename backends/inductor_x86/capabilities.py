"""What runs quantized on x86 CPUs, by Inductor's kernels or ours, and why the rest stays float."""

from __future__ import annotations

from torch.fx import Node

from torchquant.formats.integer import INT8_NARROW, UINT8
from torchquant.fx import ops
from torchquant.lowering.target import Target
from torchquant.lowering.weight_schemes import weight_schemes
from torchquant.types import Capability, Scheme, TensorSpec

__all__ = ["CAPABILITIES", "LONG_KERNEL", "SCHEMES", "TARGET"]


_WEIGHT = TensorSpec(INT8_NARROW, symmetric=True, granularity="channel")
_BYTES_BY_ROW = TensorSpec(INT8_NARROW, symmetric=True, granularity="token", dynamic=True)
SCHEMES = {
    "static_int8": Scheme("static_int8", TensorSpec(UINT8, symmetric=False), _WEIGHT),
    "dynamic_int8": Scheme("dynamic_int8", TensorSpec(UINT8, symmetric=False, dynamic=True), _WEIGHT),
    **weight_schemes(activations=(None, _BYTES_BY_ROW)),
}
_FEW_BITS = tuple(name for name in SCHEMES if name.startswith("w"))

_FLOAT = {
    "conv3d": "Inductor has no int8 pattern for conv3d",
    "conv_transpose1d": "Inductor's int8 pattern ignores that a convolution is transposed and computes a wrong result",
    "conv_transpose2d": "Inductor's int8 pattern ignores that a convolution is transposed and computes a wrong result",
    "conv_transpose3d": "Inductor's int8 pattern ignores that a convolution is transposed and computes a wrong result",
    "matmul": "Inductor has no int8 kernel for a product of two activations",
    "addmm": "Inductor has no int8 kernel for a product of two activations",
    "einsum": "Inductor has no int8 kernel for a product of two activations",
    "attention": "attention runs in a float kernel; there is no int8 one",
    "bilinear": "Inductor has no int8 kernel for a bilinear form",
    "recurrent": "Inductor has no int8 kernel for recurrent layers",
}
_ELEMENTWISE = "in float, fused by Inductor"


def _batched(node: Node, scheme: str) -> str | None:
    """Inductor's int8 patterns want a batch dimension: 4-D for conv2d, 3-D for conv1d, 2-D or more for linear."""
    if scheme in _FEW_BITS:
        return None
    least = {"conv1d": 3, "conv2d": 4, "linear": 2}[ops.op_name(node)]
    shape = ops.shape_of(node.args[0])  # type: ignore[arg-type]
    return "its input has no batch dimension" if shape is not None and len(shape) < least else None


def _pointwise(node: Node, scheme: str) -> str | None:
    """A conv1d of kernel size 1; `torch.ops.onednn.qconv_pointwise` infers the length of others wrongly."""
    shape = ops.shape_of(node.args[1])  # type: ignore[arg-type]
    return LONG_KERNEL if shape is None or shape[-1] != 1 else _batched(node, scheme)


def _looked_up(node: Node, scheme: str) -> str | None:
    bag = "embedding_bag" in ops.overload_of(node)
    return "there is no kernel for bags of lookups in a table of few bits" if bag else None


LONG_KERNEL = "Inductor infers a wrong output length for an int8 conv1d whose kernel is longer than 1"
CAPABILITIES: tuple[Capability, ...] = (
    Capability("conv1d", ("static_int8",), "weighted", condition=_pointwise, reason="kernel size 1"),
    Capability("conv2d", ("static_int8",), "weighted", condition=_batched, reason="with a batch dimension"),
    Capability(
        "linear",
        ("static_int8", "dynamic_int8", *_FEW_BITS),
        "weighted",
        condition=_batched,
        reason="with a batch dimension",
    ),
    Capability(
        "embedding",
        tuple(n for n in _FEW_BITS if SCHEMES[n].activation is None),
        "weighted",
        condition=_looked_up,
        reason="lookups, not bags of them",
    ),
    *(Capability(op, reason=why) for op, why in _FLOAT.items()),
    *(Capability(k.name, reason=_ELEMENTWISE) for k in ops.KINDS if not (k.compute or k.moves)),
)

TARGET = Target(
    "inductor_x86",
    "torchquant.backends.inductor_x86",
    "torchquant.quantizers.x86:X86Quantizer",
    ".pt2",
    SCHEMES,
    CAPABILITIES,
    is_code=True,  # a package holds shared libraries
)
