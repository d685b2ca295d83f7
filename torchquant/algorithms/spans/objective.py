"""What the block algorithms make small: the error of a span's results, weighed and aimed as they say.

z, zq    results of the span, as they should be and as they are with the codes at hand
F        how much the network's output feels an error in each element (see `Task.sensitivity`), mean 1; or one
sum over results and samples of F (zq - z)^2
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from torchquant.algorithms.spans.compensation import Compensated
from torchquant.calibration.evaluator import Evaluator
from torchquant.calibration.parallel import total
from torchquant.calibration.stream import Task
from torchquant.fx.grids import fake_quantizer, grid_of
from torchquant.fx.reading import observer_of

__all__ = ["Objective", "activation_observers", "dropped", "passing"]


class Objective:
    """The weighed squared error of a span's results.

    Args:
        task: of the span.
        sensitive: weigh errors by `Task.sensitivity`; if not, all alike.
        aim: what the results should be, for the inputs at hand; None: the float results.
    """

    def __init__(self, task: Task, *, sensitive: bool, aim: Compensated | None = None) -> None:
        self.task, self._aim, self._sensitive = task, aim, sensitive
        self._units = self._mean_sensitivities() if sensitive else []

    def sensitivities(self, batch: int) -> list[torch.Tensor | None]:
        """F of each result."""
        if not self._sensitive:
            return [None] * len(self.task.results)
        pairs = zip(self.task.sensitivity(batch), self._units, strict=True)
        return [None if f is None else f / unit for f, unit in pairs]

    def wanted(self, inputs: Mapping[Node, Any], targets: Sequence[Any]) -> Sequence[Any]:
        """z for the span's inputs, where `targets` are the float results."""
        return targets if self._aim is None else self._aim.results(inputs)

    def error(self, env: Mapping[Node, Any], wanted: Sequence[Any], weights: Sequence[Any]) -> torch.Tensor:
        """The weighted squared error of the results in `env`, summed over the samples."""
        error = torch.zeros(())
        for node, z, weight in zip(self.task.results, wanted, weights, strict=True):
            if isinstance(z, torch.Tensor) and z.is_floating_point():
                square = (env[node] - z).square()
                error = error + (square if weight is None else square * weight).sum()
        return error

    def of(self, evaluator: Evaluator) -> float:
        """The error over all batches (of all processes), on inputs from the quantized prefix."""
        error = 0.0
        with torch.no_grad():
            for batch in range(self.task.count):
                inputs = self.task.inputs(batch, "quantized")
                wanted = self.wanted(inputs, self.task.targets(batch))
                env = evaluator.run(self.task.span.nodes, dict(inputs))
                error += float(self.error(env, wanted, self.sensitivities(batch)))
        return total(error)[0]

    def _mean_sensitivities(self) -> list[float]:
        sums = [0.0] * (2 * len(self.task.results))
        for batch in range(self.task.count):
            for i, sensitivity in enumerate(self.task.sensitivity(batch)):
                if sensitivity is not None:
                    sums[2 * i] += float(sensitivity.sum(dtype=torch.float64))
                    sums[2 * i + 1] += sensitivity.numel()
        sums = total(*sums)
        return [max(s / max(n, 1.0), 1e-30) for s, n in zip(sums[::2], sums[1::2], strict=True)]


def dropped(quantized: Any, exact: Any, drop: float, generator: torch.Generator) -> Any:
    """Each element from `exact` with probability `drop` (QDrop), where it is a float tensor."""
    if not drop or not isinstance(quantized, torch.Tensor) or not quantized.is_floating_point():
        return quantized
    return torch.where(torch.rand(quantized.shape, generator=generator) < drop, exact, quantized)


def activation_observers(task: Task) -> Iterator[tuple[Node, Any]]:
    """The observers of a span, node and module."""
    for node in task.span.nodes:
        observer = observer_of(task.prepared, node)
        if observer is not None:
            yield node, observer


def passing(task: Task, drop: float, generator: torch.Generator) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Observer's target -> its rounding with a gradient, elements left out with probability `drop`."""

    def fake(observer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def quantize(x: torch.Tensor) -> torch.Tensor:
            quantized = fake_quantizer(observer, x.shape)(x)
            grid = grid_of(observer, x.shape)
            if grid is None or grid.dialect != "tensor":  # what rounds them has no gradient of its own
                quantized = x + (quantized - x).detach()
            return dropped(quantized, x, drop, generator)

        return quantize

    return {str(node.target): fake(observer) for node, observer in activation_observers(task)}
