"""CudaQuantizer: what NVIDIA GPUs run with packed weights, in int8 or in float8."""

from torch.fx import Node

from torchquant.backends.inductor_cuda.capabilities import TARGET
from torchquant.fx import ops
from torchquant.quantizers.engine import CapabilityQuantizer

__all__ = ["CudaQuantizer"]


class CudaQuantizer(CapabilityQuantizer):
    """Annotates for `torchquant.backends.inductor_cuda`: linears, and 1-D and 2-D convolutions of one group.

    Where weights alone are quantized, convolutions have kernel size 1 and no padding: they are matrix products then.

    `dynamic_int8` (the default): int8 weights per channel, int8 activations with a scale for each token, chosen at run
    time; for each pixel of a convolution of kernel size 1, and for the whole input of a larger one. It needs no data
    and no float8 hardware, is close to float on most networks, and is faster than bfloat16 both for one token (half the
    bytes) and for many (twice the operations).

    `w4a16`, `w4a16_g64`, `w4a16_g32` and `w4a16_asymmetric`, `..._g64`, `..._g32`: int4 weights in groups of 128, 64 or
    32 input features, for generation token by token; use AdaRound or another solver with them. A layer whose input is
    no multiple of the group gets the largest smaller group that fits, and the report says so.
    `w8a16`: int8 weights alone. `static_int8`: activations per tensor, with ranges from calibration.
    `dynamic_fp8`, `dynamic_fp8_tensor`, `static_fp8`, `static_fp8_tensor`: float8 (e4m3) weights and activations,
    scaled by row or by tensor; activations' scales at run time or from calibration (the largest magnitude, whatever
    `observer` is). They need a GPU of compute capability 8.9 or more.

    Models may be float32, bfloat16 or float16.

    Args:
        scheme: one of those above; None: the default.
        exclude, overrides, is_qat, observer: see `CapabilityQuantizer`.
    """

    target = TARGET
    default_scheme = "dynamic_int8"

    def scheme_for(self, node: Node, scheme: str) -> tuple[str, str]:
        """The same with smaller groups where the input is no whole groups."""
        return (
            self.smaller_groups(node, scheme) if ops.op_name(node) in ("linear", "conv1d", "conv2d") else (scheme, "")
        )
