"""What runs quantized on x86 CPUs, by Inductor's kernels or ours, and why the rest stays float."""

from __future__ import annotations

from torch.fx import Node

from torchquant.formats.integer import INT7_NARROW, INT8_NARROW, UINT8
from torchquant.fx import ops
from torchquant.fx.batch_axes import lacks_batch_axis
from torchquant.lowering.target import Target
from torchquant.lowering.weight_schemes import weight_schemes
from torchquant.types import Capability, Scheme, TensorSpec

__all__ = ["CAPABILITIES", "SCHEMES", "TARGET", "only_ours"]


_WEIGHT = TensorSpec(INT8_NARROW, symmetric=True, granularity="channel")
_SEVEN_BITS = TensorSpec(INT7_NARROW, symmetric=True, granularity="channel")  # see "CPUs without VNNI" in docs/x86.md
_BYTES_BY_ROW = TensorSpec(INT8_NARROW, symmetric=True, granularity="token", dynamic=True)
SCHEMES = {
    "static_int8": Scheme("static_int8", TensorSpec(UINT8, symmetric=False), _WEIGHT),
    "dynamic_int8": Scheme("dynamic_int8", TensorSpec(UINT8, symmetric=False, dynamic=True), _WEIGHT),
    "static_int8_w7": Scheme("static_int8_w7", TensorSpec(UINT8, symmetric=False), _SEVEN_BITS),
    "dynamic_int8_w7": Scheme("dynamic_int8_w7", TensorSpec(UINT8, symmetric=False, dynamic=True), _SEVEN_BITS),
    **weight_schemes(activations=(None, _BYTES_BY_ROW)),
}
_STATIC, _DYNAMIC = ("static_int8", "static_int8_w7"), ("dynamic_int8", "dynamic_int8_w7")
_FEW_BITS = tuple(name for name in SCHEMES if name.startswith("w"))

_FLOAT = {
    "conv3d": "neither torchquant nor Inductor has an int8 kernel of this convolution",
    "conv_transpose3d": "neither torchquant nor Inductor has an int8 kernel of this convolution",
    "matmul": "Inductor has no int8 kernel for a product of two activations",
    "addmm": "Inductor has no int8 kernel for a product of two activations",
    "einsum": "Inductor has no int8 kernel for a product of two activations",
    "attention": "attention runs in a float kernel; there is no int8 one",
    "bilinear": "Inductor has no int8 kernel for a bilinear form",
    "recurrent_cell": "the int8 kernel takes whole layers (nn.LSTM, nn.GRU, nn.RNN), not single steps",
}
_ELEMENTWISE = "in float, fused by Inductor"


def _batched(node: Node, scheme: str) -> str | None:
    """Inductor's int8 patterns want a batch dimension: 4-D for conv2d, 3-D for conv1d, 2-D or more for linear."""
    if scheme in _FEW_BITS:
        return None
    return "its input has no batch dimension" if lacks_batch_axis(node) else None


def only_ours(node: Node) -> bool:
    """Whether torchquant's kernels alone run an op in int8.

    Inductor infers a wrong length for a conv1d whose kernel is longer than 1, and ignores that a convolution is
    transposed.
    """
    weight = ops.argument(node, 1)
    if ops.op_name(node) == "conv1d" and weight is not None:
        shape = ops.shape_of(weight)  # of which a dequantize op may have none
        model = node.graph.owning_module
        if shape is None and model is not None and ops.is_constant(weight):
            shape = tuple(ops.constant_value(model, weight).shape)
        return shape is None or shape[-1] != 1
    return ops.op_name(node) in OURS_ALONE


def _sized(node: Node, scheme: str) -> str | None:
    """torchquant's kernels, where they alone run an op, want sizes that are known when it is lowered."""
    shape = ops.shape_of(node.args[0])  # type: ignore[arg-type]
    if only_ours(node) and (shape is None or not all(isinstance(s, int) for s in shape[1:])):
        return "its height, width or length is dynamic, and the int8 kernels want to know it when the model is lowered"
    return _batched(node, scheme)


def _looked_up(node: Node, scheme: str) -> str | None:
    bag = "embedding_bag" in ops.overload_of(node)
    return "there is no kernel for bags of lookups in a table of few bits" if bag else None


def _recurrent(node: Node, scheme: str) -> str | None:
    layers = ops.layer_parameters(node)
    if len(layers[0]) % 2:
        return "there is no kernel for recurrent layers that project their states (proj_size)"
    weight = SCHEMES[scheme].weight
    group = 1 if weight is None or weight.group_size is None else weight.group_size
    inputs = {ops.shape_of(w)[1] for own in layers for w in own[:2]}  # type: ignore[index]
    return f"its {sorted(inputs)} inputs are no whole groups of {group}" if any(n % group for n in inputs) else None


OURS_ALONE = ("conv_transpose1d", "conv_transpose2d")
CAPABILITIES: tuple[Capability, ...] = (
    Capability("conv1d", _STATIC, "weighted", condition=_sized, reason="known length, or kernel size 1"),
    Capability("conv2d", _STATIC, "weighted", condition=_batched, reason="with a batch dimension"),
    *(Capability(op, _STATIC, "weighted", condition=_sized, reason="known sizes") for op in OURS_ALONE),
    Capability(
        "linear",
        (*_STATIC, *_DYNAMIC, *_FEW_BITS),
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
    Capability(
        "recurrent",
        tuple(n for n in _FEW_BITS if SCHEMES[n].activation is None),
        "weighted",
        condition=_recurrent,
        reason="weights alone; without projections",
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
