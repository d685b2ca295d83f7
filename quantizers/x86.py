"""X86Quantizer: what runs quantized on x86 CPUs."""

from torch.fx import Node

from torchquant.backends.inductor_x86.capabilities import TARGET
from torchquant.fx import ops
from torchquant.quantizers.engine import CapabilityQuantizer

__all__ = ["X86Quantizer"]


_INTEGERS, _WEIGHTS = ("static_int8", "dynamic_int8"), "w8_symmetric"


class X86Quantizer(CapabilityQuantizer):
    """Annotates for `torchquant.backends.inductor_x86`.

    Schemes: `static_int8` (the default) quantizes convolutions and linears with uint8 activations per tensor and int8
    weights per channel; `dynamic_int8` linears only, with the activations' scales computed at run time. In both,
    recurrent layers get int8 weights per channel.

    `w{8,4,3,2}_g{256,128,64,32,16}`: linears and embeddings with weights of so many bits, a scale and a zero point for
    each group of input features, or without `_g...` for each output; `w4_symmetric_g32` and the like have no zero
    points. Activations stay floats; in `w4a8_g32` and the like those of linears have 8 bits and a scale for each row,
    chosen at run time. A weight whose inputs are no whole groups gets the largest smaller group that fits, and the
    report says so.
    """

    target = TARGET

    def scheme_for(self, node: Node, scheme: str) -> tuple[str, str]:
        """Smaller groups where the input is no whole groups; for lookups, which read no activations, weights alone.

        Likewise for recurrent layers, whose kernel takes activations of 16 bits.
        """
        weights, name = scheme.replace("a8", "", 1), ops.op_name(node)
        if name == "recurrent" and scheme in _INTEGERS and _WEIGHTS in self.schemes:
            return _WEIGHTS, "its activations have 16 bits inside the kernel"
        if name in ("embedding", "recurrent") and weights in self.schemes:
            scheme = weights
        return self.smaller_groups(node, scheme)
