"""Bias correction: take the mean of the output error that weight rounding causes out of the bias.

Nagel, van Baalen, Blankevoort, Welling: "Data-Free Quantization Through Weight Equalization and Bias
Correction", ICCV 2019, section 4.2; with the input mean measured instead of derived from BatchNorm.

    W (out, in, ...)     the float weight        Wq   the weight as decoded from its codes
    E[x]                 the mean input over the calibration data
    b <- b - E[(Wq - W) * x] = b - (Wq - W) * E[x]

Convolution is linear, so one convolution of the mean input gives the mean error exactly, padding included: the
cost is a mean at each site, and does not grow with the data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchquant.formats import decode, encode
from torchquant.fx import ops, passes
from torchquant.fx.sites import observer_of
from torchquant.types import QParams

__all__ = ["BiasCorrection", "RunningMean"]

_BIASED = ("conv1d", "conv2d", "conv3d", "linear")


@dataclass
class RunningMean:
    """Mean of a tensor over its first axis (or all but the last, for `features`), by shape of the rest."""

    features: bool
    sums: dict[torch.Size, tuple[torch.Tensor, int]] = field(default_factory=dict)

    def update(self, value: torch.Tensor) -> None:
        """Add one batch (batch, ...)."""
        value = value.detach().flatten(0, -2) if self.features else value.detach()
        total, count = self.sums.get(value.shape[1:], (torch.zeros(value.shape[1:], dtype=torch.float64), 0))
        self.sums[value.shape[1:]] = total + value.sum(0, dtype=torch.float64), count + len(value)

    def means(self) -> list[tuple[torch.Tensor, int]]:
        """(mean, samples) for each shape seen."""
        return [((total / count).float(), count) for total, count in self.sums.values() if count]


class BiasCorrection:
    """Corrects the bias of every convolution and linear whose weight a static observer quantizes.

    A missing bias is added where there is an error to correct. Works on any Quantizer's prepared graph.
    """

    def statistics(self, prepared: GraphModule) -> dict[Node, RunningMean]:
        """What to measure: the mean input of each site."""
        return {
            node: RunningMean(features=ops.op_name(node) == "linear")
            for node in prepared.graph.nodes
            if ops.op_name(node) in _BIASED and _weight_observer(prepared, node) is not None
        }

    def apply(self, prepared: GraphModule, measured: dict[Node, RunningMean]) -> int:
        """Correct the biases in place; returns how many changed."""
        changed = 0
        for node, mean in measured.items():
            error = mean_error(prepared, node, mean)
            if error is not None and bool(error.any()):
                _subtract(prepared, node, error)
                changed += 1
        prepared.recompile()
        return changed


def mean_error(prepared: GraphModule, node: Node, mean: RunningMean) -> torch.Tensor | None:
    """E[(Wq - W) * x] of one site, (out,); None if it saw no data."""
    weight = ops.constant_value(prepared, node.args[1].args[0])  # type: ignore
    observer: Any = _weight_observer(prepared, node)
    scale, zero_point = observer.calculate_qparams()
    axis = int(observer.ch_axis) if scale.numel() > 1 else None
    if axis is None:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    grid = QParams(observer.dtype, observer.quant_min, observer.quant_max, axis, False, scale, zero_point)
    rounding = decode(encode(weight, grid), grid) - weight
    total, samples = torch.zeros(weight.shape[0], dtype=torch.float64), 0
    for value, count in mean.means():
        args = (value[None], rounding, None, *node.args[3:])
        output = node.target(*args[: len(node.args)] if len(node.args) > 2 else args[:2], **node.kwargs)  # type: ignore
        rest = output.movedim(-1, 0) if mean.features else output.movedim(1, 0)
        total, samples = total + count * rest.flatten(1).mean(1).double(), samples + count
    return (total / samples).float() if samples else None


def _subtract(prepared: GraphModule, node: Node, error: torch.Tensor) -> None:
    bias = ops.argument(node, 2)
    corrected = -error if bias is None else ops.constant_value(prepared, bias) - error
    name = passes.fresh_name(prepared, f"{node.name}_corrected_bias")
    prepared.register_parameter(name, torch.nn.Parameter(corrected, requires_grad=False))
    with prepared.graph.inserting_before(node):
        attribute = prepared.graph.get_attr(name)
    attribute.meta["val"] = corrected
    node.args = (*node.args[:2], attribute, *node.args[3:])


def _weight_observer(prepared: GraphModule, node: Node) -> Any:
    """The static integer observer of a constant weight, or None."""
    source = ops.argument(node, 1)
    observer: Any = observer_of(prepared, source) if source is not None else None
    if observer is None or source is None or not ops.is_constant(source.args[0]):  # type: ignore[arg-type]
        return None
    bias = ops.argument(node, 2)
    plain = hasattr(observer, "qscheme") and not getattr(observer, "is_dynamic", False)
    integer = getattr(observer, "dtype", None) in (torch.int8, torch.uint8, torch.int16)
    return observer if plain and integer and (bias is None or bias.op == "get_attr") else None
