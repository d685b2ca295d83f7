"""How large the values of a region can become, whatever it is given."""

from __future__ import annotations

import math

from torch.fx import Node

from torchquant.fx import ops
from torchquant.ops.x86 import matching
from torchquant.ops.x86.plan import Quantization
from torchquant.ops.x86.region import Region

__all__ = ["Bounds"]

_FINITE = 1e30  # a bound far enough from infinity for what float32 rounds on the way


class Bounds:
    """Bounds on the magnitudes of a region's values, found where one is first asked for."""

    def __init__(self, region: Region) -> None:
        self._region = region
        self._largest: dict[Node, float] = {}

    def is_finite(self, pool: Node) -> bool:
        """Whether no input of the region makes what a max pool reads infinite or NaN.

        Then quantizing may come first. Where a number is NaN it may not: NaN is the largest, and its code is 0.
        """
        if not self._largest:
            for node in self._region.nodes:
                self._largest[node] = self._bound(node)
        return self._largest.get(pool.all_input_nodes[0], math.inf) < _FINITE

    def _bound(self, node: Node) -> float:
        """A bound on the magnitude of a node's values, from those of what it reads; infinity if there is none."""
        name = ops.op_name(node)
        if ops.is_dequantize(node):
            grid = self._region.finder.grid(node)
            if not isinstance(grid, Quantization):
                return math.inf
            return 255 * grid.scale
        inputs = [self._largest.get(n, math.inf) for n in matching.tensors_of(node) if n not in self._region.constants]
        if name in matching.PRODUCTS:
            return self._largest_sum(node, inputs[0])
        if factor := matching.factor_of(self._region.graph, node):
            return inputs[0] * float(factor[1].abs().max())
        if activation := matching.activation_of(node):
            bounds = (activation["low"], activation["high"])
            return max([inputs[0] + 1, *(abs(b) for b in bounds if math.isfinite(b))])
        if name == "add":
            return 2 * max(inputs)
        if name == "mul":
            return max(inputs) * max(inputs)
        kept = self._region.is_alias(node) or name in ("pad", "max_pool2d", "mean", "adaptive_avg_pool2d")
        return inputs[0] if kept else math.inf

    def _largest_sum(self, node: Node, largest: float) -> float:
        weight = self._region.finder.weight(node)
        assert weight is not None
        bias = self._region.bias(node, len(weight.codes))
        sums = weight.codes.reshape(len(weight.codes), -1).double().abs().sum(1) * weight.scale.abs()
        largest_sum = float((sums * largest + bias.abs()).max())
        return largest_sum if math.isfinite(largest_sum) else math.inf
