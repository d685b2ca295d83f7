"""TernaryQuantizer: linears with weights -1, 0 and 1, for training (BitNet b1.58)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch.fx import Node

from torchquant.backends.executorch_xnnpack.capabilities import SCHEMES as XNNPACK_SCHEMES
from torchquant.backends.inductor_x86.capabilities import SCHEMES as X86_SCHEMES
from torchquant.backends.inductor_x86.capabilities import TARGET
from torchquant.formats.integer import TERNARY
from torchquant.fx import ops
from torchquant.observers.absmean import AbsMeanWeight
from torchquant.quantizers.engine import CapabilityQuantizer
from torchquant.types import Capability, Scheme, TensorSpec

__all__ = ["TernaryQuantizer"]

_FOR_XNNPACK = "ternary_xnnpack"
_ONLY_TRAINED = "ternary weights are for linears; leave it float, or take another Quantizer for it"


class TernaryQuantizer(CapabilityQuantizer):
    """Annotates linears: weights -1, 0 and 1 times their mean magnitude, activations of 8 bits chosen at run time.

    Rounding a trained network so destroys it: train with it (`is_qat=True`, `torchquant.qat.prepare`), and leave the
    last layer out (`exclude=["head"]`), as the paper does.

    Schemes: `ternary` is for `torchquant.backends.inductor_x86`, whose kernels multiply weights of 2 bits with
    activations of 8 bits that have a scale for each row. `ternary_xnnpack` is for
    `torchquant.backends.executorch_xnnpack`, which has no kernel of 2 bits: the weights are stored and multiplied in 8.

    Args:
        scheme: one of those above; None: the default.
        exclude, overrides, is_qat, observer: see `CapabilityQuantizer`.
    """

    target = TARGET
    default_scheme = "ternary"
    schemes: ClassVar[Mapping[str, Scheme]] = {
        "ternary": Scheme("ternary", X86_SCHEMES["w2a8"].activation, TensorSpec(TERNARY, symmetric=True)),
        _FOR_XNNPACK: Scheme(
            _FOR_XNNPACK,
            XNNPACK_SCHEMES["dynamic_int8"].activation,
            TensorSpec(TERNARY, symmetric=True, granularity="channel"),
        ),
    }
    capabilities: ClassVar[tuple[Capability, ...]] = (
        Capability("linear", ("ternary", _FOR_XNNPACK), "weighted"),
        *(Capability(kind.name, reason=_ONLY_TRAINED) for kind in ops.KINDS if kind.compute and kind.name != "linear"),
        *(
            Capability(kind.name, reason="in float, as the target's compiler has it")
            for kind in ops.KINDS
            if not (kind.compute or kind.moves)
        ),
    )

    def scheme_for(self, node: Node, scheme: str) -> tuple[str, str]:
        """The scheme, and for XNNPACK why its weights take 8 bits."""
        why = "XNNPACK has no kernel of 2-bit weights, so they are stored and multiplied in 8"
        return scheme, why if scheme == _FOR_XNNPACK else ""

    def _observer(self, tensor: TensorSpec, axis: int, is_weight: bool) -> Any:
        if not is_weight:
            return super()._observer(tensor, axis, is_weight)
        return AbsMeanWeight.with_args(channels=axis if tensor.granularity == "channel" else None)
