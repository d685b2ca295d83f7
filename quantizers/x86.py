"""X86Quantizer: what Inductor runs in int8 on x86 CPUs."""

from torchquant.backends.inductor_x86 import CAPABILITIES, SCHEMES, TARGET
from torchquant.quantizers.engine import CapabilityQuantizer

__all__ = ["X86Quantizer"]


class X86Quantizer(CapabilityQuantizer):
    """Annotates for `torchquant.backends.inductor_x86`.

    Schemes: `static_int8` (the default) quantizes convolutions and linears with uint8 activations per
    tensor and int8 weights per channel. `residual_int8` also lets additions read an operand as the bytes that
    a convolution or linear reads anyway: a residual stream then costs a byte an element instead of four, and a
    rounding in each block. `dynamic_int8` quantizes linears only, the activations' scales computed at run time.
    """

    target = TARGET
    capabilities = CAPABILITIES
    schemes = SCHEMES
    default_scheme = "static_int8"
