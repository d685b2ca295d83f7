"""How much an error of a site's outputs weighs, by the gradients of the network's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from torchquant.calibration.parallel import total_
from torchquant.errors import CalibrationError
from torchquant.fx import ops

_LARGEST_METRIC = 2048  # outputs of a site up to which their products are kept
_EVEN = 0.01  # share of every output's weight that is the same for all


def distance(wanted: torch.Tensor, got: torch.Tensor) -> float:
    """Sum of the squared differences where the float graph's values are finite, in double precision, piece by piece.

    Raises:
        CalibrationError: the two differ in shape.
    """
    if wanted.shape != got.shape:
        raise CalibrationError(
            f"a value has the shape {tuple(wanted.shape)} in the float graph, and {tuple(got.shape)} in the quantized "
            "one: its size depends on the data, and algorithms compare value by value. Quantize with `algorithms=()`."
        )
    parts = zip(*(t.reshape(-1).split(1 << 17) for t in (wanted, got)), strict=True)
    return sum(_squares(x, y) for x, y in parts)


def _squares(wanted: torch.Tensor, got: torch.Tensor) -> float:
    if wanted.dtype == got.dtype == torch.float32:
        plain = float((got - wanted).square_().sum(dtype=torch.float64))
        if math.isfinite(plain):
            return plain
    return float((got.double() - wanted).masked_fill_(~wanted.isfinite(), 0.0).square_().sum())


def random_gradients(
    outputs: Sequence[Any], measured: Mapping[Node, torch.Tensor], generator: torch.Generator
) -> Iterator[tuple[Node, torch.Tensor]]:
    """Gradients of (outputs . r), r standard normal: their products have the mean JT J."""
    floats = [o for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad]
    loss = sum((o * torch.randn(o.shape, generator=generator).to(o.device)).sum() for o in floats)
    if isinstance(loss, torch.Tensor):
        gradients = torch.autograd.grad(loss, list(measured.values()), allow_unused=True, retain_graph=True)
        yield from ((node, g) for node, g in zip(measured, gradients, strict=True) if g is not None)


class OutputMetric:
    """Mean product of the gradients by two outputs of a site, on the way."""

    def __init__(self, site: Node) -> None:
        self._axis = -1 if ops.op_name(site) == "linear" else 1
        self._sums = torch.zeros(outputs_of(site), outputs_of(site), dtype=torch.float64)

    def add(self, gradient: torch.Tensor) -> None:
        rows = gradient.movedim(self._axis, 0).flatten(1).float()
        self._sums = self._sums.to(rows.device) + rows @ rows.T

    def shrunk(self, samples: float) -> torch.Tensor:
        """(outputs, outputs), mean diagonal 1, shrunk to the diagonal: more so the fewer samples there were."""
        total_(self._sums)
        metric = (self._sums / self._sums.diagonal().mean().clamp(min=1e-300)).float()
        share = len(metric) / (len(metric) + max(samples, 1.0))
        diagonal = (1 - _EVEN) * metric.diagonal() + _EVEN
        return (1 - share) * metric + torch.diag(diagonal - (1 - share) * metric.diagonal())


def outputs_of(site: Node) -> int:
    """How many outputs, or output channels, a convolution or linear has."""
    value = site.meta["val"]
    return int(value.shape[-1 if ops.op_name(site) == "linear" else 1])
