"""X86Quantizer: what runs quantized on x86 CPUs."""

from typing import Any, Literal

from torch.fx import Node

from torchquant.backends.inductor_x86.capabilities import TARGET
from torchquant.errors import SchemeError
from torchquant.fx import ops
from torchquant.ops.x86 import cpu
from torchquant.quantizers.engine import CapabilityQuantizer

__all__ = ["X86Quantizer"]


_INTEGERS = ("static_int8", "dynamic_int8", "static_int8_w7", "dynamic_int8_w7")
_WEIGHTS = "w8_symmetric"  # of recurrent layers in these


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

    Args:
        scheme: one of those above; None: the default.
        options: `exclude`, `overrides`, `is_qat`, `observer`, see `CapabilityQuantizer`.
        weights: bits of the weights in `static_int8` and `dynamic_int8`: 8; 7, which CPUs without VNNI multiply in
            fewer instructions, in the schemes `static_int8_w7` and `dynamic_int8_w7`; or "auto": 7 on such a CPU.
    """

    target = TARGET

    def __init__(self, scheme: str | None = None, *, weights: Literal[7, 8, "auto"] = 8, **options: Any) -> None:
        super().__init__(scheme, **options)
        if weights not in (7, 8, "auto"):
            raise SchemeError(
                f"weights of {weights!r} bits: X86Quantizer takes 7, 8 or 'auto'; fewer are schemes, e.g. 'w4_g64'"
            )
        without_vnni = weights == "auto" and not cpu.has_vnni()
        self._seven_bits = "this CPU has no VNNI" if without_vnni else "asked for" if weights == 7 else ""

    def scheme_for(self, node: Node, scheme: str) -> tuple[str, str]:
        """Smaller groups where the input is no whole groups; for lookups, which read no activations, weights alone.

        Likewise for recurrent layers, whose kernel takes activations of 16 bits.
        """
        weights, name = scheme.replace("a8", "", 1), ops.op_name(node)
        if name == "recurrent" and scheme in _INTEGERS and _WEIGHTS in self.schemes:
            return _WEIGHTS, "its activations have 16 bits inside the kernel"
        narrow = f"{scheme}_w7"
        if self._seven_bits and narrow in self.schemes:
            return narrow, f"weights of 7 bits, {self._seven_bits}"
        if name in ("embedding", "recurrent") and weights in self.schemes:
            scheme = weights
        return self.smaller_groups(node, scheme)
