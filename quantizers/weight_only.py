"""WeightOnlyQuantizer: weights in 8, 4, 3 or 2 bits, for whatever runtime decodes them."""

import torch
from torch.fx import Node

from torchquant.fx import ops
from torchquant.fx.blocks import SOLVABLE
from torchquant.lowering.target import Target
from torchquant.lowering.weight_schemes import weight_schemes
from torchquant.quantizers.engine import CapabilityQuantizer
from torchquant.types import Capability

__all__ = ["TARGET", "WeightOnlyQuantizer"]

_SCHEMES = weight_schemes()
TARGET = Target(
    "weight_only",
    "",
    "torchquant.quantizers.weight_only:WeightOnlyQuantizer",
    ".pt2",
    _SCHEMES,
    (
        *(Capability(op, tuple(_SCHEMES), "weighted") for op in (*SOLVABLE, "embedding")),
        *(
            Capability(kind.name, reason="it has no weight that could be stored in fewer bits")
            for kind in ops.KINDS
            if kind.weight is None and not kind.moves
        ),
        Capability("bilinear", reason="its weight has three axes, and no solver here knows it"),
    ),
    (torch.float32, torch.bfloat16, torch.float16),
)


class WeightOnlyQuantizer(CapabilityQuantizer):
    """Annotates the weights of linears, convolutions and embeddings, and no activation. It belongs to no target.

    Args:
        scheme: `w{8,4,3,2}_g{256,128,64,32,16}`: affine grids, a scale and a zero point for so many neighbouring input
            features; without `_g...`: for each output channel (of an embedding: for each row); `w4_symmetric_g64` and
            the like: no zero points. A weight whose inputs are no whole groups gets the largest smaller group that
            fits, or one scale a channel, and the report says so.
        exclude, overrides, is_qat, observer: see `CapabilityQuantizer`. Other bits for some layers, say for embeddings:
            `overrides={"op:embedding": "w8"}`.

    Models may be float32, bfloat16 or float16.
    """

    target = TARGET
    default_scheme = "w4_g64"

    def scheme_for(self, node: Node, scheme: str) -> tuple[str, str]:
        """The same with smaller groups where the input is no whole groups."""
        return self.smaller_groups(node, scheme)
