"""X86Quantizer: what Inductor runs in int8 on x86 CPUs."""

from torchquant.backends.inductor_x86.capabilities import TARGET
from torchquant.quantizers.engine import CapabilityQuantizer

__all__ = ["X86Quantizer"]


class X86Quantizer(CapabilityQuantizer):
    """Annotates for `torchquant.backends.inductor_x86`.

    Schemes: `static_int8` (the default) quantizes convolutions and linears with uint8 activations per
    tensor and int8 weights per channel; `dynamic_int8` linears only, with the activations' scales
    computed at run time.
    """

    target = TARGET
